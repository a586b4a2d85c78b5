"""What the scripts that measure finished runs share: how they open runs, their parser, and their report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastle.checkpoint import read_run_config
from fastle.commands.cli import Parser
from fastle.commands.outputs import check_output
from fastle.config import RunConfig
from fastle.data import Images, Loading, open_images, open_tree
from fastle.files import write_atomic
from fastle.machine import environment
from fastle.method.model import Autoencoder, unit_range
from fastle.method.pretrained import model_of_run
from fastle.training.evaluate import evenly_spaced


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run's newest model on the CPU, and images to measure it with.

    Attributes:
        config: Of the run.
        model: With the weights of its newest good checkpoint.
        step: Of that checkpoint.
        images: Evenly spaced ones of its test split or of another folder, (B, C, H, W) in [0, 1].
    """

    config: RunConfig
    model: Autoencoder
    step: int
    images: Tensor


def open_run(run: Path, data: Path | None, count: int) -> FinishedRun:
    """A run, with at most `count` images of the folder `data`, or of its test split.

    Raises:
        FastleError: The run or the images cannot be used.
    """
    config = read_run_config(run)
    model, checkpoint, _ = model_of_run(run, "cpu")
    images: Images
    images = open_images(config.data, "test") if data is None else open_tree(config.data, data, Loading())
    x = unit_range(images.batch(evenly_spaced(len(images), count)))
    return FinishedRun(config, model, checkpoint.step, x)


def measure_runs(
    flags: argparse.Namespace,
    count: int,
    kind: str,
    measure: Callable[[FinishedRun], Mapping[str, Mapping[str, float]]],
) -> list[dict[str, Any]]:
    """A row for everything that `measure` gives figures of, run by run.

    Args:
        flags: With the runs, and --data.
        count: At most so many images of each run.
        kind: What the names are that `measure` gives, such as "stage".
        measure: The figures of a run, by name.

    Raises:
        FastleError: A run or the images cannot be used.
    """
    rows: list[dict[str, Any]] = []
    for run in flags.runs:
        opened = open_run(run, flags.data, count)
        named = {"run": run.name, "step": opened.step}
        rows += [named | {kind: name} | dict(figures) for name, figures in measure(opened).items()]
    return rows


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
