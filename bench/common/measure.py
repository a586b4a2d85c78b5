"""One row of a benchmark: correctness before speed, fair timing, peak memory.

`measure` does the following, in this order:

1. Each side computes its first result, which is compared with the exact one. Fastle's sides must pass their gates, or
   the row is refused: it has no times. Peers are timed in any case, and a note says if they miss the gates.
2. The peak memory of one call is measured. This call is also the warm-up after the first one, which compiles.
3. The sides take turns, in a new random order each round, on inputs that rotate, until a budget of time is spent.
4. On a GPU, operators are measured again in CUDA graphs, where launches cost nothing. Graphs must pass the gates too.
"""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.common.table import Row
from fastle.errors import FastleError
from fastle.machine import free_memory, peak_memory, synchronize
from fastle.profiling.measure import Stopwatch, percentiles
from fastle.training.memory import out_of_memory

# what a side computes its result with: mostly a function of an input
Call: TypeAlias = Any

MAX_ROUNDS = 200
ROTATION = 3  # inputs of a case
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # that operators are measured in
CPU_MEMORY_SHARE = 0.6  # of the free memory: the rest is for other programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to compute a case's result.

    Args:
        name: Its name in tables and reports.
        make: Builds what is called; its time counts as part of the first call.
        ours: Whether it is fastle's, and has to be right for the row to count.
        gates: The largest errors that are right, by name.
        needs: Estimated bytes at its peak; a side that needs more than the free memory does not run.
        labels: What the report says of it besides.
    """

    name: str
    make: Callable[[], Call]
    ours: bool = False
    gates: Mapping[str, float]
    needs: int = 0
    labels: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one row measures.

    Args:
        labels: What the report says of the case; "shape" is its name.
        inputs: Inputs of one shape, which the calls take in turn.
        sides: What is compared; ratios are relative to the first.
        errors: The errors of a result for the first input, by name; NaN for one that is not finite.
        first: How a side's first result is computed.
        capture: Measure CUDA graphs too, where there is a GPU.
    """

    labels: Row
    inputs: Sequence[Any]
    sides: Sequence[Side]
    errors: Callable[[Any], Mapping[str, float]]
    first: Callable[[Call, Any], Any] = lambda call, x: call(x)
    capture: bool = True


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a row is timed: rounds until `seconds` are spent, but at least `rounds` of them."""

    seconds: float
    rounds: int


FULL = Effort(seconds=6, rounds=5)
QUICK = Effort(seconds=3, rounds=3)


def measure(case: Case, device: torch.device, effort: Effort) -> Row:
    """The row of a case: its labels, "refused" (None or the reason) and the figures of its "sides" by name."""
    # rows are independent: none reaches the limit of recompilations, and no shape makes a later one dynamic
    torch.compiler.reset()
    sides: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    room = free_memory(device) * (1 if device.type == "cuda" else CPU_MEMORY_SHARE)
    first = partial(_first_result, case)
    for side in case.sides:
        sides[side.name], call = first_call(side, first, case.errors, room, device)
        if call is not None:
            calls[side.name] = call
    row: Row = {**case.labels, "refused": refusal(case.sides, sides), "sides": sides}
    if row["refused"]:
        return row
    for name, call in list(calls.items()):
        try:
            peak = peak_memory(partial(call, case.inputs[0]), device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            sides[name] |= {"status": "does not fit", "note": f"does not fit beside the others ({first_line(error)})"}
            del calls[name]
            continue
        sides[name]["peak_bytes"] = peak + sides[name]["graph_bytes"]
    clock = Stopwatch(device).time
    turns = {name: partial(_time_turn, clock, call, case.inputs) for name, call in calls.items()}
    for name, ms in interleave(turns, effort).items():
        sides[name]["ms"] = percentiles(ms)
    if case.capture and device.type == "cuda":
        row["refused"] = time_graphs(case, calls, sides, device, effort)
        if row["refused"]:
            for figures in sides.values():
                figures.pop("ms", None)
                figures.pop("graph_ms", None)
    return row


def _first_result(case: Case, call: Call) -> Any:
    return case.first(call, case.inputs[0])


def first_call(
    side: Side,
    first: Callable[[Call], Any],
    errors: Callable[[Any], Mapping[str, float]],
    room: float,
    device: torch.device,
) -> tuple[Row, Call | None]:
    """How wrong a side's first result is and how long it took, compilation included; and what to call, if it ran."""
    figures = {**side.labels, "gates": dict(side.gates)}
    if side.needs > room:
        note = f"does not fit (needs {side.needs / 1e9:.1f} GB, the limit is {room / 1e9:.1f} GB)"
        return figures | {"status": "does not fit", "note": note}, None
    graphs = _graph_bytes(device)
    begin = time.perf_counter()
    try:
        call = side.make()
        result = first(call)
        synchronize(device)
    except FastleError as error:
        return figures | {"status": "cannot be had", "note": f"cannot be had: {error}"}, None
    except Exception as error:  # noqa: BLE001  (whatever it is, the other sides and rows can still be measured)
        if isinstance(error, RuntimeError) and out_of_memory(error):
            return figures | {"status": "does not fit", "note": f"does not fit ({first_line(error)})"}, None
        if side.ours:
            traceback.print_exc()
        return figures | {"status": "failed", "note": f"failed: {type(error).__name__}: {first_line(error)}"}, None
    seconds = time.perf_counter() - begin
    figures |= {"status": "measured", "first_call_s": seconds, "graph_bytes": _graph_bytes(device) - graphs}
    return figures | _finite(errors(result)), call


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


