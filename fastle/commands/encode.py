"""fastle encode: the latents of images, in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress

from fastle.config import ConfigError, DataConfig
from fastle.data import Images, decode_files, open_tree
from fastle.data.images import ArrayImages
from fastle.data.latents import ENDINGS, check_latents_file, names_file, writing_latents
from fastle.folders import find_shards
from fastle.machine import pick_device
from fastle.training.loop import make_loading

from .cli import Output
from .models import load_model
from .outputs import check_output

BATCH = 250


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the latents that the flags ask for."""
    images, output = Path(flags.images), Path(flags.output)
    check_output(output, ENDINGS, [images])
    device = pick_device(flags.device or "auto", console)
    _encode(flags.model, images, output, device, flags.weights, console)


@torch.no_grad()
def _encode(name: str, path: Path, output: Path, device: torch.device, weights: str | None, console: Output) -> None:
    if not path.exists() and not find_shards(path):
        raise ConfigError(f"{path}: no such file or folder: give an image, or a folder of images")
    loaded = load_model(name, device, weights)
    images, names = _open(loaded.data, path, device, console)
    check_latents_file(output, names)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        writing_latents(output, names, loaded.model.config.latent_shape) as write,
    ):
        for start in progress.track(range(0, len(images), BATCH), description="encoding"):
            batch = images.batch(range(start, min(start + BATCH, len(images)))).to(device)
            write(loaded.model.encode(batch))
    shape = " x ".join(map(str, loaded.model.config.latent_shape))
    beside = names_file(output)
    named = 'the column "name"' if beside is None else str(beside)
    for line in (
        f"{len(images):,} latents of {shape}, sorted by the paths of their images, which are in {named}",
        f"written to {output}",
    ):
        console.say(line)


def _open(config: DataConfig, path: Path, device: torch.device, console: Output) -> tuple[Images, list[str]]:
    """The images of a file, a folder or shards, and their names: below the folder, or with their shards."""
    shards, loading = find_shards(path), make_loading("auto", "none", device, console)
    if not path.is_dir() and not shards:
        return ArrayImages(decode_files(config, [path], loading)), [path.name]
    images = open_tree(config, path, loading)
    if shards:
        return images, [file.name for file in images.files]
    return images, [Path(file.name).relative_to(path).as_posix() for file in images.files]
