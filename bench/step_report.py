"""What is shown of a report of the step: a table for each row, a line for each side; and a picture."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Row
from bench.plots import machine, write
from bench.step_measure import RESULTS
from bench.tables import heading, three_digits

OURS, PEER = "#D55E00", "#0072B2"  # Okabe and Ito's, which colour-blind people can tell apart
COLUMNS = (
    "side",
    "ms",
    "p20–p80",
    "images/s",
    "× plain",
    "MFU",
    "peak\nMB",
    "first\ncall",
    "loss\nerror",
    "grad\nerror",
)


def show(report: Row, console: Console) -> None:
    """Prints a report."""
    heading(report, console)
    for row in report["rows"]:
        console.print(_table(row))
        for name, side in row["sides"].items():
            if "note" in side:
                console.print(f"{name} {side['note']}", highlight=False, markup=False, soft_wrap=True)
        for line in _worse(row):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if row["refused"]:
            console.print(f"REFUSED, {row['refused']}: no times", highlight=False, markup=False, soft_wrap=True)
    for line in _explanations(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(row: Row) -> str:
    """A row in a line."""
    if row["refused"]:
        return f"{row['shape']}: REFUSED, {row['refused']}"
    found = [f"{name} {three_digits(ratio)}×" for name, ratio in row["speedups"].items()]
    times = {name: side["ms"]["p50"] for name, side in row["sides"].items() if "ms" in side}
    first, ms = next(iter(times.items()))
    return f"{row['shape']}: {first} {three_digits(ms)} ms{', ' if found else ''}{', '.join(found)}"


def _table(row: Row) -> Table:
    flops = ", ".join(f"{name} {three_digits(count / 1e9)}" for name, count in row["flops_per_image"].items())
    table = Table(
        title=f"{row['shape']}: a training step; GFLOP per image counted: {flops}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for name, side in row["sides"].items():
        if side["status"] == "measured":
            errors = [_error(side[f"{what}_error"]) for what in RESULTS[:2]]
            refused = ["REFUSED" if row["refused"] else "–"] + ["–"] * 5
            figures = _figures(row, name, side) if "ms" in side else refused
            table.add_row(name, *figures, f"{side['first_call_s']:.1f} s", *errors, style=_style(row, name))
    return table


def _figures(row: Row, name: str, side: Row) -> list[str]:
    ms = side["ms"]
    speedup = row["speedups"].get(name, 1.0 if name == row["baseline"] else None)
    return [
        three_digits(ms["p50"]),
        f"{three_digits(ms['p20'])}–{three_digits(ms['p80'])}",
        three_digits(side["images_per_s"]),
        "–" if speedup is None else f"{speedup:.2f}",
        f"{side['mfu']:.0%}",
        three_digits(side["peak_bytes"] / 1e6),
    ]


def _style(row: Row, name: str) -> str | None:
    return "red" if row["refused"] else "bold" if name == row.get("fastest") else None


def _error(error: float | None) -> str:
    return "nan" if error is None else f"{error:.0e}"


def _worse(row: Row) -> list[str]:
    """Peers whose results would not pass the gates. They are timed all the same, and it is said."""
    lines = []
    for name, side in row["sides"].items():
        if side["status"] != "measured" or name.startswith("fastle"):
            continue
        for what, gate in zip(RESULTS, row["gates"][side["precision"]], strict=True):
            error = side[f"{what}_error"]
            if error is None or error > gate:
                lines.append(f"{name}'s own {what} error is {_error(error)}, over {gate:.0e}")
    return lines


def _explanations(report: Row) -> list[str]:
    row = report["rows"][0]
    peaks = ", ".join(f"{name} {peak / 1e12:.3g} TFLOP/s" for name, peak in row["peak_flops"].items())
    return [
        f"MFU: the FLOP that a side's own structure executes (fastle's or plain's count, convolutions and products, a "
        f"multiply-add is two), over the fastest large matrix product of this process: {peaks}",
        "peak MB: beyond weights, gradients and moments. first call: building, compiling, the first step",
        f"fp32 products: {report['environment']['fp32_products']}; fp32 convolutions: {row['convolutions']}",
    ]


def draw(report: Row, path: Path) -> None:
    """Writes a PNG: for each row that was not refused a panel of images a second, a bar for each side."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if not row["refused"]]
    heights = [0.22 * len(_timed(row)) + 0.6 for row in rows] or [1.0]
    figure = Figure(figsize=(7.0, sum(heights) + 0.8), layout="constrained", dpi=150)
    panels = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    if not rows:
        panels[0].set_visible(False)
    for panel, row in zip(panels, rows, strict=bool(rows)):
        for i, name in enumerate(_timed(row)):
            rate = row["sides"][name]["images_per_s"]
            ratio = f" ({row['speedups'][name]:.2f}×)" if name in row["speedups"] else ""
            panel.barh(i, rate, color=OURS if name.startswith("fastle") else PEER, height=0.7)
            panel.text(rate, i, f" {three_digits(rate)}{ratio}", va="center", fontsize=7)
        panel.set_yticks(range(len(_timed(row))), _timed(row), fontsize=8)
        panel.invert_yaxis()
        # room for the numbers
        panel.margins(x=0.3)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{row['shape']}: images/s", fontsize=9, loc="left")
    figure.suptitle(f"The training step, medians; × is over plain\n{machine(report)}", fontsize=10)
    write(figure, path)


def _timed(row: Row) -> list[str]:
    return [name for name, side in row["sides"].items() if "ms" in side]
