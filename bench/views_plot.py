"""The picture of a views report: for each shape a bar of time and one of peak memory for each side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.measure import Row
from bench.plots import machine, write
from bench.tables import three_digits

# Okabe and Ito's colours, which colour-blind people can tell apart; the backward's part is lighter
OURS, PEER, FORWARD_ALPHA, BACKWARD_ALPHA = "#D55E00", "#0072B2", 1.0, 0.4
BAR, PANEL_WIDTH = 0.2, 4.2  # inches


def draw(report: Row, path: Path) -> None:
    """Writes a PNG: a line of two panels for each shape. Refused rows are left out.

    Bars reach to the figure of forward + backward; their darker part is that of the forward alone. On a GPU times are
    those of CUDA graphs, where ours has one: the device's own.
    """
    from matplotlib.figure import Figure

    shapes: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        if not row["refused"]:
            shapes.setdefault(row["shape"], {})[row["pass"]] = row
    sides = [_names(passes) for passes in shapes.values()]
    heights = [BAR * len(names) + 0.6 for names in sides] or [1.0]
    figure = Figure(figsize=(2 * PANEL_WIDTH, sum(heights) + 1.2), layout="constrained", dpi=150)
    panels = figure.subplots(len(heights), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    if not shapes:
        for panel in panels.flat:
            panel.set_visible(False)
    for (shape, passes), names, (times, memory) in zip(shapes.items(), sides, panels, strict=bool(shapes)):
        _bars(times, names, {name: {key: _ms(row, name) for key, row in passes.items()} for name in names})
        _bars(memory, names, {name: {key: _mb(row, name) for key, row in passes.items()} for name in names})
        times.set_title(f"{shape}: ms", fontsize=9, loc="left")
        memory.set_title("peak memory, MB", fontsize=9, loc="left")
        memory.set_yticklabels([])
    _explain(figure, report)
    write(figure, path)


def _names(passes: dict[str, Row]) -> list[str]:
    """The sides that have figures; a missing one says why in the table."""
    (row, *_) = passes.values()
    return [name for name in row["sides"] if any("ms" in row["sides"][name] for row in passes.values())]


def _ms(row: Row, name: str) -> float | None:
    (ours, *_) = row["sides"].values()
    key = "graph_ms" if "graph_ms" in ours else "ms"
    return row["sides"][name][key]["p50"] if key in row["sides"][name] else None


def _mb(row: Row, name: str) -> float | None:
    return row["sides"][name]["peak_bytes"] / 1e6 if "peak_bytes" in row["sides"][name] else None


def _bars(panel: Any, names: list[str], figures: dict[str, dict[str, float | None]]) -> None:
    """A bar for each side, ours on top, with its number."""
    for i, name in enumerate(names):
        colour = PEER if i else OURS
        both, forward = (figures[name].get(key) for key in ("both", "forward"))
        if both is not None:
            panel.barh(i, both, color=colour, alpha=BACKWARD_ALPHA, height=0.7)
        if forward is not None:
            panel.barh(i, forward, color=colour, alpha=FORWARD_ALPHA, height=0.7)
        known = [figure for figure in (forward, both) if figure is not None]
        if known:
            # not the difference: peaks of memory do not add up
            panel.text(max(known), i, " " + " / ".join(map(three_digits, known)), va="center", fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    # room for the numbers
    panel.margins(x=0.3)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _explain(figure: Any, report: Row) -> None:
    """Title and legend, outside the panels."""
    from matplotlib.patches import Patch

    figure.suptitle(f"The views, medians\n{machine(report)}", fontsize=10)
    handles = [
        Patch(color="#666666", alpha=FORWARD_ALPHA, label="forward"),
        Patch(color="#666666", alpha=BACKWARD_ALPHA, label="forward + backward"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
