"""fastle completion: what a shell reads to complete commands, flags, choices, names of models and paths of files.

It is made once, by shtab, from the commands' own parsers. No key press starts Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import shtab

from fastle.method.pretrained import shipped_models

from . import main, train
from .cli import Output

# metavars of texts that are not paths; all other texts are
NO_PATHS = ("NAME", "TEXT")
SHIPPED = shipped_models()
# shtab's scripts for bash know by a name that ends in "_files" that they must escape what it returns
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
        # of several images or runs, shtab would make zsh complete the first alone
        print(shtab.complete(parser, flags.shell).replace('"(*):', '"*:'))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
