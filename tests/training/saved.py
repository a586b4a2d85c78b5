"""A small run directory, written without the loop: as it is saved, or changed on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastle.checkpoint import save_checkpoint
from fastle.presets import make_config
from fastle.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = make_config(
    "shapes", size=16, hidden=4, map_channels=4, latent=6, batch_size=4, slices=8, steps=9, precision="fp32"
)
Sections = dict[str, dict[str, Tensor]]


def train_two_steps() -> Trainer:
    trainer = Trainer(CONFIG, CPU)
    for _ in range(2):
        trainer(torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8))
    return trainer


def save(
    run: Path, trainer: Trainer, change: Callable[[Sections], object] = lambda sections: None, step: int = 2
) -> Path:
    """Saves config.json and a checkpoint, after its tensors were changed, and returns the path of the checkpoint."""
    sections = {name: dict(tensors) for name, tensors in trainer.state().items()}
    change(sections)
    config = trainer.config.to_dict()
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    return save_checkpoint(run, step, sections, {"step": step, "train_images": 5, "config": config})
