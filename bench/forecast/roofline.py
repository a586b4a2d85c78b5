"""How long a GPU would take for what a step launches, computed from its data sheet: no measurement.

    bound      each launch at its roofline: the longer of its bytes at the full bandwidth and its FLOP at the full rate
    forecast   the same with what well-written kernels reach of either (`REACHED`), what is known to be slow, and the
               time between two launches of a CUDA graph

Rates are dense, with fp32 sums: the tensor cores' for convolutions and products in bf16; in fp32 TF32 for convolutions
where there is TF32, and the CUDA cores for products and for SIGReg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.forecast.count import REST, Launch
from bench.forecast.generate import Counted
from fastle.config import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """A data sheet.

    Attributes:
        bandwidth: Bytes a second.
        bf16, tf32, fp32: FLOP a second; None where the tensor cores do not know the type.
    """

    name: str
    bandwidth: float
    fp32: float
    bf16: float | None
    tf32: float | None

    @property
    def precision(self) -> Precision:
        """In which a step computes there."""
        return "fp32" if self.bf16 is None else "bf16"


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(name="T4", bandwidth=320e9, fp32=8.1e12, bf16=None, tf32=None),
        GPU(name="A100", bandwidth=2039e9, fp32=19.5e12, bf16=312e12, tf32=156e12),
        GPU(name="RTX 4090", bandwidth=1008e9, fp32=82.6e12, bf16=165.2e12, tf32=82.6e12),
        GPU(name="H100", bandwidth=3350e9, fp32=66.9e12, bf16=989.4e12, tf32=494.7e12),
        GPU(name="H200", bandwidth=4800e9, fp32=66.9e12, bf16=989.4e12, tf32=494.7e12),
    )
}

# shares of the data sheet's rates: assumptions. an H100 reached 0.82 and 0.71 in fastle's step (docs/results/h100.md)
REACHED = {"bandwidth": 0.85, "tensor cores": 0.6, "CUDA cores": 0.6}
# how many times longer the bytes of fp32 atomics on scattered addresses take, of which the L2 adds few in a second
ATOMIC_SLOWDOWN = 4
# with fewer channels than a tensor core's tile takes, its lanes multiply zeros
CHANNEL_TILE = 8
LAUNCH = 1.5e-6  # seconds between two kernels of a CUDA graph
# AdamW reads weight, gradient and two moments in fp32, and writes all but the gradient
OPTIMIZER_BYTES = 7 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCost:
    """What a phase of a step, or the whole step, costs on a GPU: seconds, bytes, FLOP and launches."""

    phase: str
    bound: float
    forecast: float
    bytes: int
    flop: int
    launches: int


def step_costs(counted: Counted, gpu: GPU) -> list[PhaseCost]:
    """The costs of each phase and direction, of the optimizer and of the whole step."""
    groups: dict[str, list[Launch]] = {}
    for launch in counted.launches:
        name = launch.phase if launch.direction == "forward" else f"{launch.phase}, backward"
        groups.setdefault(name, []).append(launch)
    # the loss has no phase of its own: what is in no other comes last of its direction
    names = sorted(groups, key=lambda name: ("backward" in name, name.startswith(REST)))
    costs = [_cost(name, groups[name], gpu) for name in names]
    moved = OPTIMIZER_BYTES * counted.parameters
    seconds = moved / gpu.bandwidth
    costs.append(
        PhaseCost(
            phase="optimizer",
            bound=seconds,
            forecast=seconds / REACHED["bandwidth"] + LAUNCH,
            bytes=moved,
            flop=0,
            launches=1,
        )
    )
    return [*costs, _total(costs)]


def _total(costs: Sequence[PhaseCost]) -> PhaseCost:
    return PhaseCost(
        phase="step",
        bound=sum(cost.bound for cost in costs),
        forecast=sum(cost.forecast for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        flop=sum(cost.flop for cost in costs),
        launches=sum(cost.launches for cost in costs),
    )


def _cost(name: str, launches: Sequence[Launch], gpu: GPU) -> PhaseCost:
    return PhaseCost(
        phase=name,
        bound=sum(max(launch.bytes / gpu.bandwidth, launch.flop / _rate(launch, gpu)[0]) for launch in launches),
        forecast=sum(forecast(launch, gpu) for launch in launches),
        bytes=sum(launch.bytes for launch in launches),
        flop=sum(launch.flop for launch in launches),
        launches=len(launches),
    )


def _rate(launch: Launch, gpu: GPU) -> tuple[float, str]:
    """The most FLOP a second, and the units that reach it."""
    if launch.kind == "operator":
        return gpu.fp32, "CUDA cores"
    fastest = gpu.bf16 or (gpu.tf32 if launch.kind == "convolution" else None)
    return (gpu.fp32, "CUDA cores") if fastest is None else (fastest, "tensor cores")


def forecast(launch: Launch, gpu: GPU) -> float:
    """Seconds that a launch is expected to take."""
    bandwidth = REACHED["bandwidth"] * gpu.bandwidth
    moved, (rate, unit) = launch.bytes * (ATOMIC_SLOWDOWN if launch.atomics else 1), _rate(launch, gpu)
    # cuDNN computes in channels-last and turns each operand that lies otherwise, there or back
    turned = 2 * launch.contiguous_bytes
    flop = float(launch.flop)
    if launch.kind == "convolution" and unit == "tensor cores":
        for channels in launch.channels:
            flop *= -(-channels // CHANNEL_TILE) * CHANNEL_TILE / channels
    return max(moved / bandwidth, flop / (REACHED[unit] * rate)) + turned / bandwidth + LAUNCH
