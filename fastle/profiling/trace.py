"""Reads the time of each phase of a step from a chrome trace."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastle.phases import PHASES


@dataclass(slots=True)
class Times:
    """Milliseconds per step of a phase."""

    host: float = 0.0
    device: float = 0.0


def phase_times(trace: dict[str, Any], steps: int) -> tuple[dict[str, Times], Times]:
    """The time of each phase of a trace, and of the whole trace, in milliseconds per step.

    Args:
        trace: A chrome trace whose phases are annotations of one thread.
        steps: How many steps it holds.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in PHASES
    ]
    timeline = _timeline(spans)
    begins = [begin for begin, _ in timeline]
    phases: dict[str, Times] = defaultdict(Times)
    for (begin, name), (end, _) in pairwise(timeline):
        if name:
            phases[name].host += (end - begin) / 1e3 / steps
    # graph launches, memory copies and Triton's launches have other categories than the runtime's kernels
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat", "").endswith(("_runtime", "_driver")) and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = bisect_right(begins, launches.get(event["args"].get("correlation"), event["ts"])) - 1
            name = timeline[at][1] if at >= 0 else ""
            phases[name or "step"].device += event["dur"] / 1e3 / steps
    total = Times(
        host=(timeline[-1][0] - timeline[0][0]) / 1e3 / steps, device=sum(times.device for times in phases.values())
    )
    if "encode" in phases:
        # the parts of the loss are phases of their own; only means and sums are left in it
        rest = phases.pop("loss", Times())
        phases["step"].host += rest.host
        phases["step"].device += rest.device
    return dict(phases), total


def _timeline(spans: Sequence[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """Times at which the innermost span changes, each with its name or "" for none. Spans nest or do not overlap."""
    points: list[tuple[float, str]] = []
    around: list[tuple[float, str]] = []

    def close(until: float) -> None:
        while around and around[-1][0] <= until:
            end, _ = around.pop()
            points.append((end, around[-1][1] if around else ""))

    for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        close(begin)
        around.append((end, name))
        points.append((begin, name))
    close(float("inf"))
    return points
