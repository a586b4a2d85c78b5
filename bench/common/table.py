"""What is printed of a report: a table for each row, a line for each side, and notes on what the tables cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]  # a line of a report, or a side of one


class Column(NamedTuple):
    """A heading, and the cell under it: of a side's name and figures; a KeyError makes a dash."""

    heading: str
    cell: Callable[[str, Row], str]


def show(
    report: Row,
    console: Console,
    columns: Callable[[Row], Sequence[Column]],
    notes: Callable[[Row], Sequence[str]],
) -> None:
    """Prints a report."""
    here = report["environment"]
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "triton", "cuda", "driver") if here[name])
    _print(console, f"{here['device']}, {versions}, threads {here['threads']}")
    _print(console, f"commit {here['commit'] or 'unknown'}, {here['date']}")
    for row in report["rows"]:
        # not the table's own title, which would be wrapped to the table's width
        title = f"{row['shape']}, {row['pass']}" if "pass" in row else row["shape"]
        console.print(f"\n{title}", style="bold", highlight=False, markup=False, soft_wrap=True)
        if row["refused"]:
            _print(console, f"REFUSED, {row['refused']}: no times")
        else:
            console.print(_table(row, columns(row)))
        for line in _side_notes(row):
            _print(console, line)
    for line in dict.fromkeys((*notes(report), f"fp32 products: {here['fp32_products']} (highest: no TF32)")):
        _print(console, line)


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(row: Row, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("side", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for name, side in row["sides"].items():
        if "ms" in side:
            table.add_row(name, *(_cell(column, name, side) for column in columns))
    return table


def _cell(column: Column, name: str, side: Row) -> str:
    try:
        return column.cell(name, side)
    except KeyError:
        return "–"


def _side_notes(row: Row) -> list[str]:
    """Why a side is missing, and which peers' results are worse than the gates."""
    lines = []
    for name, side in row["sides"].items():
        if "note" in side:
            lines.append(f"{name} {side['note']}")
        lines += [f"{name}: {line}" for line in (side.get("graph_note"), *side.get("said", ())) if line]
        for what, gate in (side.get("gates") or {}).items():
            wrong = side.get(f"{what}_error", 0.0)
            if wrong is None or wrong > gate:
                lines.append(f"{name}'s own {what} error is {_error(wrong)}, over {gate:.0e}")
    return lines


def time_columns(figure: str = "ms") -> list[Column]:
    """The median of a time, and its 20th to 80th percentile."""
    heading = "ms" if figure == "ms" else "ms in a\ngraph"
    return [
        Column(heading, lambda name, side: digits(side[figure]["p50"])),
        Column("p20–p80", lambda name, side: f"{digits(side[figure]['p20'])}–{digits(side[figure]['p80'])}"),
    ]


def operator_columns(row: Row) -> list[Column]:
    """The columns of a benchmark of an operator: times, and memory, relative to the first side, which is fastle's."""
    ours = next(iter(row["sides"].values()))
    columns = [*time_columns(), Column("time ×", lambda name, side: ratio(side["ms"]["p50"], ours["ms"]["p50"]))]
    if any("graph_ms" in side for side in row["sides"].values()):
        columns += time_columns("graph_ms")
        columns.append(Column("time ×", lambda name, side: ratio(side["graph_ms"]["p50"], ours["graph_ms"]["p50"])))
    return [
        *columns,
        Column("MB", lambda name, side: digits(side["peak_bytes"] / 1e6)),
        Column("MB ×", lambda name, side: ratio(side["peak_bytes"], ours["peak_bytes"])),
        *error_columns("value", "gradient"),
    ]


def error_columns(*names: str) -> list[Column]:
    """Errors, and the seconds of the first call."""
    errors = [Column(f"{name}\nerror", lambda _, side, key=f"{name}_error": _error(side[key])) for name in names]  # type: ignore[misc]
    return [*errors, Column("first\ncall", lambda name, side: f"{side['first_call_s']:.1f} s")]


def digits(value: float) -> str:
    """A number of three digits, as tables show it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float, base: float) -> str:
    """How many times `base` a value is."""
    return f"{digits(value / base)}×" if base else "–"


def _error(error: float | None) -> str:
    return "nan" if error is None or math.isnan(error) else f"{error:.0e}"
