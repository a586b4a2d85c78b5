"""The trainer: the model, its optimizer, and the step (draw, loss, update) that joins them.

A step makes its random draws first, from generators that are reseeded for every step. Step n of a run is therefore the
same whether the run was resumed or not, and no generator state has to be saved.

The loss is a pure function of the parameters, the batch and the draws. A step runs in one of three modes, which agree
up to rounding:

    eager       one operator at a time
    compiled    torch.compile turns the loss and its gradient into one graph each, for one batch shape
    captured    as compiled, and the draws, the loss, its gradient and the update are recorded as one CUDA graph, which
                the host launches with one call; one process only
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastle.checkpoint import Checkpoint, check_identity, check_sections
from fastle.choices import StepMode
from fastle.config import ConfigError, RunConfig
from fastle.errors import FastleError
from fastle.machine import is_old
from fastle.method.model import Autoencoder
from fastle.method.objective import Draws, Losses, make_objective
from fastle.method.own import OwnParts
from fastle.phases import phase

from .average import make_averages
from .capture import CannotCapture, StepGraph
from .memory import OutOfMemory, check_fits, out_of_memory, too_large
from .optimizer import kept_of, make_optimizer
from .precision import fast_arithmetic, with_precision
from .schedule import rate_share

# one stream of random numbers for the slices, which all ranks share, and one for what each rank draws for itself
SLICES, VIEWS = 0, 1


# all parts are as the configuration describes them
FASTLES = OwnParts()


class CannotCompile(FastleError):
    """torch.compile failed on this machine."""


class Trainer:
    """Trains a model; call it with a batch to take one step.

    Args:
        config: The configuration of the run; its seed determines the initial weights.
        device: The device of the model, the optimizer and the batches.
        mode: How steps are computed; see the module's docstring. Unless it is "eager", the first step takes a minute or
            more.
        rank, world_size: The rank of this process and the number of processes. With more than one, a process group must
            have been initialised.
        total_steps: The length of the run, on which a changing learning rate depends; None for `config.train.steps`.
        own: What the caller made, of which the configuration only knows the names.

    Raises:
        ConfigError: The device cannot compute in the precision of the configuration.

    Attributes:
        model: The autoencoder that is trained.
        optimizer: On a GPU its learning rate is a tensor, which is filled before each step.
        averages: Of the weights, one for each length in the configuration.
        mode: How steps are computed now. "captured" becomes "compiled" where a step cannot be captured.
        why_not_captured: Why a trainer that was asked for captured steps compiles them instead, or None. Final after
            the first step.
        done: The number of steps taken so far.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        mode: StepMode = "eager",
        rank: int = 0,
        world_size: int = 1,
        total_steps: int | None = None,
        own: OwnParts = FASTLES,
    ) -> None:
        config = with_precision(config, device)
        self.config, self.device, self.mode = config, device, mode
        self.rank, self.world_size = rank, world_size
        self._total = total_steps or config.train.steps
        if self._total is None and (config.train.schedule != "constant" or config.train.warmup):
            raise ValueError(f"the learning rate of a run of {config.train.epochs} epochs needs total_steps")
        if config.train.precision == "bf16" and is_old(device):
            raise ConfigError(
                f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic, and emulating it is "
                "slower than fp32; use --precision fp32"
            )
        self.model = _initial_model(config, device) if own.model is None else own.model
        self.model.bits = config.data.bits
        if own.model is not None and world_size > 1:
            # the caller's processes may have drawn different weights. DDP makes them equal too, but only after the
            # judge and the averages are copied
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self.objective = make_objective(self.model, config.objective, judge=own.judge, transform=own.transform)
        self.optimizer = make_optimizer(self.model, config.train, device)
        self.averages = make_averages(self.model, config.train.averages)
        self.done = 0
        if mode != "eager":
            # a graph break is an error: a step that runs slower than the user asked for must not go unnoticed
            options = compile_options(device, bf16=config.train.precision == "bf16")
            self.objective.compile(fullgraph=True, dynamic=False, options=options)
        self.why_not_captured: str | None = None
        self._graph: StepGraph | None = None
        if mode == "captured" and (reason := _why_no_capture(device, world_size)):
            self._fall_back(reason)
        # each rank normalises with its own batch, and DDP gives every rank the running statistics of rank 0
        self._loss = self._distributed() if world_size > 1 else self.objective
        self._shared, self._local = Generator(device), Generator(device)

    def __call__(self, images: Tensor) -> Losses:
        """Takes one step, without waiting for the device.

        Args:
            images: The batch of this rank, (B, C, H, W), uint8 or in [0, 1], on the device.

        Raises:
            CannotCompile: torch.compile failed; possible in the first step of the compiled and captured modes.
            OutOfMemory: The batch is too large.
        """
        self.model.train()
        with fast_arithmetic(self.device, self.config.train.precision):
            losses = self._step(images)
        self.done += 1
        return losses

    def _step(self, images: Tensor) -> Losses:
        try:
            if self.mode == "captured" and self._graph is None:
                self._capture(images)
            self._prepare()
            if self._graph is None:
                return self._update(images)
            with phase("replay"):
                return self._graph(images)
        except RuntimeError as error:
            # importing it takes seconds, and the optimizer has done so by now
            from torch._dynamo.exc import TorchDynamoException

            if isinstance(error, TorchDynamoException):
                reason = next(line for line in (*str(error).splitlines(), type(error).__name__) if line.strip())
                raise CannotCompile(f"the step cannot be compiled here: {reason.strip()}; use --step eager") from error
            if not out_of_memory(error):
                raise
            raise OutOfMemory(too_large(self.config, len(images), self.device)) from error

    def _distributed(self) -> DistributedDataParallel:
        # torch would cut the compiled loss into a graph for each bucket of gradients
        torch._dynamo.config.optimize_ddp = False
        # gradients are parts of the buckets that the ranks exchange, and not copied into them
        return DistributedDataParallel(self.objective, gradient_as_bucket_view=True)

    def rate(self, done: int) -> float:
        """The learning rate of the step after `done` steps."""
        train = self.config.train
        return train.lr if self._total is None else train.lr * rate_share(train, done, self._total)

    def draw(self, images: Tensor) -> Draws:
        """Makes the random draws of the next step: a pure function of (seed, step, rank).

        Args:
            images: A batch, of which only the shape matters.
        """
        self._seed()
        return self._draw(images)

    @property
    def graph_memory(self) -> int:
        """Bytes the process had allocated at the peak of the captured step; 0 if no step was captured."""
        return self._graph.memory if self._graph else 0

    def _prepare(self) -> None:
        """Sets what differs from step to step: the generators, the learning rate, and how fast the averages move."""
        self._seed()
        rate = self.rate(self.done)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        for average in self.averages:
            average.prepare(self.done + 1)

    def _seed(self) -> None:
        """Seeds the generators for the next step."""
        seed = self.config.train.seed
        self._shared.manual_seed(stream_seed(seed, SLICES, self.done))
        self._local.manual_seed(stream_seed(seed, VIEWS, self.done, self.rank))

    def _draw(self, images: Tensor) -> Draws:
        return self.objective.draw(images.shape, shared=self._shared, local=self._local)

    def _update(self, images: Tensor) -> Losses:
        """Everything that the device does in a step: draws, loss, backward and update."""
        train = self.config.train
        self.optimizer.zero_grad()
        parts = [self._backward(part, last) for part, last in _parts(images, train.accumulate)]
        with phase("optimizer"):
            if train.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
            self.optimizer.step()
            self.objective.update_judge()
            for average in self.averages:
                average.update(self.model)
        return parts[0] if len(parts) == 1 else _joined_losses(parts)

    def _backward(self, images: Tensor, last: bool) -> Losses:
        """Adds the gradient of a part of the batch, of which only the last makes the ranks exchange theirs."""
        with phase("draws"):
            draws = self._draw(images)
        train, waiting = self.config.train, self._without_exchange(last)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16")
        with waiting:
            with phase("loss"), autocast:
                losses: Losses = self._loss(images, draws)
            with phase("backward"):
                (losses.total if train.accumulate == 1 else losses.total / train.accumulate).backward()
        return losses

    def _without_exchange(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._loss, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = self._loss.no_sync()
        return waiting

    def _capture(self, images: Tensor) -> None:
        generators = (self._shared, self._local)
        try:
            self._graph = StepGraph(
                self._update, images, seed=self._prepare, generators=generators, state=self._state,
                moments=lambda: [moments["exp_avg"] for moments in self.optimizer.state.values()],
            )  # fmt: skip
        except CannotCapture as error:
            self._fall_back(str(error))
            # a recording that failed half-way may still hold on to the old generators
            self._shared, self._local = Generator(self.device), Generator(self.device)

    def _fall_back(self, reason: str) -> None:
        self.mode, self.why_not_captured = "compiled", f"steps cannot be captured ({reason}): they are compiled"

    def _state(self) -> Iterator[Tensor]:
        """The tensors that outlive a step and that it changes."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for moments in self.optimizer.state.values():
            yield from moments.values()
        if self.objective.kept_judge is not None:
            yield from self.objective.kept_judge.parameters()
        for average in self.averages:
            yield from average.tensors()

    def weights_are_finite(self) -> bool:
        """Whether every weight of the model is finite. Waits for the device."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors a checkpoint must hold, by section.

        These are the model, the optimizer, the judge if it has its own weights, and each average by its name.
        """
        sections = {"model": self.model.state_dict(), "optimizer": {}}
        for index, moments in self.optimizer.state_dict()["state"].items():
            sections["optimizer"] |= {f"{index}.{name}": value for name, value in moments.items()}
        if self.objective.kept_judge is not None:
            sections["judge"] = self.objective.kept_judge.state_dict()
        return sections | {average.name: average.model.state_dict() for average in self.averages}

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if a checkpoint cannot be the state of this run at the step it names."""
        check_identity(checkpoint, self.config)
        check_sections(checkpoint, self._sections())
        moments = checkpoint.section("optimizer")
        for name, value in moments.items():
            if name.endswith(".step") and not 0 <= float(value) <= checkpoint.step:
                raise checkpoint.unfit(f"holds optimizer.{name} {float(value):g}, and is of step {checkpoint.step}")
            if name.endswith(".exp_avg_sq") and float(value.min()) < 0:
                raise checkpoint.unfit(f"holds a negative square in optimizer.{name}")

    def _sections(self) -> dict[str, dict[str, Tensor]]:
        """Tensors with the names, shapes and types that `state` has after a step."""
        sections = self.state()
        count = torch.zeros((), dtype=torch.float32)
        for index, (weight, names) in enumerate(kept_of(self.optimizer)):
            sections["optimizer"] |= {f"{index}.{name}": count if name == "step" else weight for name in names}
        return sections

    def load(self, checkpoint: Checkpoint, step: int) -> None:
        """Restores what `state` returned at `step`.

        Raises:
            CheckpointError: See `check`. Nothing was restored.
        """
        self.check(checkpoint)
        self.model.load_state_dict(checkpoint.section("model"))
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = [weight for weight, _ in kept_of(self.optimizer)]
        for key, value in checkpoint.section("optimizer").items():
            index, name = key.split(".")
            # the fused update needs a moment in the memory format of its parameter: it ignores strides
            moment = torch.empty_like(parameters[int(index)]).copy_(value) if name != "step" else value
            moments.setdefault(int(index), {})[name] = moment.detach()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.objective.kept_judge is not None:
            self.objective.kept_judge.load_state_dict(checkpoint.section("judge"))
        for average in self.averages:
            average.model.load_state_dict(checkpoint.section(average.name))
        # a captured graph would keep using the moments that it was recorded with
        self._graph = None
        self.done = step


def _initial_model(config: RunConfig, device: torch.device) -> Autoencoder:
    """The model of a configuration, with the weights of its seed.

    Raises:
        ConfigError: Only the caller can make it.
        OutOfMemory: It does not fit.
    """
    check_fits(config.model, device)
    # the weights are initialised on the CPU, so that a seed gives the same ones on every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model: Autoencoder = Autoencoder(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _parts(images: Tensor, count: int) -> list[tuple[Tensor, bool]]:
    """Equal parts of a batch, each with whether it is the last."""
    return [(part, index == count - 1) for index, part in enumerate(images.chunk(count))]


def _joined_losses(parts: list[Losses]) -> Losses:
    """The means of the parts' terms, and all of their latents."""
    terms: dict[str, Any] = {"latent": torch.cat([part.latent for part in parts])}
    for field in fields(Losses):
        values = [getattr(part, field.name) for part in parts]
        if field.name != "latent" and values[0] is not None:
            terms[field.name] = torch.stack(values).mean()
    return Losses(**terms)


def _why_no_capture(device: torch.device, world_size: int) -> str | None:
    """Why steps cannot be captured, as far as that is known without trying, or None."""
    if device.type != "cuda":
        return f"a {device.type} device has no CUDA graphs"
    if is_old(device):
        return f"on {torch.cuda.get_device_name(device)} operators run in torch, and some of them wait for the GPU"
    return f"a graph holds the step of one process, not of {world_size}" if world_size > 1 else None


def compile_options(device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """The options that torch.compile needs for a correct step."""
    # torch 2.15's bf16 code for AVX-512 gives NaN after the encoder's stem; its AVX2 code is correct
    return {"cpp.simdlen": 256} if device.type == "cpu" and bf16 else {}


def stream_seed(seed: int, *key: int) -> int:
    """The generator seed of one random stream of a run; different keys give unrelated streams."""
    # 63 bits, because torch takes a signed integer
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)
