"""The picture of a SIGReg report: time and peak memory against the number of samples, a line for each side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.measure import Row
from bench.plots import machine, write

# Okabe and Ito's colours, which colour-blind people can tell apart
STYLES: dict[str, dict[str, Any]] = {
    "fastle": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "zorder": 4},
    "eager": {"color": "#000000", "marker": "s"},
    "compiled": {"color": "#0072B2", "marker": "^"},
    "chunked": {"color": "#009E73", "marker": "D"},
}
MOST_COLUMNS = 4
PANEL = (3.1, 2.3)  # inches


def draw(report: Row, path: Path) -> None:
    """Writes a PNG: for each pair (D, M) of a report's rows a panel of times above a panel of memory.

    The samples of all tests of a row count together. Refused rows are left out; so are pairs with a single number of
    samples, if there are lines to draw for others. A side that did not fit has no time, and a hollow mark at the memory
    that it would need.
    """
    from matplotlib.figure import Figure

    families: dict[tuple[int, int], list[Row]] = {}
    for row in sorted(report["rows"], key=lambda row: (row["slices"], row["features"], _samples(row))):
        if not row["refused"]:
            families.setdefault((row["features"], row["slices"]), []).append(row)
    several = {pair: rows for pair, rows in families.items() if len({_samples(row) for row in rows}) > 1}
    families = several if len(several) > 1 else families
    lines = max(1, math.ceil(len(families) / MOST_COLUMNS))
    columns = max(1, math.ceil(len(families) / lines))
    size = (max(columns, 2) * PANEL[0], 2 * lines * PANEL[1] + 1.2)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(2 * lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for i, ((features, slices), rows) in enumerate(families.items()):
        line, column = divmod(i, columns)
        times, memory = panels[2 * line, column], panels[2 * line + 1, column]
        _draw_times(times, rows)
        _draw_memory(memory, rows)
        times.set_title(f"D = {features}, M = {slices}", fontsize=10)
        memory.set_xlabel("samples B·N", fontsize=9)
        if column == 0:
            times.set_ylabel("time, ms", fontsize=9)
            memory.set_ylabel("peak memory, MB", fontsize=9)
    _explain(figure, report)
    write(figure, path)


def _samples(row: Row) -> int:
    return row["tests"] * row["samples"]


def _draw_times(panel: Any, rows: list[Row]) -> None:
    for name in rows[0]["sides"]:
        _line(panel, [(_samples(row), _figure(row, name, "ms")) for row in rows], **STYLES[name])
        graph = {**STYLES[name], "linestyle": ":", "markersize": 3}
        _line(panel, [(_samples(row), _figure(row, name, "graph_ms")) for row in rows], **graph)
    floors = [(_samples(row), row["floors_ms"].get("tensor")) for row in rows]
    _line(panel, floors, color="#999999", marker="_", linestyle="--")
    _finish(panel)


def _draw_memory(panel: Any, rows: list[Row]) -> None:
    for name in rows[0]["sides"]:
        _line(panel, [(_samples(row), _megabytes(row, name, "peak_bytes")) for row in rows], **STYLES[name])
        hollow = {**STYLES[name], "linestyle": "none", "markerfacecolor": "white"}
        _line(panel, [(_samples(row), _megabytes(row, name, "needs_bytes")) for row in rows], **hollow)
    _finish(panel)


def _figure(row: Row, name: str, key: str) -> float | None:
    return row["sides"][name][key]["p50"] if key in row["sides"][name] else None


def _megabytes(row: Row, name: str, key: str) -> float | None:
    return row["sides"][name][key] / 1e6 if key in row["sides"][name] else None


def _line(panel: Any, points: list[tuple[int, float | None]], **style: Any) -> None:
    """The points that there are, joined."""
    known = [(x, y) for x, y in points if y is not None]
    if known:
        panel.plot(*zip(*known, strict=True), **{"linewidth": 1.4, "markersize": 5} | style)


def _finish(panel: Any) -> None:
    """Log axes of whole decades, so that there are always labels, and the samples of the rows named."""
    panel.set_visible(True)
    xs = sorted({float(x) for line in panel.lines for x in line.get_xdata()})
    ys = [float(y) for line in panel.lines for y in line.get_ydata()]
    panel.set(xscale="log", yscale="log")
    # with room for the marks
    low, high = math.floor(math.log10(min(ys) / 1.4)), math.ceil(math.log10(max(ys) * 1.4))
    panel.set(xlim=(xs[0] / 2, xs[-1] * 2), ylim=(10.0**low, 10.0**high))
    ticks: list[float] = []
    for x in xs:
        # labels of neighbours nearer than this would touch
        if not ticks or math.log(x / ticks[-1]) > 0.15 * math.log(4 * xs[-1] / xs[0]):
            ticks.append(x)
    panel.set_xticks(ticks, [f"{x:.0f}" for x in ticks], minor=False)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.9f}".rstrip("0").rstrip("."))
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)


def _explain(figure: Any, report: Row) -> None:
    """Title and legend, outside the panels."""
    from matplotlib.lines import Line2D

    rows = report["rows"]
    figure.suptitle(f"SIGReg, forward + backward, medians\n{machine(report)}", fontsize=10)
    handles = [Line2D([], [], **STYLES[name], label=name) for name in rows[0]["sides"]]
    sides = [side for row in rows for side in row["sides"].values()]
    grey: dict[str, Any] = {"color": "#666666", "linewidth": 1.4}
    if any("graph_ms" in side for side in sides):
        handles.append(Line2D([], [], linestyle=":", **grey, label="in a CUDA graph"))
    if any(row.get("floors_ms") for row in rows):
        handles.append(Line2D([], [], linestyle="--", marker="_", color="#999999", label="floor (tensor cores)"))
    if any("needs_bytes" in side for side in sides):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], **grey, **hollow, label="would need: did not fit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