def _finite(errors: Mapping[str, float]) -> dict[str, float | None]:
    """Errors as the report has them. JSON has no NaN: None stands for it."""
    return {f"{name}_error": error if math.isfinite(error) else None for name, error in errors.items()}


def _graph_bytes(device: torch.device) -> int:
    """Bytes that CUDA graphs hold: a replay allocates nothing, so that its peak is all there after the capture."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if segment.get("segment_pool_id", (0, 0)) != (0, 0))


def failures(gates: Mapping[str, float], figures: Mapping[str, Any]) -> list[str]:
    """Which of a side's errors are over their gates."""
    wrong = []
    for name, gate in gates.items():
        error = figures[f"{name}_error"]
        if error is None:
            wrong.append(f"{name} is not finite")
        elif error > gate:
            wrong.append(f"{name} error {error:.1e} is over {gate:.0e}")
    return wrong


def refusal(sides: Sequence[Side], figures: Mapping[str, Row]) -> str | None:
    """Why a row's times do not count; None if they do. What is compared with must be there: the first side."""
    measured = [side for side in sides if figures[side.name]["status"] == "measured"]
    wrong = [
        f"{side.name}: {fault}" for side in measured if side.ours for fault in failures(side.gates, figures[side.name])
    ]
    if not any(side.ours for side in measured) and any(side.ours for side in sides):
        wrong += [f"{side.name}: {figures[side.name]['note']}" for side in sides if side.ours]
    return "; ".join(wrong) or ("no side could be measured" if not measured else None)


def _time_turn(clock: Callable[..., float], call: Call, inputs: Sequence[Any], turn: int) -> float:
    return clock(partial(call, inputs[turn % len(inputs)]))


def interleave(calls: Mapping[str, Callable[[int], float]], effort: Effort) -> dict[str, list[float]]:
    """Times calls in turn.

    Args:
        calls: Take the number of the round, and return their milliseconds.

    Returns:
        The milliseconds of each call, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    # so that no side always follows the same other one, in the caches and the heap that it left
    order = random.Random(0)
    begin = round_begin = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(calls[name](turn))
        now = time.perf_counter()
        # a round that would end after the budget does not begin
        if turn + 1 >= effort.rounds and now - begin + (now - round_begin) > effort.seconds:
            break
        round_begin = now
    return times


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest max |got − exact| / max |exact| of the pairs; NaN if a shape differs or a number is not finite."""
    pairs = list(zip(got, exact, strict=True))
    # a subtraction would broadcast
    if any(mine.shape != wanted.shape for mine, wanted in pairs):
        return math.nan
    errors = [(mine.detach().double() - wanted).abs().max() / wanted.abs().max() for mine, wanted in pairs]
    return float(torch.stack(errors).max())


def time_graphs(
    case: Case, calls: Mapping[str, Call], sides: Mapping[str, Row], device: torch.device, effort: Effort
) -> str | None:
    """Adds "graph_ms", or a "graph_note" with the reason, to the sides. Returns why the row is refused, or None."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for side in (side for side in case.sides if side.name in calls):
        figures = sides[side.name]
        if figures["peak_bytes"] > free_memory(device):
            figures["graph_note"] = "no graph: it does not fit beside the other graphs"
            continue
        try:
            graph, result = capture(calls[side.name], case.inputs[0])
        except Exception as error:  # noqa: BLE001  (not every peer can be captured)
            figures["graph_note"] = f"no graph: {type(error).__name__}: {first_line(error)}"
            continue
        wrong = failures(side.gates, _finite(case.errors(result)))
        if wrong and side.ours:
            return f"{side.name}, in a CUDA graph: {', '.join(wrong)}"
        if any("not finite" in fault for fault in wrong):
            figures["graph_note"] = "no graph: its result is not finite"
            continue
        graphs[side.name] = graph
    clock = partial(Stopwatch(device).time, queued=True)
    replays = {name: partial(_time_replay, clock, graph) for name, graph in graphs.items()}
    for name, ms in interleave(replays, effort).items():
        sides[name]["graph_ms"] = percentiles(ms)
    return None


def _time_replay(clock: Callable[..., float], graph: torch.cuda.CUDAGraph, turn: int) -> float:
    return clock(graph.replay)


def capture(call: Call, x: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call, replayed once, and its result: a tuple of tuples of tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # libraries allocate their workspaces in a stream's first calls, which a capture forbids
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call(x)
    # so that what a replay does not write is not taken for right
    for tensors in result:
        for tensor in tensors:
            tensor.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return graph, tuple(tuple(tensor.clone() for tensor in tensors) for tensors in result)
