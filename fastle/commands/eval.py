"""fastle eval: PSNR and SSIM over the whole test split, or over a folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastle.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, read_run_config, write_atomic
from fastle.data import IN_MEMORY, Images, open_images, open_tree
from fastle.machine import pick_device
from fastle.method.model import Autoencoder
from fastle.method.pretrained import of_run
from fastle.training.evaluate import Metrics, evaluate
from fastle.training.loop import make_loading


def run(flags: argparse.Namespace, console: Console) -> None:
    """Measures the run that the flags name, and writes the figures into it."""
    device = pick_device(flags.device or "auto", console)
    _eval(Path(flags.run), flags.data, flags.weights or "model", device, console, perceptual=flags.perceptual)


def _eval(
    run: Path, data: str | None, weights: str, device: torch.device, console: Console, *, perceptual: bool
) -> None:
    config = read_run_config(run)
    model, checkpoint, remark = _pretrained(run, device, weights)
    if remark:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    if data is not None:
        images: Images = open_tree(config.data, Path(data), make_loading("auto", "none", device, console))
    elif config.data.dataset in IN_MEMORY:
        images = open_images(config.data, "test")
    else:
        images = open_images(config.data, "test", make_loading("auto", "none", device, console))
    # of a bar that vanishes, rich leaves a blank line where there is no terminal
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(images))
        figures = evaluate(
            model,
            images,
            hole_ratio=config.objective.hole_ratio,
            device=device,
            perceptual=perceptual,
            progress=lambda seen: progress.update(task, completed=seen),
        )
    source = "test split" if data is None else str(Path(data).absolute())
    step = checkpoint.step
    if not all(math.isfinite(value) for values in figures.values() for value in values.values()):
        raise CheckpointError(f"{checkpoint.path}: its reconstructions are not finite, though its weights are")
    result = {
        "run": str(run),
        "checkpoint": checkpoint.path.name,
        "step": step,
        "weights": weights,
        "data": source,
        "images": len(images),
        **figures,
    }
    console.print(f"{len(images):,} images of {source}, step {step}", highlight=False, markup=False, soft_wrap=True)
    console.print(_figures_table(figures))
    measured = "test" if data is None else f"data-{folder_label(Path(data))}"
    output = run / f"eval-{measured if weights == 'model' else f'{measured}-{weights}'}.json"
    # the figures are on the screen before a full disk can lose them
    write_atomic(output, json.dumps(result, indent=2).encode() + b"\n")
    console.print(f"written to {output}", highlight=False, markup=False, soft_wrap=True)


def _pretrained(run: Path, device: torch.device, weights: str) -> tuple[Autoencoder, Checkpoint, str | None]:
    """See `of_run`; of a run that may be training meanwhile, and then deletes its older checkpoints."""
    while True:
        newest = latest_checkpoint(run)
        try:
            return of_run(run, device, weights)
        except CheckpointError:
            if latest_checkpoint(run) == newest:
                raise


def folder_label(folder: Path) -> str:
    """The name of a folder, and a digest of its path: A/test and B/test have the same name."""
    path = folder.resolve()
    return f"{path.name}-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


def _figures_table(figures: dict[str, Metrics]) -> Table:
    # a line for each figure: side by side they would not fit into a narrow terminal
    table = Table("input", *figures)
    for name in max(figures.values(), key=len):
        table.add_row(name.replace("_", " "), *(_figure(name, values.get(name)) for values in figures.values()))
    return table


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} dB" if "psnr" in name else f"{value:.4f}"
