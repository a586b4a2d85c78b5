"""The shapes dataset: one disc, ring or rectangle of grey value 0.3 to 1 on black, generated rather than read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fastle.folders import SPLITS, Split
from fastle.lengths import TRAIN_IMAGES

from .images import ArrayImages

SIZES: dict[Split, int] = {"train": TRAIN_IMAGES["shapes"], "valid": 1_000, "test": 2_000}
CHUNK = 500  # images rendered at once


def make_shapes(split: Split, size: int) -> ArrayImages:
    """Renders the shapes of a split: uint8 (N, 1, size, size), with antialiased edges.

    The split alone determines the shapes, which are always the same; another `size` shows them at another resolution.
    Every shape keeps at least one black pixel from the border.

    Args:
        split: "train" has 12,000 images, "valid" 1,000 and "test" 2,000.
        size: Height and width in pixels, at least 8.
    """
    # the legacy generator, because NumPy guarantees that its stream never changes
    uniform = np.random.RandomState([28, SPLITS.index(split)]).random_sample((SIZES[split], 7))
    images = np.concatenate([_render(chunk, size) for chunk in np.split(uniform, len(uniform) // CHUNK)])
    return ArrayImages(torch.from_numpy(images).unsqueeze(1))


def _render(uniform: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Renders uint8 (N, size, size) from (N, 7) in [0, 1): kind, half extents, centre, thickness, grey value."""
    kind, a, b, x, y, thickness, grey = uniform.astype(np.float32).T[:, :, None, None]
    kind = np.floor(3 * kind)
    half_x = size * (1 / 6 + a * (3 / 8 - 1 / 6))
    half_y = np.where(kind == 2, size * (1 / 6 + b * (3 / 8 - 1 / 6)), half_x)
    pixel = np.arange(size, dtype=np.float32) + 0.5
    # (N, 1, size) and (N, size, 1): distances of the pixels' centres from the shape's
    dx = np.abs(pixel - (1 + half_x + x * (size - 2 - 2 * half_x)))
    dy = np.abs(pixel[:, None] - (1 + half_y + y * (size - 2 - 2 * half_y)))

    # signed distances from the edge, negative inside; coverage falls from 1 to 0 within one pixel of it
    radius = np.sqrt(dx**2 + dy**2)
    half_ring = half_x * (1 + thickness) / 6
    disc = radius - half_x
    ring = np.abs(radius - (half_x - half_ring)) - half_ring
    rectangle = np.maximum(dx - half_x, dy - half_y)
    edge = np.where(kind == 0, disc, np.where(kind == 1, ring, rectangle))
    coverage = np.clip(0.5 - edge, 0, 1)
    return np.rint(255 * (0.3 + 0.7 * grey) * coverage).astype(np.uint8)
