"""What the scripts that measure finished runs share: their parser, and their report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastle.commands.cli import Parser
from fastle.commands.outputs import check_output
from fastle.files import write_atomic
from fastle.machine import environment


def make_parser(prog: str, description: str) -> Parser:
    """A parser with the runs and --json."""
    parser = Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the figures go")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags.

    Raises:
        ConfigError: The file of --json cannot be written.
    """
    flags = parser.parse_args(argv)
    if flags.json is not None:
        check_output(flags.json, flag="--json")
    return flags


def write_report(flags: argparse.Namespace, prog: str, argv: Sequence[str] | None, rows: list[dict[str, Any]]) -> None:
    """Writes command, rows and environment to the file of --json, if it was given."""
    if flags.json is not None:
        command = " ".join(["python", f"scripts/{prog}", *(sys.argv[1:] if argv is None else argv)])
        report = {"command": command, "rows": rows, "environment": environment(torch.device("cpu"))}
        write_atomic(flags.json, (json.dumps(report, indent=2) + "\n").encode())
