"""fastle reconstruct: a picture of images and their reconstructions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastle.data import decode_files
from fastle.machine import pick_device
from fastle.method.pretrained import hole_ratio_of
from fastle.training.evaluate import reconstruction_rows
from fastle.training.loop import make_loading
from fastle.training.report import save_grid

from .cli import Output
from .models import load_model
from .outputs import check_output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the picture that the flags ask for."""
    device = pick_device(flags.device or "auto", console)
    _reconstruct(
        flags.model, [Path(image) for image in flags.images], Path(flags.output), device, flags.weights, console
    )


def _reconstruct(
    name: str, images: list[Path], output: Path, device: torch.device, weights: str | None, console: Output
) -> None:
    check_output(output, (".png",), images)
    loaded = load_model(name, device, weights)
    batch = decode_files(loaded.data, images, make_loading("auto", "none", device, console)).to(device)
    save_grid(output, reconstruction_rows(loaded.model, batch, hole_ratio_of(loaded.path)))
    console.say(f"written to {output}")
