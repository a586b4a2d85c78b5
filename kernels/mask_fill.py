"""Fill a rectangle of each image with that image's own mean, channel by channel.

y = m inside the rectangle and x outside it        m = Σ x / (H·W), over the whole channel
∂/∂x = (G outside, 0 inside) + Σ_inside G / (H·W)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .images import Images, as_list, empty_like, per_image, to_compute_dtype, why_not_triton
from .impl import HAS_TRITON, Impl, choose
from .linear import linear_operator

mask_fill_triton: Any = None
if HAS_TRITON:
    from . import mask_fill_triton


# from this many values in an image on, one slice for each image is faster than one mask (measured on a CPU)
MIN_SLICED = 8192


@overload
def mask_fill(images: Tensor, top: Tensor, left: Tensor, height: int, width: int, *, impl: Impl = "auto") -> Tensor: ...
@overload
def mask_fill(
    images: Sequence[Tensor], top: Tensor, left: Tensor, height: int, width: int, *, impl: Impl = "auto"
) -> tuple[Tensor, ...]: ...
def mask_fill(
    images: Images, top: Tensor, left: Tensor, height: int, width: int, *, impl: Impl = "auto"
) -> Tensor | tuple[Tensor, ...]:
    """Each image with the rectangle (top, left, height, width) replaced by its per-channel mean over the whole image.

    Args:
        images: (B, C, H, W), floating, or uint8, which is scaled to [0, 1] in fp32; or a sequence of such batches with
            the same B, H and W, which get the same rectangles.
        top, left: (B,) integers on the images' device, in pixels.
        height, width: Size of the rectangle in pixels, ≥ 0; the part outside the image is ignored.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.

    Returns:
        (B, C, H, W) in the images' dtype and layout (contiguous or channels-last); a tuple of them for a sequence.
        Differentiable with respect to floating images. The same input gives the same bits every time.

    Raises:
        ValueError: Arguments of the wrong shape, dtype or device, a negative size, or an impl that cannot be had.
    """
    batches = as_list("mask_fill", images)
    top = per_image("mask_fill", "top", top, batches[0])
    left = per_image("mask_fill", "left", left, batches[0])
    if height < 0 or width < 0:
        raise ValueError(f"mask_fill: height and width must be at least 0, not {height} and {width}")
    chosen = choose("mask_fill", impl, batches[0].device, why_not_triton(batches))
    filled = _operator(batches, top, left, height, width, chosen)
    return filled[0] if isinstance(images, Tensor) else tuple(filled)


def rectangle(top: Tensor, left: Tensor, height: int, width: int, size: Sequence[int]) -> Tensor:
    """(B, 1, H, W) bool, True inside the rectangles of images of `size` (H, W); top and left are (B,)."""
    row = torch.arange(size[0], device=top.device)
    column = torch.arange(size[1], device=top.device)
    rows = (row >= top[:, None]) & (row < top[:, None] + height)  # [B, H]
    columns = (column >= left[:, None]) & (column < left[:, None] + width)  # [B, W]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _forward(images: list[Tensor], top: Tensor, left: Tensor, height: int, width: int, impl: str) -> list[Tensor]:
    if impl == "triton":
        return mask_fill_triton.fill(images, top, left, height, width, adjoint=False)
    rectangles = _rectangles(top, left, height, width, images[0])
    return [_fill(image, rectangles) for image in images]


def _adjoint(gradients: list[Tensor], top: Tensor, left: Tensor, height: int, width: int, impl: str) -> list[Tensor]:
    if impl == "triton":
        return mask_fill_triton.fill(gradients, top, left, height, width, adjoint=True)
    rectangles = _rectangles(top, left, height, width, gradients[0])
    return [_fill_adjoint(gradient, rectangles) for gradient in gradients]


_operator = linear_operator(
    "mask_fill",
    "Tensor top, Tensor left, int height, int width, str impl",
    forward=_forward,
    adjoint=_adjoint,
    empty=lambda image, *_: empty_like(image),
    empty_adjoint=lambda gradient, *_: empty_like(gradient),
)

# the rectangles of a batch: one mask, or slices of rows and columns for each image
Rectangles = Tensor | list[tuple[slice, slice]]


def _rectangles(top: Tensor, left: Tensor, height: int, width: int, image: Tensor) -> Rectangles:
    # reading the corners would wait for a GPU, and slices do not pay for small images
    if image.device.type != "cpu" or image.shape[1:].numel() < MIN_SLICED:
        return rectangle(top, left, height, width, image.shape[2:])
    return [
        (slice(max(y, 0), max(y + height, 0)), slice(max(x, 0), max(x + width, 0)))
        for y, x in zip(top.tolist(), left.tolist(), strict=True)
    ]


def _fill(image: Tensor, rectangles: Rectangles) -> Tensor:
    pixels = to_compute_dtype(image) if image.dtype == torch.uint8 else image
    # torch sums bf16 and fp16 in fp32
    mean = pixels.mean((2, 3), keepdim=True)
    if isinstance(rectangles, Tensor):
        return torch.where(rectangles, mean, pixels)
    filled = pixels.clone() if pixels is image else pixels
    for b, (rows, columns) in enumerate(rectangles):
        filled[b, :, rows, columns] = mean[b]
    return filled


def _fill_adjoint(gradient: Tensor, rectangles: Rectangles) -> Tensor:
    values = to_compute_dtype(gradient)
    if isinstance(rectangles, Tensor):
        mean = torch.where(rectangles, values, 0).mean((2, 3), keepdim=True)
        return torch.where(rectangles, mean, values + mean).to(gradient.dtype)
    pixels = gradient.shape[2] * gradient.shape[3]
    sums = [values[b, :, rows, columns].sum((1, 2)) for b, (rows, columns) in enumerate(rectangles)]
    mean = torch.stack(sums)[:, :, None, None] / pixels if sums else values.new_zeros(0, 1, 1, 1)
    result = values + mean
    for b, (rows, columns) in enumerate(rectangles):
        result[b, :, rows, columns] = mean[b]
    return result.to(gradient.dtype)
