"""fastle card: a run's model as a folder that can be shared."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastle.training.card import save_run

from .cli import Output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the folder that the flags ask for."""
    output = Path(flags.output)
    remarks = save_run(
        Path(flags.run),
        output,
        weights=flags.weights or "model",
        bf16=flags.bf16,
        about=flags.about,
        license_name=flags.license,
    )
    for line in (*remarks, f"written to {output}: look at {output / 'README.md'} before you share it"):
        console.say(line)
