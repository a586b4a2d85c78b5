"""fastle check: whether a run directory, its checkpoints and its cache are intact, and what can be saved."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastle.checkpoint import CheckpointError
from fastle.training.check import check_run, restore_config
from fastle.training.loop import make_loading

from .cli import Output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Checks the run that the flags name."""
    _check(Path(flags.run), flags.restore_config, console)


def _check(run: Path, restore: bool, console: Output) -> None:
    verdict = check_run(run, make_loading("auto", "none", torch.device("cpu"), console))
    for finding in verdict.findings:
        name = finding.file.relative_to(run) if finding.file.is_relative_to(run) else finding.file
        console.say(f"{'good   ' if finding.good else 'DAMAGED'}  {name}: {finding.says}")
    if restore:
        console.say(f"written to {restore_config(run, verdict)}")
        return
    if verdict.newest is None:
        outcome = "no checkpoint can be used: fastle-train starts anew, with --overwrite if damaged ones are there"
    else:
        outcome = f"the run can go on from step {verdict.newest.step}: run the same command again"
    damaged = sum(not finding.good for finding in verdict.findings)
    if not damaged:
        console.say(outcome)
        return
    if not verdict.findings[0].good and verdict.newest is not None:
        outcome = f"`fastle check {run} --restore-config` writes config.json anew, and then {outcome}"
    raise CheckpointError(f"{run}: damaged files: {damaged}; {outcome}")
