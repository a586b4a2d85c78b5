"""Random masks of pixels, patches and channels, made from a seed for each image and applied in the same pass.

    patches    patch p of P is masked where π(p) < count: exactly `count` of them, with nothing sorted or stored
    channels   channel c is masked where h(seed, c) < ratio·2³²: independently of each other

    h(seed, i)   hash(hash(seed) + (i + 1)·0x9E3779B9)
    hash         twice x ^= x >> 16, x *= 0x045D9F3B; then x ^= x >> 16; all on 32 bits
    π            a Feistel network on the numbers of b bits, the fewest that hold P but at least 6: in each of 8 rounds
                 one half, the high one first, is xored with the hash of the other xored with h(seed, round).
                 What leaves 0..P−1 goes through it again, so that it permutes those P numbers

A mask is a pure function of its seed, the same on every device. So a step draws B numbers, which it can replay.
Source: Mitchell et al., "Bandwidth-Optimal Random Shuffling for GPUs" (2021), for permutations that are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .images import Images, as_list, empty_like, per_image, unfit, widened
from .impl import HAS_TRITON, Impl, choose
from .linear import linear_operator

random_mask_triton: Any = None
if HAS_TRITON:
    from . import random_mask_triton

# with fewer of either, small numbers of patches are not permuted evenly (measured)
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
    """Exactly int(ratio · P) of each image's P = H/patch · W/patch patches set to 0, in all channels.

    Args:
        images: (B, C, H, W), floating, or uint8, which is scaled to [0, 1] in fp32; or a sequence of such with the same
            B, H and W, which get the same masks.
        seeds: (B,) int64 on the images' device, each in [0, 2³²).
        ratio: of patches masked, in [0, 1].
        patch: side of a patch in pixels; 1 masks single pixels.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.

    Returns:
        (B, C, H, W) in the images' dtype and layout (contiguous or channels-last), a tuple of them for a sequence.
        0 where masked, whatever is there. Differentiable with respect to floating images.

    Raises:
        ValueError: arguments of the wrong shape, dtype, device or range, patches that do not tile the image, or an impl
            that cannot be had.
    """
    batches = as_list("mask_patches", images)
    count = _count(ratio, batches[0].shape[2:], patch)
    found = _apply("mask_patches", batches, seeds, count, patch, impl)
    return found[0] if isinstance(images, Tensor) else tuple(found)


@overload
def mask_channels(images: Tensor, seeds: Tensor, *, ratio: float, impl: Impl = "auto") -> Tensor: ...
@overload
def mask_channels(
    images: Sequence[Tensor], seeds: Tensor, *, ratio: float, impl: Impl = "auto"
) -> tuple[Tensor, ...]: ...
def mask_channels(images: Images, seeds: Tensor, *, ratio: float, impl: Impl = "auto") -> Tensor | tuple[Tensor, ...]:
    """Each channel of each image set to 0 with probability `ratio`, independently; otherwise as `mask_patches`."""
    batches = as_list("mask_channels", images)
    found = _apply("mask_channels", batches, seeds, _limit(ratio), 0, impl)
    return found[0] if isinstance(images, Tensor) else tuple(found)


def patch_mask(seeds: Tensor, size: Sequence[int], *, ratio: float, patch: int = 1) -> Tensor:
    """(B, 1, H, W) bool, False where `mask_patches` masks images of `size` (H, W). On a GPU it may wait for it."""
    return _kept_patches(seeds, size, _count(ratio, size, patch), patch)


def channel_mask(seeds: Tensor, channels: int, *, ratio: float) -> Tensor:
    """(B, C, 1, 1) bool, False where `mask_channels` masks."""
    return _kept_channels(seeds, channels, _limit(ratio))


def _count(ratio: float, size: Sequence[int], patch: int) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_patches: ratio is between 0 and 1, not {ratio}")
    check_tiling(size, patch)
    return int(ratio * ((size[0] // patch) * (size[1] // patch)))


def check_tiling(size: Sequence[int], patch: int) -> None:
    """Raises ValueError where patches of a side do not tile images of `size` (H, W)."""
    height, width = size
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patches of {patch} px do not tile images of {height}x{width}")


def _limit(ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_channels: ratio is between 0 and 1, not {ratio}")
    return int(ratio * WORD)


def _apply(name: str, batches: list[Tensor], seeds: Tensor, limit: int, patch: int, impl: str) -> list[Tensor]:
    seeds = per_image(name, "seeds", seeds, batches[0])
    if seeds.dtype != torch.int64:
        raise ValueError(f"{name}: seeds are int64, not {seeds.dtype}")
    return _operator(batches, seeds, limit, patch, choose(name, impl, batches[0].device, unfit(batches)))


def _forward(images: list[Tensor], seeds: Tensor, limit: int, patch: int, impl: str) -> list[Tensor]:
    """`limit` is the number of patches masked; or, where `patch` is 0, the channels' ratio·2³²."""
    if impl == "triton":
        number = (images[0].shape[2] // patch) * (images[0].shape[3] // patch) if patch else 1
        return random_mask_triton.mask(images, seeds, limit, patch, _bits(number), ROUNDS)
    found = []
    kept = _kept_patches(seeds, images[0].shape[2:], limit, patch) if patch else None
    for image in images:
        keep = _kept_channels(seeds, image.shape[1], limit) if kept is None else kept
        found.append(torch.where(keep, widened(image) if image.dtype == torch.uint8 else image, 0))
    return found


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
    hashes = _keyed(seeds[:, None], torch.arange(channels, device=seeds.device))
    return (hashes >= limit)[:, :, None, None]


def _permuted(seeds: Tensor, number: int) -> Tensor:
    """π of 0..number − 1 for each seed: (B, number) int64."""
    bits = _bits(number)
    low_bits = bits // 2
    halves = 1 << (bits - low_bits), 1 << low_bits
    # a round's function of a half, which has few values, is a table of them
    tables = [
        _hash(torch.arange(halves[1 - r % 2], device=seeds.device) ^ _keyed(seeds[:, None], r)) & (halves[r % 2] - 1)
        for r in range(ROUNDS)
    ]
    values = torch.arange(number, device=seeds.device).expand(len(seeds), -1)
    found = _rounds(values, tables, low_bits)
    if number < 1 << bits:
        while bool((found >= number).any()):
            found = torch.where(found >= number, _rounds(found, tables, low_bits), found)
    return found


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


def _keyed(seeds: Tensor, index: Tensor | int) -> Tensor:
    return _hash((_hash(seeds) + (index + 1) * 0x9E3779B9) & (WORD - 1))


def _hash(values: Tensor) -> Tensor:
    """Of 32-bit numbers, as int64: their products fit into 63 bits."""
    for _ in range(2):
        values = values ^ (values >> 16)
        values = (values * 0x045D9F3B) & (WORD - 1)
    return values ^ (values >> 16)
