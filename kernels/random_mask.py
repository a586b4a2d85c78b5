"""Random masks of pixels, patches and channels, computed from one seed for each image and applied in the same pass.

    patches    patch p of P is masked if π(p) < count: exactly `count` are, without sorting or storing anything
    channels   channel c is masked if h(seed, c) < ratio·2³², independently of the others

    h(seed, i)   hash(hash(seed) + (i + 1)·0x9E3779B9)
    hash         twice x ^= x >> 16, x *= 0x045D9F3B; then x ^= x >> 16; all on 32 bits
    π            a Feistel network on numbers of b bits, where b is at least 6 and the fewest bits that hold P. Each of
                 its 8 rounds replaces one half of the bits, the high half first, by its xor with the hash of
                 (the other half xor h(seed, round)). A number that leaves 0..P−1 goes through the network again;
                 so π permutes those P numbers

A mask is a pure function of its seed and the same on every device, so a step draws only B numbers and can replay them.
Source of the permutation: Mitchell et al., "Bandwidth-Optimal Random Shuffling for GPUs" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .images import Images, as_list, empty_like, per_image, to_compute_dtype, why_not_triton
from .impl import HAS_TRITON, Impl, choose
from .linear import linear_operator

random_mask_triton: Any = None
if HAS_TRITON:
    from . import random_mask_triton

# with fewer rounds or bits, permutations of few patches are not equally likely (measured)
ROUNDS, MIN_BITS = 8, 6
WORD = 2**32


@overload
def mask_patches(images: Tensor, seeds: Tensor, *, ratio: float, patch: int = 1, impl: Impl = "auto") -> Tensor: ...
@overload
def mask_patches(
    images: Sequence[Tensor], seeds: Tensor, *, ratio: float, patch: int = 1, impl: Impl = "auto"
) -> tuple[Tensor, ...]: ...
def mask_patches(
    images: Images, seeds: Tensor, *, ratio: float, patch: int = 1, impl: Impl = "auto"
) -> Tensor | tuple[Tensor, ...]:
    """Sets exactly int(ratio · P) of each image's P = H/patch · W/patch patches to 0, in all channels.

    Args:
        images: (B, C, H, W), floating, or uint8, which is scaled to [0, 1] in fp32; or a sequence of such batches with
            the same B, H and W, which get the same masks.
        seeds: (B,) int64 on the images' device, each in [0, 2³²).
        ratio: Share of the patches that are masked, in [0, 1].
        patch: Side of a patch in pixels, a divisor of H and W; 1 masks single pixels.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.

    Returns:
        (B, C, H, W) in the images' dtype and layout (contiguous or channels-last); a tuple of them for a sequence.
        Masked values are 0, also where the image is NaN. Differentiable with respect to floating images.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range, patches do not tile the images, or `impl`
            cannot run here.
    """
    batches = as_list("mask_patches", images)
    count = _count(ratio, batches[0].shape[2:], patch)
    masked = _apply("mask_patches", batches, seeds, count, patch, impl)
    return masked[0] if isinstance(images, Tensor) else tuple(masked)


@overload
def mask_channels(images: Tensor, seeds: Tensor, *, ratio: float, impl: Impl = "auto") -> Tensor: ...
@overload
def mask_channels(
    images: Sequence[Tensor], seeds: Tensor, *, ratio: float, impl: Impl = "auto"
) -> tuple[Tensor, ...]: ...
def mask_channels(images: Images, seeds: Tensor, *, ratio: float, impl: Impl = "auto") -> Tensor | tuple[Tensor, ...]:
    """Sets each channel of each image to 0 with probability `ratio`, independently of the others.

    Arguments, results and errors are those of `mask_patches`.
    """
    batches = as_list("mask_channels", images)
    masked = _apply("mask_channels", batches, seeds, _limit(ratio), 0, impl)
    return masked[0] if isinstance(images, Tensor) else tuple(masked)


def _count(ratio: float, size: Sequence[int], patch: int) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_patches: ratio must be from 0 to 1, not {ratio}")
    check_tiling(size, patch)
    return int(ratio * ((size[0] // patch) * (size[1] // patch)))


def check_tiling(size: Sequence[int], patch: int) -> None:
    """Raises ValueError if square patches of side `patch` do not tile images of `size` (H, W)."""
    height, width = size
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patches of {patch} px do not tile images of {height}x{width}")


def _limit(ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_channels: ratio must be from 0 to 1, not {ratio}")
    return int(ratio * WORD)


def _apply(name: str, batches: list[Tensor], seeds: Tensor, limit: int, patch: int, impl: str) -> list[Tensor]:
    seeds = per_image(name, "seeds", seeds, batches[0])
    if seeds.dtype != torch.int64:
        raise ValueError(f"{name}: seeds must be int64, not {seeds.dtype}")
    return _operator(batches, seeds, limit, patch, choose(name, impl, batches[0].device, why_not_triton(batches)))


def _forward(images: list[Tensor], seeds: Tensor, limit: int, patch: int, impl: str) -> list[Tensor]:
    """Masks `limit` patches of side `patch`; or, if `patch` is 0, channels with probability limit/2³²."""
    if impl == "triton":
        number = (images[0].shape[2] // patch) * (images[0].shape[3] // patch) if patch else 1
        return random_mask_triton.mask(images, seeds, limit, patch, _bits(number), ROUNDS)
    masked = []
    kept = _kept_patches(seeds, images[0].shape[2:], limit, patch) if patch else None
    for image in images:
        keep = _kept_channels(seeds, image.shape[1], limit) if kept is None else kept
        masked.append(torch.where(keep, to_compute_dtype(image) if image.dtype == torch.uint8 else image, 0))
    return masked


# a mask is its own adjoint
_operator = linear_operator(
    "random_mask",
    "Tensor seeds, int limit, int patch, str impl",
    forward=_forward,
    adjoint=_forward,
    empty=lambda image, *_: empty_like(image),
    empty_adjoint=lambda gradient, *_: empty_like(gradient),
)


def _kept_patches(seeds: Tensor, size: Sequence[int], count: int, patch: int) -> Tensor:
    rows, columns = size[0] // patch, size[1] // patch
    keep = (_permuted(seeds, rows * columns) >= count).view(-1, 1, rows, columns)
    return keep.repeat_interleave(patch, 2).repeat_interleave(patch, 3) if patch > 1 else keep


def _kept_channels(seeds: Tensor, channels: int, limit: int) -> Tensor:
    hashes = _keyed_hash(seeds[:, None], torch.arange(channels, device=seeds.device))
    return (hashes >= limit)[:, :, None, None]


def _permuted(seeds: Tensor, number: int) -> Tensor:
    """π of 0..number − 1 for each seed: (B, number) int64."""
    bits = _bits(number)
    low_bits = bits // 2
    halves = 1 << (bits - low_bits), 1 << low_bits
    # half a number has few values, so each round's function is a table
    tables = [
        _hash(torch.arange(halves[1 - r % 2], device=seeds.device) ^ _keyed_hash(seeds[:, None], r))
        & (halves[r % 2] - 1)
        for r in range(ROUNDS)
    ]
    values = torch.arange(number, device=seeds.device).expand(len(seeds), -1)
    values = _rounds(values, tables, low_bits)
    if number < 1 << bits:
        while bool((values >= number).any()):
            values = torch.where(values >= number, _rounds(values, tables, low_bits), values)
    return values


def _bits(number: int) -> int:
    return max(MIN_BITS, (number - 1).bit_length())


def _rounds(values: Tensor, tables: list[Tensor], low_bits: int) -> Tensor:
    high, low = values >> low_bits, values & ((1 << low_bits) - 1)
    for r, table in enumerate(tables):
        if r % 2:
            low = low ^ table.gather(1, high)
        else:
            high = high ^ table.gather(1, low)
    return (high << low_bits) | low


def _keyed_hash(seeds: Tensor, index: Tensor | int) -> Tensor:
    """h(seed, index) of the module's formula, as int64."""
    return _hash((_hash(seeds) + (index + 1) * 0x9E3779B9) & (WORD - 1))


def _hash(values: Tensor) -> Tensor:
    """The hash of 32-bit numbers held as int64, into which their products fit."""
    for _ in range(2):
        values = values ^ (values >> 16)
        values = (values * 0x045D9F3B) & (WORD - 1)
    return values ^ (values >> 16)
