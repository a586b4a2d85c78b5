"""fastle sample: images decoded from latents that are drawn from SIGReg's target, N(0, 1) in each feature."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastle.config import ConfigError
from fastle.machine import pick_device
from fastle.training.report import save_grid

from .cli import Output
from .models import Loaded, load_model
from .outputs import check_output

IN_ROW = 8


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the picture that the flags ask for."""
    output = Path(flags.output)
    check_output(output, (".png",))
    device = pick_device(flags.device or "auto", console)
    loaded = load_model(flags.model, device, flags.weights)
    for line in _caveats(loaded):
        console.say(line)
    _sample(loaded, output, flags.count, flags.seed, device)
    console.say(f"written to {output}")


def _caveats(loaded: Loaded) -> list[str]:
    """What to know about the samples of a model. Raises ConfigError if it was trained without SIGReg."""
    objective = None if loaded.config is None else loaded.config.objective
    if objective is not None and (objective.name == "pixel" or not objective.sigreg_weight):
        raise ConfigError(f"{loaded.path} was trained without SIGReg: nobody knows how its latents are distributed")
    lines = []
    if objective is None:
        lines.append("a saved model does not say how it was trained: without SIGReg, samples mean nothing")
    if loaded.model.config.latent is None:
        lines.append(
            "the latent is spatial, and SIGReg sees each cell by itself: the cells are drawn independently, unlike "
            "those of an image, so samples have texture but no objects"
        )
    return lines


@torch.no_grad()
def _sample(loaded: Loaded, output: Path, count: int, seed: int, device: torch.device) -> None:
    # on the CPU, so that a seed means the same everywhere
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for start in range(0, count, IN_ROW):
        end = min(start + IN_ROW, count)
        z = torch.randn(end - start, *loaded.model.config.latent_shape, generator=generator)
        rows.append((f"{start + 1} to {end}", loaded.model.decode(z.to(device))))
    save_grid(output, rows)
