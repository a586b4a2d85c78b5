"""The forecast as tables, for a terminal and for docs/results/forecast.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.forecast.generate import Counted, SideName, StepVariant
from bench.forecast.roofline import GPUS, LAUNCH, REACHED, PhaseCost, step_costs

SIDES: dict[SideName, str] = {"fastle": "fastle", "plain": "plain compiled"}


def forecast_report(steps: Mapping[StepVariant, Counted], gpus: Sequence[str]) -> dict[str, Any]:
    """Everything that is printed, as JSON takes it."""
    rows = []
    for variant, counted in steps.items():
        for name in gpus:
            if GPUS[name].precision == variant.precision:
                costs = [asdict(cost) for cost in step_costs(counted, GPUS[name])]
                rows.append({"gpu": name, **asdict(variant), "rows": costs})
    counts = [asdict(variant) | totals(counted) for variant, counted in steps.items()]
    return {
        "computed": "not measured: from generated code and data sheets",
        "reached": REACHED,
        "launch": LAUNCH,
        "counts": counts,
        "forecasts": rows,
    }


def totals(counted: Counted) -> dict[str, Any]:
    """What a step launches and moves in all, its optimizer left out."""
    triton = [launch for launch in counted.launches if launch.kind == "triton"]
    return {
        "triton_launches": len(triton),
        "triton_bytes": sum(launch.bytes for launch in triton),
        "launches": len(counted.launches),
        "bytes": sum(launch.bytes for launch in counted.launches),
        "flop": sum(launch.flop for launch in counted.launches),
        "atomics": sum(launch.atomics for launch in triton),
        "contiguous": sum(bool(launch.contiguous) for launch in counted.launches),
        "layout_copies": sum(launch.copies_layout for launch in triton),
        "parameters": counted.parameters,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report's tables: what a step moves, whole steps on each GPU, and the phases of fastle's."""
    reached = ", ".join(f"{100 * share:.0f} % of the {name}" for name, share in report["reached"].items())
    lines = [
        "**Computed, not measured.** The code that torch.compile generates for a GPU is counted, launch by launch; the",
        "times follow from data sheets. *Bound* is each launch at its roofline; the *forecast* lets a launch reach",
        f"{reached}, and adds {1e6 * report['launch']:.1f} µs to each.",
        "",
        "| setting | step | precision | GB moved | of it by Triton | Triton launches | TFLOP | atomics "
        "| NCHW convolutions | layout copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['setting']}:{row['batch']} | {SIDES[row['side']]} | {row['precision']} | {row['bytes'] / 1e9:.1f} "
        f"| {row['triton_bytes'] / 1e9:.1f} | {row['triton_launches']} | {row['flop'] / 1e12:.2f} "
        f"| {row['atomics']} | {row['contiguous']} | {row['layout_copies']} |"
        for row in report["counts"]
    ]
    lines += [
        "",
        "| GPU | setting | step | precision | bound, ms | forecast, ms | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in report["forecasts"]:
        step = entry["rows"][-1]
        lines.append(
            f"| {entry['gpu']} | {entry['setting']}:{entry['batch']} | {SIDES[entry['side']]} | {entry['precision']} "
            f"| {1e3 * step['bound']:.1f} | {1e3 * step['forecast']:.1f} | {entry['batch'] / step['forecast']:,.0f} |"
        )
    for entry in report["forecasts"]:
        if entry["side"] == "fastle":
            lines += ["", *_phases(entry)]
    return "\n".join(lines) + "\n"


def _phases(entry: Mapping[str, Any]) -> list[str]:
    costs = [PhaseCost(**values) for values in entry["rows"]]
    return [
        f"{entry['gpu']}, {entry['setting']}:{entry['batch']}, {entry['precision']}:",
        "",
        "| phase | launches | GB | TFLOP | bound, ms | forecast, ms |",
        "|---|---|---|---|---|---|",
        *(
            f"| {cost.phase} | {cost.launches} | {cost.bytes / 1e9:.2f} | {cost.flop / 1e12:.2f} "
            f"| {1e3 * cost.bound:.2f} | {1e3 * cost.forecast:.2f} |"
            for cost in costs
        ),
    ]
