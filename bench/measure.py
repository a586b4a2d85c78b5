"""One row of a benchmark: correctness before speed, fair timing, peak memory.

A benchmark describes a shape as a `Case`: inputs, the exact result, and sides that compute it, ours first. What an
input is, only the sides know. `measure` then does, in this order:

1. Every side's value and, unless the row is of the forward alone, its gradient are compared with the exact ones. Ours
   must pass the gates, or the row is refused: it has no times and no ratios.
2. Peak memory of one call. After the first call, which compiles and is timed apart, this one is the warm-up.
3. The sides take turns, in an order drawn anew each round, on inputs that rotate, until a budget of time is spent.
4. On a GPU the same again in CUDA graphs, whose results have to pass as well: small shapes are bound by launches.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

# the profiler that sees allocations would report its own starts and stops on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# one tensor, or one for each view
Values: TypeAlias = Tensor | Sequence[Tensor]
# the value, then the gradient unless only the forward is timed
Result: TypeAlias = tuple[Values, ...]
Row: TypeAlias = dict[str, Any]

RESULTS = ("value", "gradient")
MAX_ROUNDS = 200
CPU_MEMORY_SHARE = 0.6  # of what is available: the rest is for other programs
COPY_BYTES, COPIES = {"cpu": 2**29, "cuda": 2**31}, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to compute a result.

    Args:
        name: in tables and reports.
        step: from an input to its value and, unless the row is of the forward alone, the gradient to it.
        needs: bytes, an estimate of the peak; a side that needs more than there is does not run.
        package: what has to be installed for it.
    """

    name: str
    step: Callable[[Any], Result]
    needs: int = 0
    package: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape.

    Args:
        labels: what the report says about it; "shape" is what people see.
        inputs: of one shape, which the calls take in turn.
        exact: what `step` gives for the first input, in float64; where sides draw at random, from what a side gave.
        gates: the largest relative errors of value (and gradient) at which our times count.
        sides: ours first.
        floors: ms that no version can beat, by the name of what bounds it; none where the device's peaks are not known.
        traffic: bytes that have to move, where a rate of bytes says something.
    """

    labels: Row
    inputs: Sequence[Any]
    exact: Result | Callable[[Result], Result]
    gates: tuple[float, ...]
    sides: Sequence[Side]
    floors: Mapping[str, float]
    traffic: int | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a row is timed: rounds until `seconds` are spent, but at least `rounds` of them."""

    seconds: float
    rounds: int


