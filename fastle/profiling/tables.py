"""What a profile prints: the phases of a step and its rates, sides across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from fastle.phases import PHASES

from .trace import Times

TOLERANCE = 0.05  # of the phases together and the step without the profiler
LABELS = {
    "loss": "loss (one graph)",
    "replay": "replay (one graph)",
    "step": "other",
    "device wait": "wait for the device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured of a side.

    Attributes:
        phases, total: under the profiler; see `phase_times`.
        step_ms: of the steps without the profiler.
        flop: for each image.
        products, peak: what its convolutions multiply, and FLOP in a second of a matrix product of that kind.
        memory: bytes at the peak of a step.
    """

    side: str
    phases: dict[str, Times]
    total: Times
    step_ms: float
    flop: float
    products: str
    peak: float
    memory: int

    def phases_over_step(self) -> float:
        """The phases of the host together, over the step without the profiler."""
        return sum(times.host for times in self.phases.values()) / self.step_ms


def phase_table(figures: Sequence[Figures], device: torch.device) -> Table:
    """Phases down, sides across: ms of a step, on the host and on a GPU."""
    gpu = device.type == "cuda"
    table = Table("ms in a step", title="with the profiler")
    for side in figures:
        for place in ("host", "device") if gpu else ("host",):
            table.add_column(f"{side.side}, {place}", justify="right")
    rows = [name for name in PHASES if any(name in side.phases for side in figures)]
    for name in rows:
        times = [side.phases.get(name) for side in figures]
        _add_times(table, LABELS.get(name, name), times, gpu, last=name == rows[-1])
    _add_times(table, "total", [side.total for side in figures], gpu)
    return table


def _add_times(table: Table, label: str, sides: Sequence[Times | None], gpu: bool, *, last: bool = False) -> None:
    cells = []
    for times in sides:
        cells.append("–" if times is None else f"{times.host:,.2f}")
        if gpu:
            cells.append("–" if times is None or not times.device else f"{times.device:,.2f}")
    table.add_row(label, *cells, end_section=last)


def rate_table(figures: Sequence[Figures], batch: int) -> Table:
    """Rates and memory, sides across."""
    table = Table("a step", title="without the profiler")
    for side in figures:
        table.add_column(side.side, justify="right")
    for label, cell in (
        ("ms", lambda side: f"{side.step_ms:,.2f}"),
        ("host's phases over that", lambda side: f"{side.phases_over_step():.1%}"),
        ("images/s", lambda side: _digits(1e3 * batch / side.step_ms)),
        ("GFLOP for each image", lambda side: _digits(side.flop / 1e9)),
        ("TFLOP/s", lambda side: _digits(_rate(side, batch) / 1e12)),
        ("measured peak, TFLOP/s", lambda side: f"{_digits(side.peak / 1e12)} ({side.products})"),
        ("MFU", lambda side: f"{_rate(side, batch) / side.peak:.1%}"),
        ("peak memory, MB", lambda side: _digits(side.memory / 1e6)),
    ):
        table.add_row(label, *map(cell, figures))
    return table


def _rate(side: Figures, batch: int) -> float:
    return 1e3 * batch * side.flop / side.step_ms


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def legend(figures: Sequence[Figures], device: torch.device) -> list[str]:
    """What the figures are, a line each."""
    lines = [
        "FLOP: executed in convolutions and matrix products, forward and backward, counted by torch.utils.flop_counter "
        "over one eager evaluation of each side; fastle's own operators are not seen",
        "MFU: those in a second over the measured peak, that of the best of several large matrix products",
        "memory: torch.cuda.max_memory_allocated"
        if device.type == "cuda"
        else "memory: the peak of what one step allocates through PyTorch; weights and moments are there before",
    ]
    if any("loss" in side.phases for side in figures):
        lines.insert(0, "loss (one graph): encode to SIGReg in one compiled graph, whose phases cannot be told apart")
    if any("replay" in side.phases for side in figures):
        lines.insert(0, "replay (one graph): draws to optimizer in one CUDA graph, whose phases cannot be told apart")
    if any(abs(side.phases_over_step() - 1) > TOLERANCE for side in figures):
        lines.append(
            f"the phases and the step differ by more than {TOLERANCE:.0%}: the machine is busy with something else, or "
            "the steps are so short that the profiler slows them; try a larger N"
        )
    return lines
