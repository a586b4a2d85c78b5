"""What the tests of kernels.random_mask share: seeds, and the operators that have theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from fastle.kernels.random_mask import mask_channels, mask_patches
from tests.kernels.views import DEVICE

# tests that do not ask for other numbers have a power of 4, and at least 64, of patches: permuting few of them, or
# another number, walks long cycles, which takes the interpreter ten times as long

Operator = Callable[..., Any]


def some(number: int, seed: int = 3) -> Tensor:
    """Seeds, the smallest and the largest among them."""
    seeds = torch.randint(2**32, (number,), generator=Generator().manual_seed(seed))
    for i, value in enumerate([2**32 - 1, 0, 2**31, 2**31 - 1][:number]):
        seeds[i] = value
    return seeds.to(DEVICE)


def patches_of(seeds: Tensor, ratio: float, patch: int = 1, **options: Any) -> Operator:
    return lambda images: mask_patches(images, seeds, ratio=ratio, patch=patch, **options)


def channels_of(seeds: Tensor, ratio: float, **options: Any) -> Operator:
    return lambda images: mask_channels(images, seeds, ratio=ratio, **options)
