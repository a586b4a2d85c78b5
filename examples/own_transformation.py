"""Judges the images through a transformation of one's own: here a random rotation and a random brightness.

python examples/own_transformation.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import fastle


@dataclass(frozen=True)
class Turned:
    """Each image turned by up to `degrees`, and made darker or brighter. A run knows a dataclass by its fields."""

    degrees: float
    # whole images are compared too
    full_view = True

    def draw(self, shape: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor]:
        """The angle, in radians, and the brightness of each image: all random numbers come from the generator."""
        angle, brightness = torch.rand(2, shape[0], generator=generator, device=generator.device) * 2 - 1
        return math.radians(self.degrees) * angle, 1 + 0.3 * brightness

    def views(self, images: Sequence[Tensor], drawn: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
        """One view of each batch, images and reconstructions: the same angles for all."""
        angle, brightness = drawn
        zero = torch.zeros_like(angle)
        rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images[0].shape), align_corners=False)
        scale = brightness[:, None, None, None]
        return [(scale * F.grid_sample(image, grid, align_corners=False),) for image in images]


def main(run: str | Path = "runs/turned", **settings: Any) -> fastle.Result:
    """Trains on drawn shapes, or goes on where the last call stopped."""
    return fastle.fit("shapes", transform=Turned(degrees=30), run=run, **settings)


if __name__ == "__main__":
    print(f"{main().metrics[-1]['valid_psnr']:.2f} dB")
