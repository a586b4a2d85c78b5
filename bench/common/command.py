"""The command that every benchmark is: its flags, and its report.

A report is one JSON object with "benchmark", "environment", "command" and "rows", a row for each case. It holds
what was measured; table and plot are derived from it alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.common.measure import FULL, QUICK, Case, Effort, measure
from bench.common.plot import Panel, save_plot
from bench.common.table import Column, Row, digits, show
from fastle.commands.cli import Parser
from fastle.commands.outputs import check_output
from fastle.config import ConfigError
from fastle.errors import FastleError
from fastle.files import write_atomic
from fastle.machine import environment, find_device

WIDTH = 120  # columns of what is printed into a file


def _make_and_measure(make: Callable[[torch.device], Case], device: torch.device, effort: Effort) -> Row:
    return measure(make(device), device, effort)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Args:
        name: Its name in reports.
        cases: What to measure, from flags and device; each case becomes a row.
        measure: Makes the row of a case; by default a case is what makes a `Case` for a device.
        columns: The columns of a row's table.
        panels: What to plot of a row.
        notes: Lines that explain the figures.
    """

    name: str
    cases: Callable[[argparse.Namespace, torch.device], Sequence[Any]]
    measure: Callable[[Any, torch.device, Effort], Row] = _make_and_measure
    columns: Callable[[Row], Sequence[Column]]
    panels: Callable[[Row], Sequence[Panel]]
    notes: Callable[[Row], Sequence[str]]


def make_parser(prog: str, description: str, *, quick: str, sides: Sequence[str] = ()) -> Parser:
    """A parser with the flags that all benchmarks have, and --sides if there are some. An error is one line."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if any")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, again after each row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the report")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="show this report, measure nothing")
    if sides:
        parser.add_argument("--sides", nargs="+", metavar="SIDE", choices=sides, help=f"of {', '.join(sides)}")
    return parser


def pick_sides(flags: argparse.Namespace, device: torch.device, there: Sequence[str]) -> Sequence[str]:
    """The sides that --sides names, or all that are there on a device.

    Raises:
        ConfigError: --sides names one that is not.
    """
    for name in flags.sides or ():
        if name not in there:
            raise ConfigError(f"--sides {name}: not on {device.type}; give some of {', '.join(there)}")
    return flags.sides or there


def run(parser: Parser, benchmark: Benchmark, argv: Sequence[str] | None) -> int:
    """Does what the flags say.

    Returns:
        The exit status: 1 if a row was refused, 130 after ctrl-c. Bad input exits at once, with 2.
    """
    flags = parser.parse_args(argv)
    try:
        check_flags(parser, flags)
        if flags.source is not None:
            report = load_report(flags.source, benchmark.name)
        else:
            report = measure_all(benchmark, flags, [parser.prog, *(sys.argv[1:] if argv is None else argv)])
        console = Console()
        show(report, console if console.is_terminal else Console(width=WIDTH), benchmark.columns, benchmark.notes)
        if flags.plot is not None:
            save_plot(report, flags.plot, benchmark.panels)
    except FastleError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return int(any(row["refused"] for row in report["rows"]))


def measure_all(benchmark: Benchmark, flags: argparse.Namespace, command: list[str]) -> Row:
    """The report of all cases. The file is written after each row, so that a time limit keeps what is measured.

    Raises:
        FastleError: The device or a case cannot be had.
    """
    device = find_device(flags.device)
    if device.type not in ("cpu", "cuda"):
        raise FastleError(f"benchmarks measure CPUs and CUDA GPUs, not {device}: give --device cpu")
    # no TF32: the matrix products of all sides are as exact as fp32 allows
    torch.set_float32_matmul_precision("highest")
    cases = benchmark.cases(flags, device)
    report: Row = {"benchmark": benchmark.name, "environment": environment(device), "command": command, "rows": []}
    for i, case in enumerate(cases, start=1):
        begin = time.perf_counter()
        row = benchmark.measure(case, device, QUICK if flags.quick else FULL)
        report["rows"].append(row)
        if flags.json is not None:
            write_atomic(flags.json, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        times = ", ".join(
            f"{name} {digits(side['ms']['p50'])} ms" for name, side in row["sides"].items() if "ms" in side
        )
        result = f"REFUSED, {row['refused']}" if row["refused"] else times
        seconds = time.perf_counter() - begin
        print(f"{i}/{len(cases)}  {row['shape']}: {result}  ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return report


def check_flags(parser: Parser, flags: argparse.Namespace) -> None:
    """Finds before the measuring what would fail after it.

    Raises:
        ConfigError: Flags exclude each other, or a file cannot be written.
    """
    if flags.source is not None:
        for flag, value in vars(flags).items():
            if flag not in ("source", "plot") and value != parser.get_default(flag):
                raise ConfigError(
                    f"--{flag} has no effect with --from {flags.source}, which measures nothing: drop one"
                )
    if flags.json is not None:
        check_output(flags.json, flag="--json")
    if flags.plot is not None:
        check_output(flags.plot, (".png",), flag="--plot")


def load_report(path: Path, name: str) -> Row:
    """An earlier report of the benchmark `name`.

    Raises:
        ConfigError: The file holds no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--from {path} cannot be read: {error.strerror}; give a file that --json wrote") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("benchmark") != name or not report.get("rows"):
        raise ConfigError(f"--from {path} is no report of the {name} benchmark: give a file that --json wrote")
    return report
