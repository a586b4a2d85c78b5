"""What the benchmarks' commands share: flags and the report; see `bench/tables.py` for what is printed of it.

A benchmark gives `run` its shapes and how to make a row's `Case` of one; see `bench/measure.py` for what becomes of it
(the step's benchmark has a measure and tables of its own).
A report is one JSON object: "benchmark", "environment", "command" and "rows". Table and plot are made from it alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from bench.measure import FULL, QUICK, Effort, Row, measure, peaks
from bench.tables import row_name, show, three_digits

WIDTH = 120  # of what is printed into a file


class BenchError(Exception):
    """What the user can mend: one line that names the flag, its value and what is accepted."""


class Parser(argparse.ArgumentParser):
    """The flags that all benchmarks have. An error is one line, without the usage before it."""

    def __init__(
        self, prog: str, description: str, *, quick: str = "fewer repeats, and without --shapes five shapes only"
    ) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
        self.add_argument("--quick", action="store_true", help=quick)
        self.add_argument("--json", type=Path, metavar="FILE", help="write the report here, again after each row")
        self.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the report's times and memory")
        self.add_argument(
            "--from", type=Path, dest="source", metavar="FILE", help="show (and draw) this report and measure nothing"
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run(
    parser: Parser,
    argv: Sequence[str] | None,
    *,
    name: str,
    shapes: Callable[[argparse.Namespace, torch.device], Sequence[Any]],
    make_case: Callable[[Any, argparse.Namespace, torch.device], Any],
    draw: Callable[[Row, Path], None],
    measure: Callable[[Any, torch.device, Effort], Row] = measure,
    show: Callable[[Row, Console], None] = show,
    summary: Callable[[Row], str] | None = None,
) -> int:
    """Does what the flags say.

    Args:
        argv: the arguments; None for the process's own.
        name: the benchmark's, in its reports.
        shapes: what to measure, a row each.
        make_case: the row of a shape.
        draw: writes a PNG of a report.
        measure: makes a row of a case.
        show: prints a report.
        summary: a row in a line; None for ours against each peer.

    Returns:
        The exit status: 1 if a row was refused. Bad input exits at once, with 2.
    """
    flags = parser.parse_args(argv)
    try:
        check_flags(parser, flags)
        if flags.source is not None:
            report = load_report(flags.source, name)
        else:
            device = pick_device(flags.device)
            # no TF32: the products of all sides are as exact as fp32 allows
            torch.set_float32_matmul_precision("highest")
            report = {
                "benchmark": name,
                "environment": environment(device),
                "command": [parser.prog, *(sys.argv[1:] if argv is None else argv)],
                "rows": [],
            }
            effort = QUICK if flags.quick else FULL
            fill(
                report,
                shapes(flags, device),
                lambda shape: measure(make_case(shape, flags, device), device, effort),
                summary or _summary,
                flags.json,
            )
        console = Console()
        show(report, console if console.is_terminal else Console(width=WIDTH))
        if flags.plot is not None:
            draw(report, flags.plot)
    except BenchError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return int(any(row["refused"] for row in report["rows"]))


def check_flags(parser: Parser, flags: argparse.Namespace) -> None:
    """Finds before the measuring what would fail after it.

    Raises:
        BenchError: flags that exclude each other, files that cannot be written.
    """
    if flags.source is not None:
        for flag, value in vars(flags).items():
            if flag not in ("source", "plot") and value != parser.get_default(flag):
                raise BenchError(f"--{flag} is for measuring, and --from {flags.source} measures nothing: give one")
    if flags.plot is not None and flags.plot.suffix != ".png":
        raise BenchError(f"--plot {flags.plot}: the name has to end in .png")
    for flag, path in (("--json", flags.json), ("--plot", flags.plot)):
        if path is None:
            continue
        if path.is_dir():
            raise BenchError(f"{flag} {path} is a folder: give the name of a file")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise BenchError(
                f"{flag} {path} cannot be written: {error.strerror}; give a file in a folder that can"
            ) from None


def pick_device(name: str | None) -> torch.device:
    """The device of --device.

    Raises:
        BenchError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: PyTorch finds no GPU here; --device cpu is accepted")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fill(
    report: Row,
    shapes: Sequence[Any],
    make_row: Callable[[Any], Row],
    summary: Callable[[Row], str],
    path: Path | None,
) -> None:
    """Measures the rows of a report. It is saved after each, so that a time limit keeps what is done."""
    for i, shape in enumerate(shapes, start=1):
        begin = time.perf_counter()
        row = make_row(shape)
        report["rows"].append(row)
        if path is not None:
            save_report(path, report)
        seconds = time.perf_counter() - begin
        print(f"{i}/{len(shapes)}  {summary(row)}  ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _summary(row: Row) -> str:
    if row["refused"]:
        return f"{row_name(row)}: REFUSED, {row['refused']}"
    ours = next(iter(row["sides"].values()))
    peers = ", ".join(f"{ratio:.1f} × {peer}" for peer, ratio in row["ratios"].items())
    return f"{row_name(row)}: {three_digits(ours['ms']['p50'])} ms, {peers}"


def save_report(path: Path, report: Row) -> None:
    """Writes a report that is there whole or not at all.

    Raises:
        BenchError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BenchError(f"--json {path} cannot be written: {error.strerror}; make room or give another") from None


def load_report(path: Path, name: str) -> Row:
    """An earlier report of the benchmark `name`.

    Raises:
        BenchError: there is none in that file.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"--from {path} cannot be read: {error.strerror}; give a file that --json wrote") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("benchmark") != name or not report.get("rows"):
        raise BenchError(f"--from {path} is no report of the {name} benchmark: give a file that --json wrote")
    return report


def environment(device: torch.device) -> Row:
    """What the figures depend on besides the code."""
    cuda = device.type == "cuda"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "device_type": device.type,
        "peaks_known": peaks(device) is not None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "fp32_products": torch.get_float32_matmul_precision(),
        "commit": _output(
            "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
