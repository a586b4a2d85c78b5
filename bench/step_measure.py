"""One row of the bench of the step: correctness before speed, then fair timing, as in bench/measure.py.

A training step changes what it starts from, so it is right or wrong at its first call only. In this order:

1. Each side takes its first step, from the same weights, batch and draws. Loss and gradients are compared with the
   exact ones; the weights with what AdamW's formula makes of the side's own gradients. Every side of fastle's must pass
   the gates, or the row is refused: it has no times and no ratios. A side that cannot run has none, and says why.
2. Peak memory of one more step, all sides' weights and moments being there.
3. The sides take turns, in an order drawn anew each round, on batches that rotate, until a budget of time is spent.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from bench.measure import Effort, Row, Stopwatch, interleave, memory_limit, peak_memory, synchronize
from bench.step_sides import BASELINE, Result, Side, Step, first_result

RESULTS = ("value", "gradient", "update")
# a gradient whose parts cancel, as a bias's before a BatchNorm, is rounding: this share of the largest measures it
SMALL = 0.1
WEIGHT_DECAY, EPS = 1e-2, 1e-8  # AdamW's defaults

Gates: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape.

    Args:
        labels: what the report says about it; "shape" is what people see.
        inputs: uint8 batches (B, C, size, size), which the calls take in turn.
        exact: loss and gradients of the first step on the first of them, in float64.
        before: the parameters at the start.
        lr: learning rate.
        gates: the largest errors of `RESULTS` at which a side of fastle's counts, by its precision.
        sides: what is compared.
        flops: of an image, by structure: "fastle" and "plain".
        peaks: FLOP in a second, by precision.
    """

    labels: Row
    inputs: Sequence[Tensor]
    exact: tuple[Tensor, list[Tensor]]
    before: list[Tensor]
    lr: float
    gates: Mapping[str, Gates]
    sides: Sequence[Side]
    flops: Mapping[str, float]
    peaks: Mapping[str, float]


def measure(case: Case, device: torch.device, effort: Effort) -> Row:
    """The row of a case: its labels, "refused" (None or why), "sides" by name, "speedups" of each over the baseline."""
    torch.compiler.reset()
    memory_limit(device)  # what earlier rows left is freed
    figures: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for side in case.sides:
        figures[side.name], step = _first_call(side, case, device)
        if step is not None:
            steps[side.name] = step
    gates = {precision: list(values) for precision, values in case.gates.items()}
    row: Row = {**case.labels, "gates": gates, "refused": refusal(case, figures), "sides": figures}
    if row["refused"]:
        return row
    for name in list(steps):
        # with the others' weights beside it, as in what follows
        try:
            peak = peak_memory(partial(steps[name], case.inputs[0]), device)
        except torch.OutOfMemoryError as error:
            figures[name] |= {"status": "does not fit", "note": f"does not fit beside the others ({_line(error)})"}
            del steps[name]
            continue
        figures[name]["peak_bytes"] = peak + figures[name]["graph_bytes"]
    if not steps:
        row["refused"] = "no side fits"
        return row
    calls = {name: partial(_call, step, case.inputs) for name, step in steps.items()}
    for name, ms in interleave(calls, partial(Stopwatch(device).time, queued=False), effort).items():
        figures[name]["ms"] = ms
    _add_rates(row, case)
    return row


def _first_call(side: Side, case: Case, device: torch.device) -> tuple[Row, Step | None]:
    """How wrong a side's first step is, and the seconds it took, compilation included; the step, if it runs."""
    pools = _graph_bytes(device)
    begin = time.perf_counter()
    try:
        step = side.make()
        result = first_result(step, case.inputs[0])
        synchronize(device)
    except torch.OutOfMemoryError as error:
        return {"status": "does not fit", "note": f"does not fit ({_line(error)})"}, None
    except Exception as error:  # noqa: BLE001  (of any kind: other sides and rows have something to say)
        if not isinstance(error, ValueError):
            traceback.print_exc()
        return {"status": "failed", "note": f"failed: {type(error).__name__}: {_line(error)}"}, None
    seconds = time.perf_counter() - begin
    figures = {"status": "measured", "precision": side.precision, "first_call_s": seconds}
    return figures | {"graph_bytes": _graph_bytes(device) - pools} | errors(result, case), step


