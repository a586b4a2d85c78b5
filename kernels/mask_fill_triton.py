"""Filling a rectangle with the image's mean, and the gradient, in Triton; `mask_fill` has the formulas.

    INNER    interleaved channels: 1 in a contiguous image, C in a channels-last one
    plane    [H·W, INNER]: one channel of an image, or all of them
    BP, BI   pixels and channels of a tile

A program fills BI channels of a plane. It reads a plane that fits into its registers once, a larger one twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .images import empty_like, launches, planes, scale
from .images_triton import divide, load_corner, select_view

# launch table; other values were not compared on a GPU
MAX_CHANNELS = 16
MAX_HELD = 16384  # values that a program holds in registers
BLOCK = 4096  # values in a tile of a plane that is read twice
VALUES_PER_WARP = 1024


@triton.jit
def _block(start, channel, x_ptr, top, left, height, width, H, W, INNER: tl.constexpr, BP: tl.constexpr):
    """The tile of pixels from `start` on: x [BI, BP], whether each is in the rectangle, its offset, and the mask."""
    p = start + tl.arange(0, BP)
    row, column = divide(p, W)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    offset = p[None, :] * INNER + channel[:, None]
    mask = (p < H * W)[None, :] & (channel < INNER)[:, None]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BI, BP]
    return x, inside[None, :], offset, mask


@triton.jit
def _summand(x, inside, ADJOINT: tl.constexpr):
    summand = x
    if ADJOINT:
        summand = tl.where(inside, x, 0.0)
    return summand


@triton.jit
def _result(x, inside, mean, ADJOINT: tl.constexpr):
    if ADJOINT:
        result = tl.where(inside, 0.0, x) + mean
    else:
        result = tl.where(inside, mean, x)
    return result


@triton.jit(do_not_specialize=["height", "width"])
def _fill_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr,  # [planes, H*W, INNER]
    y0_ptr, y1_ptr, y2_ptr, y3_ptr,  # [planes, H*W, INNER]
    top_ptr, left_ptr,  # [B]
    height, width, per_sample, H, W, scale,
    INNER: tl.constexpr, VIEWS: tl.constexpr, ADJOINT: tl.constexpr, HELD: tl.constexpr,
    BP: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    PARTS: tl.constexpr = (INNER + BI - 1) // BI
    plane = tl.program_id(0) // PARTS
    channel = (tl.program_id(0) % PARTS) * BI + tl.arange(0, BI)
    sample = plane // per_sample
    top = load_corner(top_ptr + sample)
    left = load_corner(left_ptr + sample)
    x_ptr = select_view(view, x0_ptr, x1_ptr, x2_ptr, x3_ptr, VIEWS) + plane.to(tl.int64) * (H * W * INNER)
    y_ptr = select_view(view, y0_ptr, y1_ptr, y2_ptr, y3_ptr, VIEWS) + plane.to(tl.int64) * (H * W * INNER)
    if HELD:
        x, inside, offset, mask = _block(0, channel, x_ptr, top, left, height, width, H, W, INNER, BP)
        mean = tl.sum(_summand(x, inside, ADJOINT), 1)[:, None] / (H * W)
        y = _result(x, inside, mean, ADJOINT) * scale
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros((BI, BP), tl.float32)
        for start in range(0, H * W, BP):
            x, inside, _, _ = _block(start, channel, x_ptr, top, left, height, width, H, W, INNER, BP)
            sums += _summand(x, inside, ADJOINT)
        mean = tl.sum(sums, 1)[:, None] / (H * W)
        for start in range(0, H * W, BP):
            x, inside, offset, mask = _block(start, channel, x_ptr, top, left, height, width, H, W, INNER, BP)
            y = _result(x, inside, mean, ADJOINT) * scale
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def num_warps(values: int) -> int:
    """Warps for a tile of `values`, which is a power of two."""
    return min(16, max(1, values // VALUES_PER_WARP))


def fill(images: list[Tensor], top: Tensor, left: Tensor, height: int, width: int, *, adjoint: bool) -> list[Tensor]:
    """Dense images → images with filled rectangles; with `adjoint`, the gradients to those → to the images."""
    filled = [empty_like(image) for image in images]
    for image, views in launches(x=images, y=filled):
        count, inner = planes(image)
        pixels = image.shape[2] * image.shape[3]
        channels = min(MAX_CHANNELS, triton.next_power_of_2(inner))
        held = triton.next_power_of_2(pixels) * channels <= MAX_HELD
        block = triton.next_power_of_2(pixels) if held else BLOCK // channels
        _fill_kernel[(count * triton.cdiv(inner, channels), views["VIEWS"])](
            **views, top_ptr=top, left_ptr=left, height=height, width=width, per_sample=count // len(image),
            H=image.shape[2], W=image.shape[3], scale=scale(image), INNER=inner, ADJOINT=adjoint, HELD=held, BP=block,
            BI=channels, num_warps=num_warps(block * channels), enable_fp_fusion=True,
        )  # fmt: skip
    return filled
