"""One training step: draw, loss, update.

Everything random is drawn first, from generators that are seeded anew for each step, so that step n of a run is the
same whether the run was resumed or not and no generator has to be saved.

The loss of a batch and its draws is a pure function. A step runs in one of three modes, equal but for rounding:

    eager       operator by operator
    compiled    the loss and its gradient each as one graph, by torch.compile, for this very shape of batch
    captured    that, the draws and the update as one CUDA graph, which the host launches as a whole; one process only
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from fastle.checkpoint import Checkpoint
from fastle.config import RunConfig
from fastle.errors import FastleError
from fastle.method.model import Autoencoder
from fastle.method.objective import Draws, Losses, SelfTeaching, make_objective
from fastle.phases import phase

from .capture import CannotCapture, StepGraph
from .memory import OutOfMemory, out_of_memory, too_large

SLICES, VIEWS = 0, 1  # streams of random numbers

StepMode = Literal["eager", "compiled", "captured"]


class CannotCompile(FastleError):
    """torch.compile does not work here."""


class TrainStep:
    """The model, its optimizer and the step that joins them.

    Args:
        config: of the run; the seed decides the initial weights.
        device: where everything lives.
        mode: how a step is computed; see the module's legend. The first takes a minute or more unless eager.
        rank, world_size: of this process; above 1 a process group must be initialised.

    Attributes:
        model: what is trained.
        optimizer: on a GPU its learning rate is a tensor, which a schedule may fill between steps.
        mode: how steps are computed now.
        refused: why they are compiled though captured ones were asked for, known after the first step; or None.
        done: steps taken so far.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        mode: StepMode = "eager",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.device, self.mode, self.rank = config, device, mode, rank
        # weights are made on the CPU, so that a seed means the same on every device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model = Autoencoder(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = make_objective(self.model, config.objective)
        self.optimizer = make_optimizer(self.model, config.train.lr, device)
        self.done = 0
        if mode != "eager":
            # a graph that breaks is an error: what is slower than asked for must not pass for it
            options = compile_options(device, bf16=config.train.precision == "bf16")
            self.objective.compile(fullgraph=True, dynamic=False, options=options)
        self.refused: str | None = None
        self._graph: StepGraph | None = None
        if mode == "captured" and (refused := _no_capture(device, world_size)):
            self._refuse(refused)
        # each rank normalises with its own batch; the running statistics are those of rank 0, on every rank
        self._loss = DistributedDataParallel(self.objective) if world_size > 1 else self.objective
        self._shared, self._local = Generator(device), Generator(device)

    def __call__(self, images: Tensor) -> Losses:
        """One step on this rank's batch: uint8 (B, C, size, size) on the device. Does not wait for the device.

        Raises:
            CannotCompile: at the first step of the compiled and captured modes.
            OutOfMemory: the batch is too large.
        """
        self.model.train()
        try:
            if self.mode == "captured" and self._graph is None:
                self._capture(images)
            self._seed()
            if self._graph is None:
                losses = self._update(images)
            else:
                with phase("replay"):
                    losses = self._graph(images)
        except TorchDynamoException as error:
            reason = next(line for line in (*str(error).splitlines(), type(error).__name__) if line.strip())
            raise CannotCompile(f"the step cannot be compiled here: {reason.strip()}; use --step eager") from error
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(too_large(self.config, len(images), self.device)) from error
        self.done += 1
        return losses

    def draw(self, images: Tensor) -> Draws:
        """Everything random in the step that comes next, a pure function of (seed, step, rank)."""
        self._seed()
        return self._drawn(images)

    @property
    def graph_memory(self) -> int:
        """Bytes at the peak of a captured step, all that the process holds included; 0 when none was captured."""
        return self._graph.memory if self._graph else 0

    def _seed(self) -> None:
        """Puts the generators where they are for the step that comes next."""
        seed = self.config.train.seed
        self._shared.manual_seed(stream_seed(seed, SLICES, self.done))
        self._local.manual_seed(stream_seed(seed, VIEWS, self.done, self.rank))

    def _drawn(self, images: Tensor) -> Draws:
        return self.objective.draw(images.shape, shared=self._shared, local=self._local)

    def _update(self, images: Tensor) -> Losses:
        """Draws, loss, backward and update: all that the device does in a step."""
        with phase("draws"):
            draws = self._drawn(images)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")
        with phase("loss"), autocast:
            losses: Losses = self._loss(images, draws)
        with phase("backward"):
            self.optimizer.zero_grad()
            losses.total.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.objective.update_judge()
        return losses

    def _capture(self, images: Tensor) -> None:
        generators = (self._shared, self._local)
        try:
            self._graph = StepGraph(self._update, images, seed=self._seed, generators=generators, changed=self._changed)
        except CannotCapture as error:
            self._refuse(str(error))
            # a recording that broke off may still hold the others
            self._shared, self._local = Generator(self.device), Generator(self.device)

    def _refuse(self, reason: str) -> None:
        self.mode, self.refused = "compiled", f"steps cannot be captured ({reason}): they are compiled"

    def _changed(self) -> Iterator[Tensor]:
        """What outlives a step and is changed by it."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for moments in self.optimizer.state.values():
            yield from moments.values()
        if isinstance(self.objective, SelfTeaching) and self.config.objective.judge == "ema":
            yield from self.objective.judge.parameters()

    def weights_are_finite(self) -> bool:
        """Whether the model is worth saving. Waits for the device."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold, by section: model, optimizer and, where it has weights of its own, judge."""
        sections = {"model": self.model.state_dict(), "optimizer": {}}
        for index, moments in self.optimizer.state_dict()["state"].items():
            sections["optimizer"] |= {f"{index}.{name}": value for name, value in moments.items()}
        if isinstance(self.objective, SelfTeaching) and self.config.objective.judge == "ema":
            sections["judge"] = self.objective.judge.state_dict()
        return sections

    def load(self, checkpoint: Checkpoint, step: int) -> None:
        """Takes over what `state` gave at `step`.

        Raises:
            CheckpointError: a section is missing.
        """
        self.model.load_state_dict(checkpoint.section("model"))
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.model.parameters())
        for key, value in checkpoint.section("optimizer").items():
            index, name = key.split(".")
            # the fused update walks through weights and moments side by side, whatever their strides
            moment = torch.empty_like(parameters[int(index)]).copy_(value) if name != "step" else value
            moments.setdefault(int(index), {})[name] = moment.detach()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if isinstance(self.objective, SelfTeaching) and self.config.objective.judge == "ema":
            self.objective.judge.load_state_dict(checkpoint.section("judge"))
        # it would go on with the moments that it was recorded with
        self._graph = None
        self.done = step


def make_optimizer(model: nn.Module, lr: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW with PyTorch's defaults, one kernel for all parameters."""
    if device.type != "cuda":
        return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    # a number would be part of a graph for good
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr, device=device), fused=True, capturable=True)


def _no_capture(device: torch.device, world_size: int) -> str | None:
    """Why a captured step cannot be had, as far as it is known without trying."""
    if device.type != "cuda":
        return f"a {device.type} has no CUDA graphs"
    return f"they are of one process, not of {world_size}" if world_size > 1 else None


def compile_options(device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """torch.compile's options for a step."""
    # torch 2.15's bf16 code for AVX-512 gives NaN after the encoder's stem; its AVX2 code is right
    return {"cpp.simdlen": 256} if device.type == "cpu" and bf16 else {}


def stream_seed(seed: int, *key: int) -> int:
    """A generator's seed for one stream of a run; different keys give unrelated streams."""
    # 63 bits: torch takes a signed integer
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)
