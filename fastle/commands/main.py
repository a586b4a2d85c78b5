"""fastle: measures and uses what fastle-train made."""

from __future__ import annotations

from collections.abc import Sequence

from . import check, eval, reconstruct  # noqa: A004
from .cli import Output, Parser, one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """fastle: measures and uses what fastle-train made."""
    with one_line_errors("fastle"):
        parser = Parser(prog="fastle", allow_abbrev=False, description="Measure and use what fastle-train made.")
        commands = parser.add_subparsers(dest="command", required=True, metavar="{eval,reconstruct,check}")
        for command in (eval, reconstruct, check):
            command.add_parser(commands)
        flags = parser.parse_args(argv)
        flags.call(flags, Output())
