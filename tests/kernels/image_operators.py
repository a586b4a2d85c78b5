"""Every operator on images in one form, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_channels, mask_patches
from tests.kernels import crop_resize_cases as crops
from tests.kernels import mask_fill_cases as fills
from tests.kernels.views import DEVICE

# 64 patches of 2 px. A permutation of another number walks long cycles, which is slow in Triton's interpreter
SIZE = (8, 32)
BOX = (5, 18)
OUT = (5, 7)
RATIO = 0.4


def some_seeds(number: int, seed: int = 3) -> Tensor:
    """Seeds (number,), the smallest and the largest among them."""
    seeds = torch.randint(2**32, (number,), generator=Generator().manual_seed(seed))
    for i, value in enumerate([2**32 - 1, 0, 2**31, 2**31 - 1][:number]):
        seeds[i] = value
    return seeds.to(DEVICE)


def patch_mask(seeds: Tensor, size: Sequence[int], *, ratio: float, patch: int = 1) -> Tensor:
    """(B, 1, H, W) bool, False where `mask_patches` masks images of `size` (H, W)."""
    ones = torch.ones(len(seeds), 1, *size, device=seeds.device)
    return mask_patches(ones, seeds, ratio=ratio, patch=patch, impl="torch") > 0


def channel_mask(seeds: Tensor, channels: int, *, ratio: float) -> Tensor:
    """(B, C, 1, 1) bool, False where `mask_channels` masks."""
    ones = torch.ones(len(seeds), channels, 1, 1, device=seeds.device)
    return mask_channels(ones, seeds, ratio=ratio, impl="torch") > 0


@dataclass(frozen=True)
class ImageOperator:
    """An operator, the integers (B,) that it takes for each image, and its formula.

    Attributes:
        schema: Its name in torch.ops.fastle.
        call: (images, *integers, impl=...) → results.
        integers: A batch size → the integers by name.
        exact, exact_gradient: (fp64 images or gradients, *integers) → what is expected.
    """

    schema: str
    call: Callable[..., Any]
    integers: Callable[[int], dict[str, Tensor]]
    exact: Callable[..., Tensor]
    exact_gradient: Callable[..., Tensor]

    def bound(self, batch: int, **options: Any) -> Callable[[Any], Any]:
        """The operator as a function of the images alone."""
        integers = [values.to(DEVICE) for values in self.integers(batch).values()]
        return lambda images: self.call(images, *integers, **options)


def _corners(batch: int) -> dict[str, Tensor]:
    boxes_B4 = crops.at_the_corners(batch, SIZE, BOX)
    return {"top": boxes_B4[:, 0], "left": boxes_B4[:, 1]}


def _boxes(batch: int) -> dict[str, Tensor]:
    return dict(
        zip(("top", "left", "height", "width"), crops.of_all_sizes(max(batch, 1), SIZE)[:batch].unbind(1), strict=True)
    )


def _seeds(batch: int) -> dict[str, Tensor]:
    return {"seeds": some_seeds(batch)}


def _box_tensor(top: Tensor, left: Tensor) -> Tensor:
    return torch.cat([torch.stack([top, left], 1), torch.tensor([BOX]).expand(len(top), 2)], 1)


def _patches(x: Tensor, seeds: Tensor) -> Tensor:
    return torch.where(patch_mask(seeds, SIZE, ratio=RATIO, patch=2), x, 0)


def _channels(x: Tensor, seeds: Tensor) -> Tensor:
    return torch.where(channel_mask(seeds, x.shape[1], ratio=RATIO), x, 0)


OPERATORS = {
    "crop_resize": ImageOperator(
        "crop_resize",
        lambda images, top, left, **options: crop_resize(images, top, left, *BOX, **options),
        _corners,
        lambda x, top, left: crops.resized(x, _box_tensor(top, left)),
        lambda g, top, left: crops.resized_adjoint(g, _box_tensor(top, left), SIZE),
    ),
    "crop_resize-sizes": ImageOperator(
        "crop_resize",
        lambda images, *box, **options: crop_resize(images, *box, out_size=OUT, **options),
        _boxes,
        lambda x, *box: crops.resized(x, torch.stack(box, 1), OUT),
        lambda g, *box: crops.resized_adjoint(g, torch.stack(box, 1), SIZE),
    ),
    "mask_fill": ImageOperator(
        "mask_fill",
        lambda images, top, left, **options: mask_fill(images, top, left, *BOX, **options),
        _corners,
        lambda x, top, left: fills.filled(x, torch.stack([top, left], 1), BOX),
        lambda g, top, left: fills.filled_adjoint(g, torch.stack([top, left], 1), BOX),
    ),
    "mask_patches": ImageOperator(
        "random_mask",
        lambda images, seeds, **options: mask_patches(images, seeds, ratio=RATIO, patch=2, **options),
        _seeds,
        _patches,
        _patches,
    ),
    "mask_channels": ImageOperator(
        "random_mask",
        lambda images, seeds, **options: mask_channels(images, seeds, ratio=RATIO, **options),
        _seeds,
        _channels,
        _channels,
    ),
}
every_operator = pytest.mark.parametrize("operator", list(OPERATORS.values()), ids=list(OPERATORS))