FULL = Effort(seconds=6, rounds=5)
QUICK = Effort(seconds=3, rounds=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What a device does in a second by its data sheet: dense FLOP (a multiply-add is two) and bytes of its memory."""

    fp32: float
    tf32: float
    traffic: float


PEAKS = {
    "NVIDIA H200": Peaks(fp32=67e12, tf32=494e12, traffic=4.8e12),
    "NVIDIA H100 80GB HBM3": Peaks(fp32=67e12, tf32=494e12, traffic=3.35e12),
    "NVIDIA A100-SXM4-80GB": Peaks(fp32=19.5e12, tf32=156e12, traffic=2.04e12),
}


def peaks(device: torch.device) -> Peaks | None:
    """The peaks of a GPU. None if they are not in the table, and for a CPU."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def measure(case: Case, device: torch.device, effort: Effort) -> Row:
    """The row of a case: its labels, "refused" (None or why), "sides" by name, "ratios" and the like by peer."""
    # rows are independent: none reaches the recompile limit, and no earlier shape makes a later one dynamic
    torch.compiler.reset()
    limit = memory_limit(device)
    sides = {side.name: _first_call(side, case, limit, device) for side in case.sides}
    ours = case.sides[0].name
    row: Row = {**case.labels, "gates": list(case.gates), "refused": _refusal(sides[ours], case.gates), "sides": sides}
    if row["refused"]:
        return row
    running = [side for side in case.sides if sides[side.name]["status"] == "measured"]
    for side in running:
        sides[side.name]["peak_bytes"] = peak_memory(partial(side.step, case.inputs[0]), device)
    stopwatch = Stopwatch(device)
    calls = {side.name: _rotating(side.step, case.inputs) for side in running}
    for name, ms in interleave(calls, partial(stopwatch.time, queued=False), effort).items():
        sides[name]["ms"] = ms
    if device.type == "cuda":
        row["refused"] = _time_graphs(case, running, sides, stopwatch, effort)
        if row["refused"]:
            for figures in sides.values():
                figures.pop("ms", None)
            return row
    best = (sides[ours].get("graph_ms") or sides[ours]["ms"])["p50"]
    if case.traffic is not None:
        row |= {"traffic_bytes": case.traffic, "gb_per_s": case.traffic / best / 1e6}
    row["floors_ms"] = dict(case.floors)
    row["floor_fractions"] = {bound: floor / best for bound, floor in case.floors.items()}
    for key, figure in (("ratios", "ms"), ("graph_ratios", "graph_ms"), ("memory_ratios", "peak_bytes")):
        row[key] = _ratios(sides, ours, figure)
    return row


def _ratios(sides: Mapping[str, Row], ours: str, figure: str) -> dict[str, float]:
    """Each peer's figure over ours, of those that have it."""

    def value(side: Row) -> float:
        return side[figure] if figure == "peak_bytes" else side[figure]["p50"]

    if not sides[ours].get(figure):
        return {}
    mine = value(sides[ours])
    return {name: value(side) / mine for name, side in sides.items() if name != ours and figure in side}


def memory_limit(device: torch.device) -> int:
    """Bytes that a side may need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # not on Linux: all there is
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(CPU_MEMORY_SHARE * available)


def _first_call(side: Side, case: Case, limit: int, device: torch.device) -> Row:
    """Whether a side runs, how wrong it is, and the seconds of its first call."""
    if side.package and find_spec(side.package) is None:
        return {"status": "not installed", "note": f"{side.package} is not installed"}
    if side.needs > limit:
        note = f"does not fit (needs {side.needs / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB)"
        return {"status": "does not fit", "note": note, "needs_bytes": side.needs}
    begin = time.perf_counter()
    try:
        result = side.step(case.inputs[0])
        synchronize(device)
    except torch.OutOfMemoryError as error:
        return {"status": "does not fit", "note": f"does not fit ({_first_line(error)})", "needs_bytes": side.needs}
    except Exception as error:  # noqa: BLE001  (of any kind: other sides and rows have something to say)
        if side is case.sides[0]:
            traceback.print_exc()
        return {"status": "failed", "note": f"failed: {type(error).__name__}: {_first_line(error)}"}
    seconds = time.perf_counter() - begin
    return {"status": "measured", "first_call_s": seconds, **_errors(result, case.exact)}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _errors(result: Result, exact: Result | Callable[[Result], Result]) -> Row:
    """Largest error over largest exact magnitude, for value and gradient. JSON has no NaN: None stands for it."""
    wanted = exact(result) if callable(exact) else exact
    pairs = zip(result, wanted, strict=True)
    # a forward alone has no gradient
    errors = {f"{what}_error": relative_error(*pair) for what, pair in zip(RESULTS, pairs, strict=False)}
    return {key: error if math.isfinite(error) else None for key, error in errors.items()}


def relative_error(got: Values, exact: Values) -> float:
    """max |got − exact| / max |exact|, of views the largest; NaN if `got` holds one or is of another shape.

    Of two scalars, the relative error.
    """
    pairs = list(zip(tensors(got), tensors(exact), strict=True))
    if any(mine.shape != wanted.shape for mine, wanted in pairs):
        # subtracting would broadcast
        return math.nan
    errors = [(mine.detach().double() - wanted).abs().max() / wanted.abs().max() for mine, wanted in pairs]
    return float(torch.stack(errors).max())


def tensors(values: Values) -> Sequence[Tensor]:
    """The tensors that a value is made of."""
    return (values,) if isinstance(values, Tensor) else values


def _refusal(ours: Row, gates: tuple[float, ...]) -> str | None:
    """Why our times do not count. None: they do."""
    if ours["status"] != "measured":
        return str(ours["note"])
    wrong = []
    for what, gate in zip(RESULTS, gates, strict=False):
        error = ours[f"{what}_error"]
        if error is None:
            wrong.append(f"{what} is not finite")
        elif error > gate:
            wrong.append(f"{what} error {error:.1e} is over {gate:.0e}")
    return ", ".join(wrong) or None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what is held before it, its results included.

    On a GPU the caching allocator knows. On a CPU it is the running sum of the profiler's allocation events, which come
    from torch's allocator and so count what compiled code allocates too; scratch inside a library or a C++ kernel (its
    own stack and heap) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(use_device=None, profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _rotating(step: Callable[[Any], Result], inputs: Sequence[Any]) -> Callable[[int], object]:
    return lambda turn: step(inputs[turn % len(inputs)])


def interleave(
    calls: Mapping[str, Callable[[int], object]], clock: Callable[[Callable[[], object]], float], effort: Effort
) -> dict[str, Row]:
    """The 20th, 50th and 80th percentile of each call's ms, and how often it was called.

    Args:
        calls: take the number of the round.
        clock: calls and returns ms.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    # a side must not always run in the caches and the heap that the same other one left
    order = random.Random(0)
    begin = round_begin = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(clock(partial(calls[name], turn)))
        now = time.perf_counter()
        # a round that would end after the budget is not begun
        if turn + 1 >= effort.rounds and now - begin + (now - round_begin) > effort.seconds:
            break
        round_begin = now
    return {name: _spread(ms) for name, ms in times.items()}


def _spread(ms: Sequence[float]) -> Row:
    quantiles = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), quantiles.tolist(), strict=True)) | {"repeats": len(ms)}


