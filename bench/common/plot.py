"""The plot of a report: for each row one or more panels of bars, a bar for each side."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.table import Row, digits
from fastle.files import write_atomic

# Okabe and Ito's colours, which colour-blind people can tell apart
OURS, PEER = "#D55E00", "#0072B2"
PEER_NAMES = ("chunked", "compiled", "eager", "grid_sample", "pil", "plain", "roi_align")
PANEL_WIDTH, BAR_HEIGHT = 5.0, 0.22  # inches


class Panel(NamedTuple):
    """A heading, and each bar's length and label by the side's name. `log` gives the lengths a logarithmic axis."""

    heading: str
    bars: dict[str, tuple[float, str]]
    log: bool = False


def time_and_memory(row: Row) -> list[Panel]:
    """The panels of a benchmark of an operator: medians, on a GPU those of CUDA graphs; and peak memory."""
    key = "graph_ms" if any("graph_ms" in side for side in row["sides"].values()) else "ms"
    times = {name: side[key]["p50"] for name, side in row["sides"].items() if key in side}
    memory = {name: side["peak_bytes"] / 1e6 for name, side in row["sides"].items() if "peak_bytes" in side}
    return [
        Panel(f"{row['shape']}: ms", {name: (ms, digits(ms)) for name, ms in times.items()}, log=True),
        Panel("peak memory, MB", {name: (mb, digits(mb)) for name, mb in memory.items()}, log=True),
    ]


def save_plot(report: Row, path: Path, panels: Callable[[Row], Sequence[Panel]]) -> None:
    """Writes a PNG with a line of panels for each row. Refused rows are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in (panels(row) for row in report["rows"] if not row["refused"]) if line]
    heights = [BAR_HEIGHT * len(line[0].bars) + 0.6 for line in lines] or [1.0]
    width = max((len(line) for line in lines), default=1)
    figure = Figure(figsize=(width * PANEL_WIDTH, sum(heights) + 0.8), layout="constrained", dpi=150)
    axes = figure.subplots(len(heights), width, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel_axes in axes.flat[sum(map(len, lines)) :]:
        panel_axes.set_visible(False)
    for panel_axes, panel in zip(axes.flat, (panel for line in lines for panel in line), strict=False):
        _plot_bars(panel_axes, panel)
    here = report["environment"]
    figure.suptitle(
        f"{report['benchmark']} benchmark, medians\n{here['device']}, {here['threads']} threads, "
        f"torch {here['torch']}, commit {(here['commit'] or 'unknown')[:10]}",
        fontsize=10,
    )
    encoded = io.BytesIO()
    FigureCanvasAgg(figure).print_png(encoded)
    write_atomic(path, encoded.getvalue())


def _plot_bars(axes: Any, panel: Panel) -> None:
    for i, (name, (length, label)) in enumerate(panel.bars.items()):
        peer = name.startswith(PEER_NAMES)
        axes.barh(i, length, color=PEER if peer else OURS, height=0.7)
        axes.text(max(length, 0), i, f" {label}", va="center", fontsize=7)
    axes.set_yticks(range(len(panel.bars)), list(panel.bars), fontsize=8)
    axes.invert_yaxis()
    if panel.log:
        axes.set_xscale("log")
        axes.set_xlim(left=min(length for length, _ in panel.bars.values()) / 10)
    # room for the labels
    axes.margins(x=0.3)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(panel.heading, fontsize=9, loc="left")
