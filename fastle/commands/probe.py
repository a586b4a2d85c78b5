"""fastle probe: how well classes can be read from a model's latents."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table

from fastle.data.labelled import open_labelled
from fastle.files import write_atomic
from fastle.machine import pick_device
from fastle.training.loop import make_loading
from fastle.training.probe import probe

from .cli import Output
from .eval import folder_label
from .models import load_model


def run(flags: argparse.Namespace, console: Output) -> None:
    """Measures the model that the flags name; the figures of a run are written into it."""
    device = pick_device(flags.device or "auto", console)
    _probe(flags.model, Path(flags.data), flags.weights or "model", device, console)


def _probe(name: str, data: Path, weights: str, device: torch.device, console: Output) -> None:
    loaded = load_model(name, device, weights)
    train, test, classes = open_labelled(loaded.data, data, make_loading("auto", "none", device, console))
    count = len(train.images) + len(test.images)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=count)
        figures = probe(loaded.model, train, test, device=device, progress=lambda seen: progress.advance(task, seen))
    share = float(test.labels.bincount().max()) / len(test.images)
    console.say(f"{len(classes)} classes, {len(train.images):,} images to train, {len(test.images):,} to test")
    console.say(f"the largest class is {share:.1%} of those to test")
    table = Table("from", "numbers", "linear", "k-NN")
    for side, accuracies in figures.items():
        table.add_row(side, f"{accuracies.features:,}", f"{accuracies.linear:.1%}", f"{accuracies.knn:.1%}")
    console.print(table)
    if loaded.config is None or not loaded.path.is_dir():
        return
    result = {
        "run": str(loaded.path),
        "weights": weights,
        "data": str(data.absolute()),
        "classes": len(classes),
        "train_images": len(train.images),
        "test_images": len(test.images),
        "largest_class": share,
        **{side.replace(" ", "_"): asdict(accuracies) for side, accuracies in figures.items()},
    }
    output = loaded.path / f"probe-{folder_label(data)}{'' if weights == 'model' else f'-{weights}'}.json"
    write_atomic(output, json.dumps(result, indent=2).encode() + b"\n")
    console.say(f"written to {output}")
