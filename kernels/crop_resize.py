"""Crop a box out of each image and resize it, bilinear with corners aligned, no antialiasing.

    out[i, j] = Σ_rc  R_ir · crop[r, c] · R_jc          R (out, side): rows of two weights that sum to 1
    output pixel i reads the crop at i·(side − 1)/(out − 1)

The side is one number for the batch, so that R is one constant matrix: two small products replace a sampling grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_resize(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """The square box (top, left, side) of each image, resized to the image's own height and width.

    Args:
        images: (B, C, H, W), floating.
        top, left: (B,) integers, 0 ≤ top ≤ H − side and 0 ≤ left ≤ W − side. Not checked: the check would wait for
            the device.
        side: pixels, 1 ≤ side ≤ min(H, W).

    Returns:
        (B, C, H, W) in the images' dtype; differentiable with respect to `images`.

    Raises:
        ValueError: a side outside its range.
    """
    height, width = images.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"a box of side {side} does not fit an image of {height}x{width}")
    offsets = torch.arange(side, device=images.device)
    rows = (top[:, None] + offsets)[:, None, :, None]
    columns = (left[:, None] + offsets)[:, None, None, :]
    batch, channels = (torch.arange(n, device=images.device) for n in images.shape[:2])
    crop = images[batch[:, None, None, None], channels[:, None, None], rows, columns]  # [B, C, side, side]
    vertical = interpolation_matrix(side, height, crop)
    horizontal = vertical if width == height else interpolation_matrix(side, width, crop)
    # bf16 interpolation weights would put the crop off by a visible part of a pixel
    with torch.autocast(images.device.type, enabled=False):
        return (vertical @ crop.to(vertical.dtype) @ horizontal.T).to(images.dtype)


def interpolation_matrix(side: int, out: int, like: Tensor) -> Tensor:
    """R (out, side) of the module's formula, on the device of `like`, in fp32 (float64 for float64)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    position = torch.linspace(0, side - 1, out, device=like.device, dtype=dtype)
    pixel = torch.arange(side, device=like.device, dtype=dtype)
    # the hat function: 1 at its own pixel, 0 at the neighbours
    return (1 - (position[:, None] - pixel).abs()).clamp_min(0)
