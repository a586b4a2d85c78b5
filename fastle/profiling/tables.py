"""The tables that a profile prints: the phases of a step and its rates, a column for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from fastle.phases import PHASES

from .trace import Times

TOLERANCE = 0.05  # how far all phases together may be from the step without the profiler, before a note says so
LABELS = {
    "loss": "loss (one graph)",
    "replay": "replay (one graph)",
    "step": "other",
    "device wait": "wait for the device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What was measured of one step.

    Attributes:
        name: The step's name.
        phases, total: Milliseconds under the profiler; see `phase_times`.
        step_ms: Milliseconds of a step without the profiler.
        flop: FLOP per image.
        product: The number format of its convolutions' products.
        peak: FLOP per second of a matrix product in that format.
        memory: Bytes at the peak of a step.
    """

    name: str
    phases: dict[str, Times]
    total: Times
    step_ms: float
    flop: float
    product: str
    peak: float
    memory: int

    def phases_over_step(self) -> float:
        """The host's phases together, as a share of the step without the profiler."""
        return sum(times.host for times in self.phases.values()) / self.step_ms


def phase_table(figures: Sequence[StepFigures], device: torch.device) -> Table:
    """Milliseconds of a step by phase, on the host and, where there is one, on the GPU."""
    gpu = device.type == "cuda"
    table = Table("ms in a step", title="with the profiler")
    for step in figures:
        for place in ("host", "device") if gpu else ("host",):
            table.add_column(f"{step.name}, {place}", justify="right")
    rows = [name for name in PHASES if any(name in step.phases for step in figures)]
    for name in rows:
        times = [step.phases.get(name) for step in figures]
        _add_times(table, LABELS.get(name, name), times, gpu, last=name == rows[-1])
    _add_times(table, "total", [step.total for step in figures], gpu)
    return table


def _add_times(table: Table, label: str, times_of: Sequence[Times | None], gpu: bool, *, last: bool = False) -> None:
    cells = []
    for times in times_of:
        cells.append("–" if times is None else f"{times.host:,.2f}")
        if gpu:
            cells.append("–" if times is None or not times.device else f"{times.device:,.2f}")
    table.add_row(label, *cells, end_section=last)


def rate_table(figures: Sequence[StepFigures], batch: int) -> Table:
    """Rates and memory."""
    table = Table("a step", title="without the profiler")
    for step in figures:
        table.add_column(step.name, justify="right")
    for label, cell in (
        ("ms", lambda step: f"{step.step_ms:,.2f}"),
        ("host's phases over that", lambda step: f"{step.phases_over_step():.1%}"),
        ("images/s", lambda step: _digits(1e3 * batch / step.step_ms)),
        ("GFLOP for each image", lambda step: _digits(step.flop / 1e9)),
        ("TFLOP/s", lambda step: _digits(_rate(step, batch) / 1e12)),
        ("measured peak, TFLOP/s", lambda step: f"{_digits(step.peak / 1e12)} ({step.product})"),
        ("MFU", lambda step: f"{_rate(step, batch) / step.peak:.1%}"),
        ("peak memory, MB", lambda step: _digits(step.memory / 1e6)),
    ):
        table.add_row(label, *map(cell, figures))
    return table


def _rate(step: StepFigures, batch: int) -> float:
    return 1e3 * batch * step.flop / step.step_ms


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def legend(figures: Sequence[StepFigures], device: torch.device) -> list[str]:
    """What the figures mean, a line each."""
    lines = [
        "FLOP: executed in convolutions and matrix products of loss and gradient, counted by torch.utils.flop_counter "
        "over one eager evaluation of each step; fastle's own operators and the optimizer are not seen",
        "MFU: those in a second over the measured peak, that of the best of several large matrix products",
        "memory: torch.cuda.max_memory_allocated"
        if device.type == "cuda"
        else "memory: the peak of what one step allocates through PyTorch; weights and moments are there before",
    ]
    if any("loss" in step.phases for step in figures):
        lines.insert(0, "loss (one graph): encode to SIGReg in one compiled graph, whose phases cannot be told apart")
    if any("replay" in step.phases for step in figures):
        lines.insert(0, "replay (one graph): draws to optimizer in one CUDA graph, whose phases cannot be told apart")
    if any(abs(step.phases_over_step() - 1) > TOLERANCE for step in figures):
        lines.append(
            f"the phases and the step differ by more than {TOLERANCE:.0%}: the machine is busy with something else, or "
            "the steps are so short that the profiler slows them; try a larger N"
        )
    return lines
