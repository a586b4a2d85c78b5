"""What is printed of a benchmark's report: tables of times, memory and bandwidth, and what they have no room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import RESULTS, Row

LABELS = ("shape", "pass")
MOST_PEERS = 3  # whose times and memory fit into 120 characters side by side


class Column(NamedTuple):
    """A heading, and what stands under it of a row that has times."""

    heading: str
    cell: Callable[[Row], str]


def show(report: Row, console: Console) -> None:
    """Prints a report: a table, for CUDA graphs another one, and what the tables have no room for."""
    heading(report, console)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in report["rows"]:
        groups.setdefault(tuple(row["sides"]), []).append(row)
    for rows in groups.values():
        for table in _tables(rows):
            console.print(table)
        if any(row.get("graph_ratios") for row in rows):
            console.print(_graph_table(rows))
    for line in _notes(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def heading(report: Row, console: Console) -> None:
    """Prints what a report was measured on, and when."""
    here = report["environment"]
    versions = [f"{name} {here[name]}" for name in ("torch", "triton", "cuda", "driver") if here[name]]
    console.print(f"{here['device']}, {', '.join(versions)}, threads {here['threads']}", highlight=False)
    console.print(f"commit {here['commit'] or 'unknown'}, {here['date']}", highlight=False)


def row_name(row: Row) -> str:
    """What tells a row from the others of its report."""
    return " ".join(_labels(row))


def _labels(row: Row) -> list[str]:
    """The cells that say which row it is. A benchmark that times one pass only does not name it."""
    return [row[label] for label in LABELS if label in row]


def _tables(rows: Sequence[Row]) -> list[Table]:
    """Times, ratios and memory of calls to the same sides: one table, or two if the columns are too many for one."""
    ours, *others = rows[0]["sides"]
    # a side that is not installed has a note, and needs no columns
    peers = [peer for peer in others if any(row["sides"][peer]["status"] != "not installed" for row in rows)]
    times = [*_times(ours, "ms"), *_ratios(peers, "time", "ratios")]
    memory = [
        Column(f"{ours}\nMB", lambda row: three_digits(row["sides"][ours]["peak_bytes"] / 1e6)),
        *_ratios(peers, "MB", "memory_ratios"),
    ]
    if any("gb_per_s" in row for row in rows):
        memory.append(Column("GB/s", lambda row: three_digits(row["gb_per_s"])))
        memory += [Column(f"of\n{bound}", partial(_reached, bound=bound)) for bound in _bounds(rows)]
    errors = [
        Column("value\nerror", lambda row: _error(row["sides"][ours], "value_error")),
        Column("grad\nerror", lambda row: _error(row["sides"][ours], "gradient_error")),
    ]
    first_call = Column(
        "first\ncall", lambda row: "–" if row["refused"] else f"{row['sides'][ours]['first_call_s']:.1f} s"
    )
    if len(peers) <= MOST_PEERS:
        return [_table(_title(rows), rows, times + memory, [*errors, first_call])]
    return [_table(_title(rows), rows, times, errors), _table("peak memory, bandwidth", rows, memory, [first_call])]


def _times(ours: str, figure: str) -> list[Column]:
    """The median and the spread of our "ms" or "graph_ms"; the latter in µs."""
    unit, scale = ("ms", 1) if figure == "ms" else ("µs", 1e3)

    def quantiles(row: Row, *names: str) -> str:
        return "–".join(three_digits(scale * row["sides"][ours][figure][name]) for name in names)

    return [
        Column(f"{ours}\n{unit}", lambda row: quantiles(row, "p50")),
        Column("p20–p80", lambda row: quantiles(row, "p20", "p80")),
    ]


def _ratios(peers: Sequence[str], figure: str, key: str) -> list[Column]:
    return [Column(_heading(peer, figure), partial(_ratio, key=key, peer=peer)) for peer in peers]


def _title(rows: Sequence[Row]) -> str:
    passes = "both: forward + backward" if "pass" in rows[0] else "forward + backward"
    return f"{passes}; × is the peer's figure over ours"


def _heading(name: str, figure: str) -> str:
    """Narrow: a word below the other, and the longest one in two parts."""
    return "\n".join([*name.replace("_", "_ ").replace(" compiled", " com- piled").split(), figure])


def _table(title: str, rows: Sequence[Row], figures: Sequence[Column], always: Sequence[Column] = ()) -> Table:
    """A line for each row. A refused one has no figures, only what is `always` there."""
    # no padding: the columns have to fit into 120 characters, and the box puts a space between them
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for heading in LABELS[: len(_labels(rows[0]))]:
        table.add_column(heading, no_wrap=True)
    for column in (*figures, *always):
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        cells = ["REFUSED", *["–"] * (len(figures) - 1)] if row["refused"] else [column.cell(row) for column in figures]
        cells += [column.cell(row) for column in always]
        table.add_row(*_labels(row), *cells, style="red" if row["refused"] else None)
    return table


def _graph_table(rows: Sequence[Row]) -> Table:
    """Times and ratios of replayed graphs: what the device itself needs. And how near that is to what bounds it."""
    ours, *peers = rows[0]["sides"]
    columns = [*_times(ours, "graph_ms"), *_ratios(peers, "time", "graph_ratios")]
    for bound in _bounds(rows):
        columns += [
            Column(f"{bound}\nfloor, µs", partial(_floor, bound=bound)),
            Column("reached", partial(_reached, bound=bound)),
        ]
    return _table(
        "in CUDA graphs: the device's own time, and how near it is to what no version can beat",
        [row for row in rows if not row["refused"] and "graph_ms" in row["sides"][ours]],
        columns,
    )


def _bounds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(bound for row in rows for bound in row.get("floors_ms", ())))


def _notes(report: Row) -> list[str]:
    """Why something is missing, and whose results are worse than the gates."""
    notes: list[str] = []
    missing: dict[str, list[str]] = {}
    worse: dict[str, list[tuple[float, str]]] = {}
    for row in report["rows"]:
        if row["refused"]:
            notes.append(f"{row_name(row)}: REFUSED, {row['refused']}: no times")
            continue
        for name, side in row["sides"].items():
            if side["status"] == "not installed":
                missing.setdefault(side["note"], []).append(name)
            elif "note" in side:
                notes.append(f"{row_name(row)}: {name} {side['note']}")
            if "graph_note" in side:
                notes.append(f"{row_name(row)}: {name}: {side['graph_note']}")
            for what, gate in zip(RESULTS, row["gates"], strict=False):
                error = side.get(f"{what}_error", 0.0)
                if error is None or error > gate:
                    key = f"{name}'s own {what} error is"
                    worse.setdefault(key, []).append((math.inf if error is None else error, row_name(row)))
    # of every row alike
    notes += [f"{note}: no figures of {', '.join(dict.fromkeys(names))}" for note, names in missing.items()]
    for key, errors in worse.items():
        error, where = max(errors)
        more = f" (over the gate in {len(errors)} rows, worst there)" if len(errors) > 1 else ""
        notes.append(f"{where}: {key} {'nan' if math.isinf(error) else f'{error:.0e}'}{more}")
    here = report["environment"]
    if here["device_type"] == "cuda" and not here["peaks_known"] and not _bounds(report["rows"]):
        notes.append(f"no floors: the peaks of {here['device']} are not in bench/measure.py")
    notes.append(f"products of fp32: {here['fp32_products']} (highest: no TF32). first call: with its compilation")
    return notes


def three_digits(value: float) -> str:
    """A number as tables show it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row, key: str, peer: str) -> str:
    return f"{three_digits(row[key][peer])}×" if peer in row[key] else "–"


def _floor(row: Row, bound: str) -> str:
    return three_digits(1e3 * row["floors_ms"][bound])


def _reached(row: Row, bound: str) -> str:
    return f"{row['floor_fractions'][bound]:.0%}"


def _error(side: Row, key: str) -> str:
    error = side.get(key, math.nan)
    return "nan" if error is None else "–" if math.isnan(error) else f"{error:.0e}"
