"""fastle report: one HTML page of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastle.web.page import write_page

from .cli import Output
from .outputs import check_output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the page that the flags ask for."""
    _report([Path(run) for run in flags.runs], Path(flags.output), console)


def _report(runs: list[Path], output: Path, console: Output) -> None:
    check_output(output, (".html",))
    write_page(runs, output)
    console.say(f"written to {output}")
