"""One training step: draw, loss, update.

Everything random is drawn first, from generators that are seeded anew for each step, so that step n of a run is the
same whether the run was resumed or not and no generator has to be saved.

The loss of a batch and its draws is a pure function, which runs in one of two modes, equal but for rounding:

    eager       operator by operator
    compiled    as one graph, by torch.compile, for this very shape of batch
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import Checkpoint
from .config import RunConfig
from .errors import FastleError
from .model import Autoencoder
from .objective import Draws, Losses, SelfTeaching, make_objective
from .phases import phase

SLICES, VIEWS = 0, 1  # streams of random numbers

StepMode = Literal["eager", "compiled"]


class CannotCompile(FastleError):
    """torch.compile does not work here."""


class TrainStep:
    """The model, its optimizer and the step that joins them.

    Args:
        config: of the run; the seed decides the initial weights.
        device: where everything lives.
        mode: how the loss is computed; see the module's legend. The first compiled step takes a minute or more.
        rank, world_size: of this process; above 1 a process group must be initialised.

    Attributes:
        model: what is trained.
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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.train.lr)
        self.done = 0
        if mode == "compiled":
            # a graph that breaks is an error: what is slower than asked for must not pass for it
            options = compile_options(device, bf16=config.train.precision == "bf16")
            self.objective.compile(fullgraph=True, dynamic=False, options=options)
        # each rank normalises with its own batch; the running statistics are those of rank 0, on every rank
        self._loss = DistributedDataParallel(self.objective) if world_size > 1 else self.objective
        self._shared, self._local = Generator(device), Generator(device)

    def __call__(self, images: Tensor) -> Losses:
        """One step on this rank's batch: uint8 (B, C, size, size) on the device. Does not wait for the device.

        Raises:
            CannotCompile: in the compiled mode, at the first step.
        """
        self.model.train()
        with phase("draws"):
            draws = self.draw(images)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")
        try:
            with phase("loss"), autocast:
                losses: Losses = self._loss(images, draws)
            with phase("backward"):
                self.optimizer.zero_grad()
                losses.total.backward()
        except TorchDynamoException as error:
            reason = next(line for line in (*str(error).splitlines(), type(error).__name__) if line.strip())
            raise CannotCompile(f"the step cannot be compiled here: {reason.strip()}; use --step eager") from error
        with phase("optimizer"):
            self.optimizer.step()
            self.objective.update_judge()
        self.done += 1
        return losses

    def draw(self, images: Tensor) -> Draws:
        """Everything random in the step that comes next, a pure function of (seed, step, rank)."""
        seed = self.config.train.seed
        self._shared.manual_seed(stream_seed(seed, SLICES, self.done))
        self._local.manual_seed(stream_seed(seed, VIEWS, self.done, self.rank))
        return self.objective.draw(images.shape, shared=self._shared, local=self._local)

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
        for key, value in checkpoint.section("optimizer").items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if isinstance(self.objective, SelfTeaching) and self.config.objective.judge == "ema":
            self.objective.judge.load_state_dict(checkpoint.section("judge"))
        self.done = step


def compile_options(device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """torch.compile's options for a step."""
    # torch 2.15's bf16 code for AVX-512 gives NaN after the encoder's stem; its AVX2 code is right
    return {"cpp.simdlen": 256} if device.type == "cpu" and bf16 else {}


def stream_seed(seed: int, *key: int) -> int:
    """A generator's seed for one stream of a run; different keys give unrelated streams."""
    # 63 bits: torch takes a signed integer
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)
