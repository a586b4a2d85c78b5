"""What the bench of the step compares, and what it is measured by: the exact result, operations, the device's peak.

    plain                   fastle/training/plain_step.py: eager, fp32, contiguous
    plain bf16              the same under autocast, channels-last
    plain compiled          that, its loss as one graph of torch.compile
    fastle eager            Trainer(mode="eager"), fp32
    fastle compiled         mode="compiled"
    fastle captured         mode="captured"; CUDA only
    fastle … bf16           the same, precision="bf16"

fp32 is with PyTorch's defaults: on a GPU convolutions may take TF32, matrix products not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Stopwatch
from fastle.config import Precision, RunConfig
from fastle.method.model import Autoencoder
from fastle.method.objective import Draws, SelfTeaching
from fastle.training.plain_step import PlainStep
from fastle.training.trainer import StepMode, Trainer

Step: TypeAlias = PlainStep | Trainer

NAMES = (
    "plain",
    "plain bf16",
    "plain compiled",
    "fastle eager",
    "fastle eager bf16",
    "fastle compiled",
    "fastle compiled bf16",
    "fastle captured",
    "fastle captured bf16",
)
BASELINE = NAMES[0]
COUNTED_BATCH = 2  # operations are in proportion to it
CHUNK = 16  # images whose float64 activations are held at once
MATRIX, REPEATS = {"cpu": 2048, "cuda": 8192}, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to make a training step.

    Args:
        name: in tables and reports.
        make: the step, from the run's initial weights.
        ours: fastle's; must be right for the row to count.
        precision: of the convolutions.
    """

    name: str
    make: Callable[[], Step]
    ours: bool
    precision: Precision


class Start:
    """Where all sides start from: fastle's initial weights, and its draws.

    Args:
        config: of the run; its precision does not matter.

    Attributes:
        weights: a state dict.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        # never stepped
        self._step = Trainer(config, device)
        self.weights: dict[str, Tensor] = self._step.model.state_dict()

    def draw(self, images: Tensor, done: int) -> Draws:
        """What fastle's step draws after `done` steps."""
        self._step.done = done
        return self._step.draw(images)

    def parameters(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._step.model.parameters()]


def names(device: torch.device) -> list[str]:
    """The sides of a device."""
    return [name for name in NAMES if device.type == "cuda" or "captured" not in name]


def make_sides(start: Start, wanted: Sequence[str]) -> list[Side]:
    """The sides of these names."""
    return [_make_side(start, name) for name in wanted]


def _make_side(start: Start, name: str) -> Side:
    fast = "bf16" in name or name == "plain compiled"
    precision: Precision = "bf16" if fast else "fp32"
    config = dataclasses.replace(start.config, train=dataclasses.replace(start.config.train, precision=precision))
    if name.startswith("fastle"):
        make: Callable[[], Step] = partial(_make_ours, config, start.device, name.split()[1])
    else:
        make = partial(
            PlainStep,
            config,
            start.device,
            weights=start.weights,
            draw=start.draw,
            channels_last=fast,
            compiled=name == "plain compiled",
        )
    return Side(name=name, make=make, ours=name.startswith("fastle"), precision=precision)


def _make_ours(config: RunConfig, device: torch.device, mode: str) -> Trainer:
    """Raises ValueError for a mode that this checkout's step does not have."""
    if mode not in get_args(StepMode):
        raise ValueError(f"Trainer has no mode {mode!r}")
    # a name that is not in the type yet
    make: Callable[..., Trainer] = Trainer
    return make(config, device, mode=mode)


@dataclass(frozen=True, slots=True)
class Result:
    """What a first step did: its loss, and for each parameter the gradient and the weights after it."""

    loss: Tensor
    gradients: list[Tensor]
    weights: list[Tensor]


def first_result(step: Step, images: Tensor) -> Result:
    """Takes the first step, and reads what it did.

    Gradients are read from AdamW's first moment, (1 − β1) times the gradient then: what a graph or a compiled step
    leaves in `.grad` is its own business, and this is what the optimizer saw.

    Raises:
        RuntimeError: fastle's step goes on in another mode than it was made for.
    """
    mode = getattr(step, "mode", None)
    loss = step(images)
    if getattr(step, "mode", None) != mode:
        raise RuntimeError(f"the step went on as {step.mode}")  # type: ignore[union-attr]
    (group,) = step.optimizer.param_groups
    return Result(
        # a captured step's loss is overwritten by the next one's
        loss=(loss if isinstance(loss, Tensor) else loss.total).detach().clone(),
        gradients=[step.optimizer.state[p]["exp_avg"].double() / (1 - group["betas"][0]) for p in group["params"]],
        weights=[p.detach().clone() for p in group["params"]],
    )


class Chunked(nn.Module):
    """A module that mixes no samples, on some of them at a time; the backward computes each part again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= CHUNK:
            return self.inner(x)
        return torch.cat([checkpoint(self.inner, part, use_reentrant=False) for part in x.split(CHUNK)])


def exact(start: Start, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the first step on a batch by fastle's objective in float64.

    That the objective is the method is for the tests to show: they compare it with an oracle, and the plain step with
    it.
    """
    model = Autoencoder(start.config.model).to(start.device)
    model.load_state_dict(start.weights)
    objective = SelfTeaching(model.double().train(), start.config.objective)
    parameters = list(model.parameters())
    chunked: tuple[tuple[nn.Module, str], ...] = (
        (model.decoder, "up"),
        (model.encoder, "down"),
        (objective.judge, "down"),
    )
    for module, name in chunked:
        setattr(module, name, Chunked(getattr(module, name)))
    draws = start.draw(images, 0)
    assert draws.slices is not None
    loss = objective(images.double() / 255, dataclasses.replace(draws, slices=draws.slices.double())).total
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


@cache
def count_flops(config: RunConfig, device: torch.device) -> dict[str, float]:
    """FLOP for each image of a step, as executed: of "fastle" and "plain", each eager in fp32.

    PyTorch's counter sees convolutions and matrix products, forward and backward, a multiply-add as two. It does not
    see elementwise operations, nor all products in fastle's operators (SIGReg's are a thousandth of a step).
    """
    start = Start(config, device)
    shape = (COUNTED_BATCH, config.model.channels, config.model.size, config.model.size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    counts = {}
    for structure, name in (("fastle", "fastle eager"), ("plain", "plain")):
        step = _make_side(start, name).make()
        with FlopCounterMode(display=False) as counter:
            step(images)
        counts[structure] = counter.get_total_flops() / COUNTED_BATCH
    return counts


def products(device: torch.device, precision: Precision) -> str:
    """What multiplies in a side's convolutions: bf16, fp32, or tf32 where PyTorch's defaults take that."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "tf32" if precision == "fp32" and tf32 else precision


@cache
def measured_peak(device: torch.device, kind: str) -> float:
    """FLOP in a second of the best of several large square matrix products; `kind` is one of `products`."""
    n = MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16 if kind == "bf16" else torch.float32) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        stopwatch = Stopwatch(device)
        best = min(stopwatch.time(lambda: a @ b, queued=True) for _ in range(REPEATS))
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / best * 1e3
