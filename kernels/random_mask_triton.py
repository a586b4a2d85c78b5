"""Random masks in Triton, computed and applied in one pass; `random_mask` has the formulas.

    PS, CS   strides of pixels and of channels: 1 and H·W if contiguous, C and 1 if channels-last
    BP, BI   pixels and channels of a tile

A program computes the mask of BP pixels of a sample and applies it to all channels, BI at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .images import empty_like, is_channels_last, launches, scale
from .images_triton import divide, select_view

# launch table; other values were not compared on a GPU
BP, MAX_CHANNELS, WARPS = 1024, 4, 4


@triton.jit
def _hash(x):
    for _ in tl.static_range(2):
        x ^= x >> 16
        x *= 0x045D9F3B
    return x ^ (x >> 16)


@triton.jit
def _rounds(x, seed, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, ROUNDS: tl.constexpr):
    high = x >> LOW_BITS
    low = x & ((1 << LOW_BITS) - 1)
    key = seed
    for r in tl.static_range(ROUNDS):
        key += 0x9E3779B9
        if r % 2 == 0:
            high ^= _hash(low ^ _hash(key)) & ((1 << HIGH_BITS) - 1)
        else:
            low ^= _hash(high ^ _hash(key)) & ((1 << LOW_BITS) - 1)
    return (high << LOW_BITS) | low


@triton.jit(do_not_specialize=["limit"])
def _mask_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr,  # [B, C, H, W] or [B, H, W, C]
    y0_ptr, y1_ptr, y2_ptr, y3_ptr,  # [B, C, H, W] or [B, H, W, C]
    seeds_ptr,  # [B]
    limit, C, H, W, PS, CS, scale,
    PATCH: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, ROUNDS: tl.constexpr, VIEWS: tl.constexpr,
    BP: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    tiles = tl.cdiv(H * W, BP)
    sample = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BP + tl.arange(0, BP)
    seed = _hash(tl.load(seeds_ptr + sample).to(tl.uint32))
    base = sample.to(tl.int64) * (C * H * W)
    x_ptr = select_view(view, x0_ptr, x1_ptr, x2_ptr, x3_ptr, VIEWS) + base
    y_ptr = select_view(view, y0_ptr, y1_ptr, y2_ptr, y3_ptr, VIEWS) + base
    keep = p < H * W
    if PATCH > 0:
        row, column = divide(tl.minimum(p, H * W - 1), W)
        patches = (H // PATCH) * (W // PATCH)
        number = ((row // PATCH) * (W // PATCH) + column // PATCH).to(tl.uint32)
        number = _rounds(number, seed, LOW_BITS, HIGH_BITS, ROUNDS)
        while tl.max((number >= patches).to(tl.int32), 0) > 0:
            number = tl.where(number >= patches, _rounds(number, seed, LOW_BITS, HIGH_BITS, ROUNDS), number)
        keep = number >= limit
    for start in range(0, C, BI):
        channel = start + tl.arange(0, BI)
        offset = p[:, None] * PS + channel[None, :] * CS
        mask = (p < H * W)[:, None] & (channel < C)[None, :]
        kept = mask & keep[:, None]
        if PATCH == 0:
            hashed = _hash(seed + (channel + 1).to(tl.uint32) * 0x9E3779B9)
            kept = mask & (hashed.to(tl.int64) >= limit)[None, :]
        x = tl.load(x_ptr + offset, mask=kept, other=0.0).to(tl.float32) * scale  # [BP, BI]
        tl.store(y_ptr + offset, x.to(y_ptr.dtype.element_ty), mask=mask)


def mask(images: list[Tensor], seeds: Tensor, limit: int, patch: int, bits: int, rounds: int) -> list[Tensor]:
    """Dense images → masked images; `limit` and `patch` as in `random_mask`; π has `rounds` rounds on `bits` bits."""
    results = [empty_like(image) for image in images]
    for image, views in launches(x=images, y=results):
        batch, channels, height, width = image.shape
        channels_last = is_channels_last(image)
        _mask_kernel[(batch * triton.cdiv(height * width, BP), views["VIEWS"])](
            **views, seeds_ptr=seeds, limit=limit, C=channels, H=height, W=width, PS=channels if channels_last else 1,
            CS=1 if channels_last else height * width, scale=scale(image), PATCH=patch, LOW_BITS=bits // 2,
            HIGH_BITS=bits - bits // 2, ROUNDS=rounds, BP=BP,
            BI=min(MAX_CHANNELS, triton.next_power_of_2(channels)) if channels_last else 1, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return results
