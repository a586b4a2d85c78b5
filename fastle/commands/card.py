"""fastle card: a run's model as a folder that can be shared."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fastle.training.card import save_run


def run(flags: argparse.Namespace, console: Console) -> None:
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
        console.print(line, highlight=False, markup=False, soft_wrap=True)
