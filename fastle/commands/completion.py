"""fastle completion: what a shell reads to complete commands, flags, choices, names of models and paths of files.

It is made once, by shtab, from the commands' own parsers. No key press starts Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shtab

import fastle

from . import main, train
from .cli import Output

# what stands for a text that is no path; everything else that is text is one
NO_PATHS = ("NAME", "TEXT")
# as `fastle.method.pretrained` finds them, which needs torch
SHIPPED = sorted(path.parent.name for path in Path(fastle.__file__).parent.glob("weights/*/config.json"))
# shtab's scripts for bash know by "_files" that paths come, which a shell escapes
MODELS = {
    "bash": "_fastle_model_files",
    "zsh": "_fastle_model_files",
    "preamble": {
        "bash": f'_fastle_model_files() {{ compgen -W "{" ".join(SHIPPED)}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_fastle_model_files() {{ compadd -- {' '.join(SHIPPED)}; _files }}",
    },
}
KINDS: dict[Any, Any] = {"MODEL": MODELS, "RUN": shtab.DIRECTORY}  # others are any files


def run(flags: argparse.Namespace, console: Output) -> None:
    """Prints the script for the shell that the flags name, which completes fastle and fastle-train."""
    for parser in (main.make_parser(), train.make_parser()):
        for action in _actions(parser):
            is_text = action.nargs != 0 and not action.choices and action.type in (None, str)
            if is_text and action.metavar not in NO_PATHS:
                action.complete = KINDS.get(action.metavar, shtab.FILE)  # type: ignore[attr-defined]
        # for zsh, shtab would complete the first alone of several images or runs
        print(shtab.complete(parser, flags.shell).replace('"(*):', '"*:'))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
