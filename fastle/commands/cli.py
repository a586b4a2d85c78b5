"""What every command shares: its parser, the device flag, and errors as one line on stderr without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fastle.errors import FastleError
from fastle.training.loop import Interrupted


class Parser(argparse.ArgumentParser):
    """argparse's, for a command whose errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first, and the error scrolls away below it
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the process with one line for what a user can mend, and the shell's status for a signal."""
    rank = os.environ.get("RANK")
    prefix = program if rank is None else f"{program} (rank {rank})"
    try:
        yield
    except FastleError as error:
        sys.exit(f"{prefix}: error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{prefix}: error: {where}{error.strerror or error}")
    except Interrupted as stop:
        print(f"{prefix}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
