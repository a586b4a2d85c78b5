"""What the commands share: the parser, options, errors in one line without a traceback, and what is printed and how."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console

import fastle
from fastle.errors import FastleError, SaidByAnother
from fastle.options import Option
from fastle.training.signals import Interrupted, raising_signals

COLUMNS = 80
# for a terminal without UTF-8
PLAIN = {"–": "-", "—": "-", "→": "->", "×": "x", "…": "...", "σ": "sigma", "λ": "lambda", "‘": "'", "’": "'"}


class Parser(argparse.ArgumentParser):
    """argparse's parser, for a command that reports an error in one line and ends with status 2."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first, and the error would scroll away below it
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_option(parser: argparse._ActionsContainer, option: Option) -> None:
    """Adds an option's flag, or for "dataset" its position. An option that is not given is None."""
    text = option.text.replace("%", "%%")
    if option.kind is bool:
        action = argparse.BooleanOptionalAction if option.default else "store_true"
        parser.add_argument(option.flag, action=action, default=None, help=text)
    elif option.name == "dataset":
        # a file of settings may name it
        parser.add_argument(option.name, nargs="?", choices=option.choices, help=text)
    elif option.choices:
        kind = type(option.choices[0])
        parser.add_argument(option.flag, type=kind, choices=option.choices, help=text)
    else:
        nargs = "*" if option.many else None
        read = option.parse if option.pair else option.kind
        parser.add_argument(option.flag, type=read, nargs=nargs, metavar=option.metavar, help=text)


def wrapped(label: str, items: list[str], gap: str = "  ") -> str:
    """Items after a label, wrapped to 80 columns. An item is never broken, even if it is longer than a line."""
    # an item is not broken at its own spaces
    text = gap.join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(
        text, COLUMNS, initial_indent=f"{label:<11}", subsequent_indent=" " * 11,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines).replace("\0", " ")


class Output(Console):
    """The console of a command.

    The reader of the output may exit first, as `head` does. A training run then saves and stops, as on SIGHUP; other
    commands just stop.
    """

    def say(self, text: str) -> None:
        """Prints a text as it is: nothing in it is taken for markup, highlighted or wrapped."""
        self.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Called by rich, once the output is closed."""
        self.quiet = True
        # otherwise Python would report the closed output again when it exits
        _drop_output()
        print("the output was closed; stopping", file=sys.stderr)
        signal.raise_signal(signal.SIGHUP)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def readable_anywhere() -> None:
    """Replaces characters that the terminal cannot show, in place of an error."""
    codecs.register_error("fastle", _plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastle")


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Reports an error that a user can mend in one line, and ends with status 1, or after a signal with the shell's.

    fastle's own warnings are shown without path and source line.
    """
    readable_anywhere()
    rank = os.environ.get("RANK")
    prefix = program if rank is None else f"{program} (rank {rank})"
    try:
        with _plain_warnings(), raising_signals():
            yield
    except SaidByAnother:
        sys.exit(1)
    except FastleError as error:
        sys.exit(f"{prefix}: error: {error}")
    except BrokenPipeError:
        # argparse writes its help itself, not through rich
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{prefix}: error: {where}{error.strerror or error}")
    except RuntimeError as error:
        # if torch has raised it, torch is imported already
        from fastle.training.memory import out_of_memory

        if not out_of_memory(error):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        gpu = "" if "CPUAllocator" in said else " (nvidia-smi names them), or give --device cpu"
        sys.exit(f"{prefix}: error: memory ran out: {said}; free what other programs hold{gpu}")
    except Interrupted as stop:
        if isinstance(stop.__context__, FastleError) and not isinstance(stop.__context__, SaidByAnother):
            # torchrun stops the other ranks when one exits: an error that is on its way must still be shown
            sys.exit(f"{prefix}: error: {stop.__context__}")
        print(f"{prefix}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows warnings of fastle without path and source line, and leaves those of other libraries as they are."""
    ours, show = str(Path(fastle.__file__).parent), warnings.showwarning

    def show_plainly(message, category, filename, lineno, file=None, line=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if filename.startswith(ours):
            print(textwrap.fill(str(message), COLUMNS, break_long_words=False), file=file or sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    # torch tells every user of a CPU that its compiler could have used a GPU
    extension = logging.getLogger("torch.utils.cpp_extension")
    warnings.showwarning = show_plainly
    extension.addFilter(_not_about_cuda_home)
    try:
        yield
    finally:
        warnings.showwarning = show
        extension.removeFilter(_not_about_cuda_home)


def _not_about_cuda_home(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")
