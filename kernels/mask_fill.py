"""Fill a rectangle of each image with that image's own mean, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_fill(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Each image with the rectangle (top, left, height, width) replaced by its per-channel mean over the whole image.

    Args:
        images: (B, C, H, W), floating.
        top, left: (B,) integers.
        height, width: the rectangle, in pixels; what lies outside the image is ignored.

    Returns:
        (B, C, H, W) in the images' dtype; differentiable with respect to `images`.
    """
    inside = rectangle(top, left, height, width, images.shape[-2:])
    return torch.where(inside, images.mean(dim=(-2, -1), keepdim=True), images)


def rectangle(top: Tensor, left: Tensor, height: int, width: int, size: tuple[int, ...]) -> Tensor:
    """(B, 1, H, W) bool: True inside the rectangle of each image of `size` (H, W)."""
    row = torch.arange(size[0], device=top.device)
    column = torch.arange(size[1], device=top.device)
    rows = (row >= top[:, None]) & (row < top[:, None] + height)  # [B, H]
    columns = (column >= left[:, None]) & (column < left[:, None] + width)  # [B, W]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