class Stopwatch:
    """Times single calls: on a CPU by the clock, on a GPU by events and after the L2 was filled with something else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            # twice would do for the cache: the rest is the time that queued work needs to be queued
            self._other = torch.zeros(cache, dtype=torch.float32, device=device)  # 4 times the cache's bytes
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object], *, queued: bool) -> float:
        """ms of one call. On a GPU from idle, where launches count, or queued behind other work, where they do not."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        # read, not written: dirty lines would be written back during the call
        self._other.sum()
        if not queued:
            torch.cuda.synchronize(self._device)
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes in a second, read and written together, of the best of several copies too large for any cache."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    # its pages exist: a copy that asked the system for memory would time that
    target = torch.ones_like(source)
    stopwatch = Stopwatch(device)
    best = min(stopwatch.time(lambda: target.copy_(source), queued=True) for _ in range(COPIES))
    return 2 * source.nbytes / best * 1e3


def _time_graphs(
    case: Case, running: Sequence[Side], sides: Mapping[str, Row], stopwatch: Stopwatch, effort: Effort
) -> str | None:
    """Adds "graph_ms", or a "graph_note" that says why not, to the sides. Returns why the row is refused, if it is."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for side in running:
        figures = sides[side.name]
        torch.cuda.empty_cache()
        if figures["peak_bytes"] > torch.cuda.mem_get_info()[0]:
            figures["graph_note"] = "no graph: does not fit beside the others' graphs"
            continue
        try:
            graph, result = _capture(side.step, case.inputs[0])
        except Exception as error:  # noqa: BLE001  (not every peer can be captured)
            figures["graph_note"] = f"no graph: {type(error).__name__}: {_first_line(error)}"
            continue
        errors = _errors(result, case.exact)
        wrong = _refusal({"status": "measured", **errors}, case.gates)
        if wrong and side is case.sides[0]:
            return f"in a CUDA graph, {wrong}"
        if None in errors.values():
            figures["graph_note"] = "no graph: its result there is not finite"
            continue
        graphs[side.name] = graph
    replays = {name: lambda turn, graph=graph: graph.replay() for name, graph in graphs.items()}
    if replays:
        for name, ms in interleave(replays, partial(stopwatch.time, queued=True), effort).items():
            sides[name]["graph_ms"] = ms
    return None


def _capture(step: Callable[[Any], Result], x: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of one call, replayed once, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # libraries make their workspaces on a stream's first calls, which a capture forbids
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step(x)
    # what a replay leaves unwritten must not look right
    for values in result:
        for tensor in tensors(values):
            tensor.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return graph, tuple(tuple(tensor.clone() for tensor in tensors(values)) for values in result)
