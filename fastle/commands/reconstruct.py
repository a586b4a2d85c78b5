"""fastle reconstruct: a picture of images and their reconstructions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from fastle.checkpoint import read_run_config
from fastle.config import ConfigError, DataConfig
from fastle.data import decode_files
from fastle.machine import pick_device
from fastle.method.model import Autoencoder
from fastle.method.pretrained import find_model, is_saved_model
from fastle.training.evaluate import reconstruction_rows
from fastle.training.report import save_grid

from .cli import check_output


def run(flags: argparse.Namespace, console: Console) -> None:
    """Writes the picture that the flags ask for."""
    device = pick_device(flags.device or "auto", console)
    _reconstruct(flags.model, flags.images, Path(flags.output), device, console)


def _reconstruct(name: str, images: list[str], output: Path, device: torch.device, console: Console) -> None:
    _check_output(output, [Path(image) for image in images])
    path = find_model(name)
    if is_saved_model(path):
        model, hole_ratio = Autoencoder.from_pretrained(path, device), None
        data = DataConfig(dataset="folder", size=model.config.size, channels=model.config.channels)
    else:
        config = read_run_config(path)
        model, hole_ratio = Autoencoder.from_pretrained(path, device), config.objective.hole_ratio
        data = config.data
    batch = decode_files(data, [Path(image) for image in images]).to(device)
    save_grid(output, reconstruction_rows(model, batch, hole_ratio))
    console.print(f"written to {output}", highlight=False, markup=False, soft_wrap=True)


def _check_output(output: Path, images: list[Path]) -> None:
    """Raises ConfigError if a picture cannot go to `output`, or would take the place of one of the images."""
    for image in images:
        if output.exists() and image.exists() and output.samefile(image):
            raise ConfigError(f"-o {output} is one of the images, which it would overwrite: give another name")
    check_output(output, "the picture is a PNG", ".png")
