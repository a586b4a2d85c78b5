"""fastle eval: PSNR and SSIM of a model over a run's whole test split, or over a folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table

from fastle.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, read_run_config
from fastle.config import ConfigError, DataConfig
from fastle.data import IN_MEMORY, Images, open_images, open_tree
from fastle.files import write_atomic
from fastle.machine import pick_device
from fastle.method.model import Autoencoder
from fastle.method.pretrained import hole_ratio_of, is_saved_model, model_of_run
from fastle.training.evaluate import Metrics, evaluate
from fastle.training.loop import make_loading

from .cli import Output
from .models import Loaded, load_model


def run(flags: argparse.Namespace, console: Output) -> None:
    """Measures the model that the flags name; the figures of a run are written into it."""
    device = pick_device(flags.device or "auto", console)
    loaded, checkpoint = _load(flags.model, flags.data is not None, flags.weights or "model", device, console)
    images = _open(loaded.data, flags.data, device, console)
    # without a terminal, rich would leave a blank line where the bar was
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(images))
        figures = evaluate(
            loaded.model,
            images,
            hole_ratio=hole_ratio_of(loaded.path),
            device=device,
            perceptual=flags.perceptual,
            progress=lambda seen: progress.update(task, completed=seen),
        )
    _report(loaded.path, checkpoint, figures, len(images), flags.data, flags.weights or "model", console)


def _load(
    name: str, with_data: bool, weights: str, device: torch.device, console: Output
) -> tuple[Loaded, Checkpoint | None]:
    """The model to measure, and its checkpoint if it is a run's; into what is no run, no figures are written."""
    path = Path(name).expanduser()
    if path.is_dir() and not is_saved_model(path):
        config = read_run_config(path)
        model, checkpoint, remark = _pretrained(path, device, weights)
        if remark:
            console.say(remark)
        return Loaded(model, path, config, config.data), checkpoint
    if not with_data:
        raise ConfigError(
            f"{name} is not a run, and only a run knows its test split: give one, or --data DIR to measure on"
        )
    return load_model(name, device, weights), None


def _open(config: DataConfig, data: str | None, device: torch.device, console: Output) -> Images:
    if data is not None:
        return open_tree(config, Path(data), make_loading("auto", "none", device, console))
    if config.dataset in IN_MEMORY:
        return open_images(config, "test")
    return open_images(config, "test", make_loading("auto", "none", device, console))


def _report(
    run: Path,
    checkpoint: Checkpoint | None,
    figures: dict[str, Metrics],
    count: int,
    data: str | None,
    weights: str,
    console: Output,
) -> None:
    """Prints the figures, and writes those of a run."""
    source = "test split" if data is None else str(Path(data).absolute())
    if not all(math.isfinite(value) for values in figures.values() for value in values.values()):
        measured = run if checkpoint is None else checkpoint.path
        raise CheckpointError(f"{measured}: its reconstructions are not finite, though its weights are")
    step = "" if checkpoint is None else f", step {checkpoint.step}"
    console.say(f"{count:,} images of {source}{step}")
    console.print(_figures_table(figures))
    if checkpoint is None:
        return
    result = {
        "run": str(run),
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "weights": weights,
        "data": source,
        "images": count,
        **figures,
    }
    label = "test" if data is None else f"data-{folder_label(Path(data))}"
    output = run / f"eval-{label if weights == 'model' else f'{label}-{weights}'}.json"
    # the figures are on the screen before a full disk can lose them
    write_atomic(output, json.dumps(result, indent=2).encode() + b"\n")
    console.say(f"written to {output}")


def _pretrained(run: Path, device: torch.device, weights: str) -> tuple[Autoencoder, Checkpoint, str | None]:
    """As `model_of_run`, which is called again if a run that is training deletes the checkpoint meanwhile."""
    while True:
        newest = latest_checkpoint(run)
        try:
            return model_of_run(run, device, weights)
        except CheckpointError:
            if latest_checkpoint(run) == newest:
                raise


def folder_label(folder: Path) -> str:
    """The name of a folder and a digest of its path, which tells A/test from B/test."""
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
