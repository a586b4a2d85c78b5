"""Trains on a dataset of one's own: anything with a length and an index will do.

python examples/own_dataset.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastle


class Ripples(Dataset[tuple[Tensor, float]]):
    """Colour images (3, 32, 32) of waves in random directions, each with its angle. Yours may read from anywhere."""

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        # the same image at each reading, so that a run that goes on sees what it would have seen without a stop
        generator = torch.Generator().manual_seed(index)
        angle, *phases = (2 * math.pi * torch.rand(4, generator=generator)).tolist()
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        along = 0.4 * (x * math.cos(angle) + y * math.sin(angle))
        return torch.stack([0.5 + 0.5 * torch.sin(along + phase) for phase in phases]), angle


def main(run: str | Path = "runs/ripples", **settings: Any) -> fastle.Result:
    """Trains, or goes on where the last call stopped, and returns the model with its metrics."""
    return fastle.fit(
        data=Ripples(),
        run=run,
        on_report=lambda row, model: print(f"step {row['step']}: {row['valid_psnr']:.2f} dB"),
        **({"size": 32, "steps": 400} | settings),
    )


if __name__ == "__main__":
    result = main()
    image, _ = Ripples()[7]
    reconstruction = result.model(image[None])
    print(f"{result.run} holds the run; image 7 is off by {(reconstruction - image).abs().mean():.3f} on average")
