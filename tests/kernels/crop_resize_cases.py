"""Boxes and the formula of crop_resize in fp64: R_y · box · R_xᵀ for each sample, with R of quotients of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from fastle.kernels.crop_resize import crop_resize
from tests.kernels import views
from tests.kernels.views import DEVICE

Out = int | tuple[int, int] | None


@cache
def weights(size: int, out: int) -> Tensor:
    """(out, size): row i reads the box at i·(size − 1)/(out − 1)."""
    rows = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        whole, rest = divmod(i * (size - 1), max(out - 1, 1))
        rows[i, whole] = 1 - rest / max(out - 1, 1)
        if rest:
            rows[i, whole + 1] = rest / (out - 1)
    return rows


def inside(box: Tensor) -> tuple[slice, slice, slice]:
    """The box as an index into one image (C, H, W)."""
    top, left, height, width = box.tolist()
    return slice(None), slice(top, top + height), slice(left, left + width)


def output_size(images: Tensor, out: Out) -> tuple[int, int]:
    if out is None:
        return images.shape[2], images.shape[3]
    return (out, out) if isinstance(out, int) else out


def resized(images: Tensor, boxes_B4: Tensor, out: Out = None) -> Tensor:
    oh, ow = output_size(images, out)
    results = images.new_zeros(*images.shape[:2], oh, ow)
    for b, box in enumerate(boxes_B4):
        crop = images[b][inside(box)]
        results[b] = weights(crop.shape[1], oh) @ crop @ weights(crop.shape[2], ow).T
    return results


def resized_adjoint(gradient: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `resized`."""
    results = gradient.new_zeros(*gradient.shape[:2], *size)
    for b, box in enumerate(boxes_B4):
        height, width = (int(x) for x in box[2:])
        into_y, into_x = weights(height, gradient.shape[2]), weights(width, gradient.shape[3])
        results[b][inside(box)] = into_y.T @ gradient[b] @ into_x
    return results


def at_the_corners(batch: int, size: tuple[int, int], box: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of one size: the first four at the corners, the others anywhere."""
    generator = Generator().manual_seed(1)
    bottom, right = size[0] - box[0], size[1] - box[1]
    boxes_B4 = torch.empty(batch, 4, dtype=torch.int64)
    boxes_B4[:, 0] = torch.randint(bottom + 1, (batch,), generator=generator)
    boxes_B4[:, 1] = torch.randint(right + 1, (batch,), generator=generator)
    boxes_B4[:, 2], boxes_B4[:, 3] = box
    for b, corner in enumerate([(bottom, right), (0, 0), (bottom, 0), (0, right)][:batch]):
        boxes_B4[b, :2] = torch.tensor(corner)
    return boxes_B4


def of_all_sizes(batch: int, size: tuple[int, int]) -> Tensor:
    """Boxes (B, 4): one pixel, the whole image, then boxes of any size."""
    generator = Generator().manual_seed(2)
    sides = torch.stack([torch.randint(1, n + 1, (batch,), generator=generator) for n in size], 1)
    for b, box in enumerate([(1, 1), size][:batch]):
        sides[b] = torch.tensor(box)
    corners = [
        [int(torch.randint(n - int(side) + 1, (), generator=generator)) for n, side in zip(size, row, strict=True)]
        for row in sides
    ]
    return torch.cat([torch.tensor(corners, dtype=sides.dtype).view(batch, 2), sides], 1)


def applied(boxes_B4: Tensor, tensors: str = "", **options: Any) -> Callable[[Any], Any]:
    """crop_resize with these boxes; `tensors` ("h", "w", "hw") names the sides that are given for each sample."""
    top, left, *sizes = boxes_B4.T.contiguous().to(DEVICE)
    height, width = (sizes[i] if "hw"[i] in tensors else int(boxes_B4[0, 2 + i]) for i in range(2))
    return lambda images: crop_resize(images, top, left, height, width, **options)


def check(images: Tensor | Sequence[Tensor], boxes_B4: Tensor, tensors: str = "", **options: Any) -> None:
    size = images.shape if isinstance(images, Tensor) else images[0].shape
    views.check(
        applied(boxes_B4, tensors, **options),
        images,
        lambda x: resized(x, boxes_B4, options.get("out_size")),
        lambda gradient: resized_adjoint(gradient, boxes_B4, (size[2], size[3])),
        options.get("impl", "auto"),
    )
