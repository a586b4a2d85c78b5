"""fastle interpolate: a picture of the way from one image to another, through the latents and through the pixels."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastle.data import decode_files
from fastle.machine import pick_device
from fastle.method.model import unit_range
from fastle.training.loop import make_loading
from fastle.training.report import save_grid

from .cli import Output
from .models import load_model
from .outputs import check_output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the picture that the flags ask for."""
    ends, output = [Path(flags.first), Path(flags.second)], Path(flags.output)
    check_output(output, (".png",), ends)
    device = pick_device(flags.device or "auto", console)
    _interpolate(flags.model, ends, output, flags.steps, device, flags.weights, console)


@torch.no_grad()
def _interpolate(
    name: str,
    ends: list[Path],
    output: Path,
    steps: int,
    device: torch.device,
    weights: str | None,
    console: Output,
) -> None:
    loaded = load_model(name, device, weights)
    batch = decode_files(loaded.data, ends, make_loading("auto", "none", device, console))
    images = unit_range(batch.to(device))
    share = torch.linspace(0, 1, steps, device=device)
    z = _between(loaded.model.encode(images), share)
    save_grid(output, [("latents", loaded.model.decode(z)), ("pixels", _between(images, share))])
    console.say(f"written to {output}")


def _between(ends: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The straight line from the first to the second of two tensors, (2, ...) → (steps, ...)."""
    first, second = ends
    return torch.lerp(first, second, share.view(-1, *(1,) * first.ndim))
