"""fastle reconstruct: a picture of images and their reconstructions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from fastle.checkpoint import read_run_config
from fastle.data import decode_files
from fastle.machine import pick_device
from fastle.method.model import Autoencoder
from fastle.training.evaluate import reconstruction_rows
from fastle.training.report import save_grid

from .cli import DEVICE, Parser, add_option


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command to those of `fastle`."""
    parser = commands.add_parser("reconstruct", help="a picture of images and reconstructions", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, cut to size as in training")
    parser.add_argument("-o", "--output", metavar="OUT.png", required=True, help="where the picture goes")
    add_option(parser, DEVICE)
    parser.set_defaults(
        call=lambda flags, console: _reconstruct(
            Path(flags.run), flags.images, Path(flags.output), pick_device(flags.device or "auto", console), console
        )
    )


def _reconstruct(run: Path, images: list[str], output: Path, device: torch.device, console: Console) -> None:
    config = read_run_config(run)
    model = Autoencoder.from_pretrained(run, device)
    batch = decode_files(config.data, [Path(image) for image in images]).to(device)
    save_grid(output, reconstruction_rows(model, batch, config.objective.hole_ratio))
    console.print(f"written to {output}", highlight=False, markup=False, soft_wrap=True)