def _graph_bytes(device: torch.device) -> int:
    """What CUDA graphs hold: a replay allocates nothing, so that its peak is all there from its capture on."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if segment.get("segment_pool_id", (0, 0)) != (0, 0))


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _call(step: Step, inputs: Sequence[Tensor], turn: int) -> None:
    step(inputs[turn % len(inputs)])


def errors(result: Result, case: Case) -> Row:
    """The `distance` of loss, gradients, and the weights' movement. JSON has no NaN: None stands for it."""
    loss, gradients = case.exact
    moved = [after.double() - before for after, before in zip(result.weights, case.before, strict=True)]
    found = (
        distance([result.loss], [loss]),
        distance(result.gradients, gradients),
        distance(moved, adamw(case.before, result.gradients, case.lr)),
    )
    return {f"{what}_error": e if math.isfinite(e) else None for what, e in zip(RESULTS, found, strict=True)}


def adamw(before: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> list[Tensor]:
    """How AdamW's first step moves the weights, in float64: its moments' bias correction leaves g and g²."""
    pairs = zip(before, gradients, strict=True)
    return [-lr * (WEIGHT_DECAY * w.double() + g.double() / (g.double().abs() + EPS)) for w, g in pairs]


def distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |got − wanted| / |wanted| of the pairs, Euclidean norms; NaN if a number is not finite.

    What is much smaller than the largest of `wanted` is measured by `SMALL` of that.
    """
    norms = torch.stack([w.double().norm() for w in wanted])
    apart = torch.stack([(g.double() - w).norm() for g, w in zip(got, wanted, strict=True)])
    # a maximum keeps NaN
    return float((apart / norms.clamp_min(SMALL * float(norms.max()))).max())


def refusal(case: Case, figures: Mapping[str, Row]) -> str | None:
    """Why the row's times do not count. None: they do."""
    if not any(figures[side.name]["status"] == "measured" for side in case.sides):
        return "; ".join(f"{side.name} {figures[side.name]['note']}" for side in case.sides)
    wrong = []
    for side in case.sides:
        if not side.ours or figures[side.name]["status"] != "measured":
            continue
        for what, gate in zip(RESULTS, case.gates[side.precision], strict=True):
            error = figures[side.name][f"{what}_error"]
            if error is None:
                wrong.append(f"{side.name}: {what} is not finite")
            elif error > gate:
                wrong.append(f"{side.name}: {what} error {error:.1e} is over {gate:.0e}")
    return ", ".join(wrong) or None


def _add_rates(row: Row, case: Case) -> None:
    """Images and FLOP in a second of each side that was timed, and how much faster than the baseline it is."""
    timed = {name: side for name, side in row["sides"].items() if "ms" in side}
    batch = len(case.inputs[0])
    for side in case.sides:
        if side.name not in timed:
            continue
        seconds = timed[side.name]["ms"]["p50"] / 1e3
        flops = batch * case.flops["fastle" if side.ours else "plain"] / seconds
        timed[side.name] |= {"images_per_s": batch / seconds, "mfu": flops / case.peaks[side.precision]}
    ours = [side.name for side in case.sides if side.ours and side.name in timed]
    row["fastest"] = min(ours, key=lambda name: timed[name]["ms"]["p50"], default=None)
    row["baseline"] = BASELINE
    row["speedups"] = {}
    if BASELINE in timed:
        base = timed[BASELINE]["ms"]["p50"]
        row["speedups"] = {name: base / side["ms"]["p50"] for name, side in timed.items() if name != BASELINE}
