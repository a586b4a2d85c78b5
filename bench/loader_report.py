"""What is shown of a report of the loaders: a table of loading, one of the steps fed by it, and a picture."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Row
from bench.plots import machine, write
from bench.tables import heading, three_digits

OURS, PEER = "#D55E00", "#0072B2"  # Okabe and Ito's, which colour-blind people can tell apart
LOADING = ("side", "images/s", "p20–p80", "× pil-0", "× best\nPIL", "CPU ms\nper image", "ready\nin s", "differs\nby")
STEP = ("fed by", "ms a step", "p20–p80", "over fixed", "data wait")


def show(report: Row, console: Console) -> None:
    """Prints a report."""
    heading(report, console)
    versions = report["rows"][0]["versions"]
    here = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    console.print(f"{here}, {report['rows'][0]['cores']} CPU cores", highlight=False)
    for row in report["rows"]:
        if row["refused"]:
            print_line(console, f"{row['part']}: REFUSED, {row['refused']}: no times")
        else:
            # not the table's own title, which would be wrapped to its width
            console.print(_title(row), style="bold", highlight=False, markup=False, soft_wrap=True)
            console.print(_loading(row) if row["part"] == "loading" else _step(row))
        for name, side in row["sides"].items():
            if "note" in side:
                print_line(console, f"{name} {side['note']}")
            for line in side.get("said", ()):
                print_line(console, f"{name}: {line}")
    for row in report["rows"]:
        for line in _explanations(row):
            print_line(console, line)


def print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(row: Row) -> str:
    """A row in a line."""
    if row["refused"]:
        return f"{row['part']}: REFUSED, {row['refused']}"
    if row["part"] == "loading":
        rates = {name: side["images_per_s"]["p50"] for name, side in row["sides"].items() if "images_per_s" in side}
        return "loading: " + ", ".join(f"{name} {three_digits(rate)} images/s" for name, rate in rates.items())
    waits = {name: side["wait_share"] for name, side in list(row["sides"].items())[1:] if "wait_share" in side}
    return "data wait in a step: " + ", ".join(f"{name} {share:.1%}" for name, share in waits.items())


def _title(row: Row) -> str:
    if row["part"] == "loading":
        return f"loading {row['shape']} ({row['source']}), 128x128 crops, batches of {row['batch']}"
    return f"a training step: {row['shape']}, {row['mode']}, {row['precision']}"


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def _loading(row: Row) -> Table:
    table = _table(LOADING)
    for name, side in row["sides"].items():
        if "ms" not in side:
            continue
        rate = side["images_per_s"]
        table.add_row(
            name,
            three_digits(rate["p50"]),
            f"{three_digits(rate['p20'])}–{three_digits(rate['p80'])}",
            _ratio(row["ratios"], name),
            _ratio(row["best_ratios"], name),
            three_digits(side["cpu_ms_per_image"]),
            f"{side['open_s']:.1f}",
            str(side["difference"]),
        )
    return table


def _step(row: Row) -> Table:
    table = _table(STEP)
    for i, (name, side) in enumerate(row["sides"].items()):
        if "ms" not in side:
            continue
        ms = side["ms"]
        table.add_row(
            name,
            three_digits(ms["p50"]),
            f"{three_digits(ms['p20'])}–{three_digits(ms['p80'])}",
            f"{side['over_fixed']:+.2%}" if i else "–",
            f"{side['wait_share']:.2%}" if i else "–",
        )
    return table


def _ratio(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.2f}" if name in ratios else "–"


def _explanations(row: Row) -> list[str]:
    if row["part"] == "loading":
        return [
            "differs by: the largest difference of a pixel to torchvision's decoder, of 255, over the first call's "
            "batches. ready: opened, and the cache built if it was not there",
            f"a call: {row['images_per_call']:,} images, in an order of its own. CPU: of the process and its workers",
        ]
    return [
        f"a call: {row['steps_per_call']} steps. data wait: the share of the time that the loop stood waiting for a "
        "batch; over fixed: what loading costs the step in all, medians of pairs of calls",
        "on a CPU decoding takes its cores from the step, so that a step costs more without waiting; on a GPU the loop "
        "runs ahead of the device and may wait for a batch while that still works",
    ]


def draw(report: Row, path: Path) -> None:
    """Writes a PNG: images a second, and what loading costs a step; a bar for each side."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if not row["refused"]]
    heights = [0.25 * len(_bars(row)) + 0.6 for row in rows] or [1.0]
    figure = Figure(figsize=(7.0, sum(heights) + 0.8), layout="constrained", dpi=150)
    panels = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    if not rows:
        panels[0].set_visible(False)
    for panel, row in zip(panels, rows, strict=bool(rows)):
        bars = _bars(row)
        for i, (name, (value, text)) in enumerate(bars.items()):
            panel.barh(i, value, color=PEER if name.startswith("pil") else OURS, height=0.7)
            panel.text(max(value, 0), i, f" {text}", va="center", fontsize=7)
        panel.set_yticks(range(len(bars)), list(bars), fontsize=8)
        panel.invert_yaxis()
        if row["part"] == "loading":
            # every length begins at the same rate, a decade below the slowest
            panel.set_xscale("log")
            panel.set_xlim(left=10 ** math.floor(math.log10(min(value for value, _ in bars.values()) / 2)))
        # room for the numbers
        panel.margins(x=0.3)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        title = (
            "images/s, × is over pil-0" if row["part"] == "loading" else f"step over a fixed batch, %: {row['shape']}"
        )
        panel.set_title(title, fontsize=9, loc="left")
    figure.suptitle(f"Loading CelebA's 178x218 JPEGs, medians\n{machine(report)}", fontsize=10)
    write(figure, path)


def _bars(row: Row) -> dict[str, tuple[float, str]]:
    """Length and label of each side's bar."""
    if row["part"] == "loading":
        rates = {name: side["images_per_s"]["p50"] for name, side in row["sides"].items() if "images_per_s" in side}
        ratios = {name: f" ({row['ratios'][name]:.1f}×)" if name in row["ratios"] else "" for name in rates}
        return {name: (rate, three_digits(rate) + ratios[name]) for name, rate in rates.items()}
    fed = {name: side for name, side in list(row["sides"].items())[1:] if "over_fixed" in side}
    return {
        name: (100 * side["over_fixed"], f"{side['over_fixed']:+.1%} (data wait {side['wait_share']:.1%})")
        for name, side in fed.items()
    }
