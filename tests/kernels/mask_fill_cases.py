"""Rectangles, and the formula of mask_fill as loops over images and channels in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fastle.kernels.mask_fill import mask_fill, rectangle
from tests.kernels import views
from tests.kernels.views import DEVICE


def inside(top: int, left: int, box: tuple[int, int]) -> tuple[slice, slice]:
    """The rectangle as slices, cut off at the first row and column."""
    return slice(max(top, 0), max(top + box[0], 0)), slice(max(left, 0), max(left + box[1], 0))


def filled(images: Tensor, corners_B2: Tensor, box: tuple[int, int]) -> Tensor:
    results = images.clone()
    for b, (top, left) in enumerate(corners_B2.tolist()):
        for c in range(images.shape[1]):
            results[b, c][inside(top, left, box)] = images[b, c].sum() / images[b, c].numel()
    return results


def filled_adjoint(gradient: Tensor, corners_B2: Tensor, box: tuple[int, int]) -> Tensor:
    """The transpose of `filled`."""
    results = gradient.clone()
    for b, (top, left) in enumerate(corners_B2.tolist()):
        for c in range(gradient.shape[1]):
            within = inside(top, left, box)
            results[b, c][within] = 0
            results[b, c] += gradient[b, c][within].sum() / gradient[b, c].numel()
    return results


def at_the_corners(batch: int, size: tuple[int, int], box: tuple[int, int]) -> Tensor:
    """Corners (B, 2): the first four put the rectangle at the image's corners, the others anywhere."""
    generator = Generator().manual_seed(1)
    bottom, right = size[0] - box[0], size[1] - box[1]
    corners_B2 = torch.stack([torch.randint(n + 1, (batch,), generator=generator) for n in (bottom, right)], 1)
    for b, corner in enumerate([(bottom, right), (0, 0), (bottom, 0), (0, right)][:batch]):
        corners_B2[b] = torch.tensor(corner)
    return corners_B2


def beyond(size: tuple[int, int], box: tuple[int, int]) -> Tensor:
    """Corners (7, 2) of rectangles across each edge and two corners, and far from the image."""
    (h, w), (bh, bw) = size, box
    return torch.tensor(
        [(-1, 1), (1, 1 - bw), (h - 1, 1), (1, w - 1), (1 - bh, 1 - bw), (h - 1, w - 1), (-bh - 3, w + 5)]
    )


def covered(corners_B2: Tensor, box: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return rectangle(corners_B2[:, 0], corners_B2[:, 1], *box, size)


def applied(corners_B2: Tensor, box: tuple[int, int], **options: Any) -> Callable[[Any], Any]:
    top, left = corners_B2.T.contiguous().to(DEVICE)
    return lambda images: mask_fill(images, top, left, *box, **options)


def check(images: Tensor | Sequence[Tensor], corners_B2: Tensor, box: tuple[int, int], **options: Any) -> None:
    views.check(
        applied(corners_B2, box, **options),
        images,
        lambda x: filled(x, corners_B2, box),
        lambda gradient: filled_adjoint(gradient, corners_B2, box),
        options.get("impl", "auto"),
    )
