"""The peers of fastle's operators: what people run today.

    naive                   SIGReg with every (N, M, K) tensor, as LeJEPA's public code computes it
    chunked                 the same, 64 slices at a time, each part checkpointed
    grid_sample             crops; the coordinates are computed from the boxes in each call, in fp32
    roi_align               crops by torchvision's, with boxes that put its samples where aligned corners are
    eager                   holes and masks with the tensor operations that one would write

Peers of crops compute in fp32: they get images of other types cast to fp32, and their results are cast back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from fastle.kernels import reference
from fastle.training.plain_step import fill_with_mean, grid_crop

KNOTS, T_MAX = 17, 3.0
CHUNK = 64  # slices

Tensors: TypeAlias = tuple[Tensor, ...]
HeightWidth: TypeAlias = tuple[int, int]  # rows, columns
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function under torch.compile, with static shapes."""
    # the whole graph or an error: a silent fallback would be timed as if it were compiled
    return cast(F, torch.compile(function, dynamic=False, fullgraph=True))


def naive_sigreg(z: Tensor, slices: Tensor) -> Tensor:
    """The loss, a scalar in fp32, of samples (..., N, D) on slices (D, M)."""
    return reference.sigreg(z.float(), slices, t_max=T_MAX, knots=KNOTS).mean()


def chunked_sigreg(z: Tensor, slices: Tensor) -> Tensor:
    """`naive_sigreg`, `CHUNK` slices at a time; the backward computes each part again."""

    def part_sum(z: Tensor, part: Tensor) -> Tensor:
        return reference.sigreg(z, part, t_max=T_MAX, knots=KNOTS).sum()

    z = z.float()
    # nothing here is random, and a CUDA graph must not read a generator's state
    sums = [
        checkpoint(part_sum, z, part, use_reentrant=False, preserve_rng_state=False)
        for part in slices.split(CHUNK, dim=1)
    ]
    return torch.stack(sums).sum() / (math.prod(z.shape[:-2]) * slices.shape[1])


def grid_crops(images: Tensors, top: Tensor, left: Tensor, *, box: HeightWidth, out: HeightWidth) -> Tensors:
    """A box of each image, by grid_sample; the grid is computed again for each view, as eager code does."""
    return tuple(grid_crop(x.float(), top, left, box, out).to(x.dtype) for x in images)


def roi_crops(images: Tensors, top: Tensor, left: Tensor, *, box: HeightWidth, out: HeightWidth) -> Tensors:
    """The same by torchvision's roi_align, with one sample in each bin."""
    regions = align_corners_regions(top, left, box, out)
    return tuple(roi_align(x.float(), regions, out, sampling_ratio=1, aligned=True).to(x.dtype) for x in images)


def align_corners_regions(top: Tensor, left: Tensor, box: HeightWidth, out: HeightWidth) -> Tensor:
    """(B, 5) regions (sample, x, y, x, y) with which roi_align reads what a crop with aligned corners reads.

    roi_align divides the interval from `low` to `high` into n equal bins, reads each at its centre, and puts the centre
    of the first pixel at 1/2. A bin is therefore as large as the step (side − 1)/(n − 1), and half a bin and half a
    pixel lie before the first sample:

        low = corner + 1/2 − step/2        high = low + n·step
    """
    step = [(side - 1) / max(n - 1, 1) for side, n in zip(box, out, strict=True)]
    y, x = (corner + 0.5 - s / 2 for corner, s in zip((top, left), step, strict=True))
    samples = torch.arange(len(top), device=top.device)
    return torch.stack((samples, x, y, x + out[1] * step[1], y + out[0] * step[0]), dim=1)


def eager_holes(images: Tensors, top: Tensor, left: Tensor, *, hole: HeightWidth) -> Tensors:
    """Each image with a hole, filled with the mean of each channel."""
    return tuple(fill_with_mean(x, top, left, hole) for x in images)


def eager_masks(images: Tensors, top: Tensor, left: Tensor, *, ratio: float) -> Tensors:
    """Images with a share of the pixels set to zero; all views have the same mask, which is drawn in each call."""
    batch, _, height, width = images[0].shape
    order = torch.rand(batch, height * width, device=top.device).argsort(1)
    keep = (order >= int(ratio * height * width)).view(batch, 1, height, width)
    return tuple(x * keep for x in images)
