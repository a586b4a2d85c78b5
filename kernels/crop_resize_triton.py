"""Crop-resize and its gradient in Triton; `crop_resize` has the formulas.

    INNER    interleaved channels: 1 in a contiguous image, C in a channels-last one
    plane    [H, W·INNER]: one channel of an image, or all of them
    e        an element of a row: column e // INNER, channel e % INNER
    BI, BE   output rows and elements of a tile

A launch takes up to four image batches; `view` is the program's own. The device asserts that boxes lie in the image.
Without assertions, clamped boxes keep every read inside the image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import empty_like, launches, planes
from .images_triton import divide, load_corner, select_view

# launch table. on an H100 a crop takes twice what its bytes would and its gradient four times (docs/results/h100.md);
# other values were not tried there
TILE, MAX_COLUMNS, WARPS = 1024, 128, 4
PIXELS = 128  # elements of a box that one program of the gradient computes
ZERO_ROWS = 16  # image rows in which one program of the gradient stores zeros


@triton.jit
def _span(start_ptr, sizes_ptr, size, sample, extent, VARIES: tl.constexpr):
    """First pixel and size of a sample's box along an axis of `extent` pixels, clamped to it."""
    start = load_corner(start_ptr + sample)
    if VARIES:
        size = load_corner(sizes_ptr + sample)
    tl.device_assert((size >= 1) & (start >= 0) & (start + size <= extent), "crop_resize: a box leaves its image")
    size = tl.minimum(tl.maximum(size, 1), extent)
    return tl.minimum(tl.maximum(start, 0), extent - size), size


@triton.jit
def _neighbours(i, size, out):
    """The two pixels of a box that output i reads, and the weight of the second."""
    steps = tl.maximum(out - 1, 1)
    low, rest = divide(i * (size - 1), steps)
    return low, tl.minimum(low + 1, size - 1), rest.to(tl.float32) / steps.to(tl.float32)


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr,  # [planes, H, W*INNER]
    y0_ptr, y1_ptr, y2_ptr, y3_ptr,  # [planes, OH, OW*INNER]
    top_ptr, left_ptr, heights_ptr, widths_ptr,  # [B]
    height, width, per_sample, H, W, OH, OW,
    INNER: tl.constexpr, VIEWS: tl.constexpr, VARIES_H: tl.constexpr, VARIES_W: tl.constexpr, SCALED: tl.constexpr,
    BI: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    x_ptr = select_view(view, x0_ptr, x1_ptr, x2_ptr, x3_ptr, VIEWS)
    y_ptr = select_view(view, y0_ptr, y1_ptr, y2_ptr, y3_ptr, VIEWS)
    across = tl.cdiv(OW * INNER, BE)
    tiles = across * tl.cdiv(OH, BI)
    plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample = plane // per_sample
    top, height = _span(top_ptr, heights_ptr, height, sample, H, VARIES_H)
    left, width = _span(left_ptr, widths_ptr, width, sample, W, VARIES_W)
    i = (tile // across) * BI + tl.arange(0, BI)
    e = (tile % across) * BE + tl.arange(0, BE)
    in_i, in_e = i < OH, e < OW * INNER
    above, below, down = _neighbours(tl.minimum(i, OH - 1), height, OH)
    before, after, right = _neighbours(tl.minimum(e // INNER, OW - 1), width, OW)
    x_ptr += plane.to(tl.int64) * (H * W * INNER)
    rows0, rows1 = ((top + above) * (W * INNER))[:, None], ((top + below) * (W * INNER))[:, None]
    columns0, columns1 = ((left + before) * INNER + e % INNER)[None, :], ((left + after) * INNER + e % INNER)[None, :]
    x00 = tl.load(x_ptr + rows0 + columns0).to(tl.float32)  # [BI, BE]
    x01 = tl.load(x_ptr + rows0 + columns1).to(tl.float32)
    x10 = tl.load(x_ptr + rows1 + columns0).to(tl.float32)
    x11 = tl.load(x_ptr + rows1 + columns1).to(tl.float32)
    over = tl.fma(x01 - x00, right[None, :], x00)
    under = tl.fma(x11 - x10, right[None, :], x10)
    y = tl.fma(under - over, down[:, None], over)
    if SCALED:
        y *= 1 / 255
    y_ptr += plane.to(tl.int64) * (OH * OW * INNER)
    tl.store(y_ptr + (i * (OW * INNER))[:, None] + e[None, :], y.to(y_ptr.dtype.element_ty), mask=in_i[:, None] & in_e)


@triton.jit
def _taps(size, out):
    """The largest number of outputs that read one pixel of a box."""
    steps = tl.maximum(out - 1, 1)
    # every output reads the pixel of a box of size 1
    return tl.where(size > 1, tl.minimum(out, tl.cdiv(2 * steps, tl.maximum(size - 1, 1))), out)


@triton.jit
def _first_tap(pixel, size, out):
    """The first output that reads a pixel, its distance and the distance between outputs (in 1/steps), and 1/steps."""
    steps = tl.maximum(out - 1, 1)
    quotient, _ = divide((pixel - 1) * steps, tl.maximum(size - 1, 1))
    first = tl.maximum(quotient + 1, 0)
    return first, (first * (size - 1) - pixel * steps).to(tl.float32), (size - 1).to(tl.float32), 1.0 / steps


@triton.jit(do_not_specialize=["height", "width"])
def _backward_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr,  # [planes, OH, OW*INNER]
    dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr,  # [planes, H, W*INNER]
    top_ptr, left_ptr, heights_ptr, widths_ptr,  # [B]
    height, width, per_sample, box_programs, H, W, OH, OW,
    INNER: tl.constexpr, VIEWS: tl.constexpr, VARIES_H: tl.constexpr, VARIES_W: tl.constexpr,
    PIXELS: tl.constexpr, ZERO_ROWS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    dx_ptr = select_view(view, dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr, VIEWS)
    programs = box_programs + tl.cdiv(H, ZERO_ROWS)
    plane = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    sample = plane // per_sample
    top, height = _span(top_ptr, heights_ptr, height, sample, H, VARIES_H)
    left, width = _span(left_ptr, widths_ptr, width, sample, W, VARIES_W)
    dx_ptr += plane.to(tl.int64) * (H * W * INNER)
    if program < box_programs:
        # each pixel of the box gathers from the outputs that read it, so that nothing is added atomically
        q = program * PIXELS + tl.arange(0, PIXELS)
        inside = q < height * width * INNER
        r, e = divide(q, width * INNER)
        c = e // INNER
        g_ptr = (
            select_view(view, g0_ptr, g1_ptr, g2_ptr, g3_ptr, VIEWS)
            + plane.to(tl.int64) * (OH * OW * INNER)
            + e % INNER
        )
        first_i, from_r, row_step, per_row = _first_tap(r, height, OH)
        first_j, from_c, column_step, per_column = _first_tap(c, width, OW)
        # the grid is for the largest possible box: with a smaller one, some programs have no work
        busy = program * PIXELS < height * width * INNER
        taps_i, taps_j = tl.where(busy, _taps(height, OH), 0), tl.where(busy, _taps(width, OW), 0)
        total = tl.zeros((PIXELS,), tl.float32)
        for b in range(taps_j):
            j = first_j + b
            in_j = inside & (j < OW)
            column_total = tl.zeros((PIXELS,), tl.float32)
            for a in range(taps_i):
                i = first_i + a
                g = tl.load(g_ptr + (i * OW + j) * INNER, mask=in_j & (i < OH), other=0.0).to(tl.float32)
                away = tl.abs(from_r + a * row_step) * per_row
                column_total = tl.fma(tl.maximum(1.0 - away, 0.0), g, column_total)
            away = tl.abs(from_c + b * column_step) * per_column
            total = tl.fma(tl.maximum(1.0 - away, 0.0), column_total, total)
        to = dx_ptr + (top + r) * (W * INNER) + left * INNER + e
        tl.store(to, total.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        row = (program - box_programs) * ZERO_ROWS + tl.arange(0, ZERO_ROWS)
        in_rows = (row >= top) & (row < top + height)
        zero = tl.zeros((ZERO_ROWS, BE), dx_ptr.dtype.element_ty)
        for start in range(0, W * INNER, BE):
            e = start + tl.arange(0, BE)
            in_columns = (e >= left * INNER) & (e < (left + width) * INNER)
            to = dx_ptr + row[:, None] * (W * INNER) + e[None, :]
            # whole rows have a store of their own, because their mask allows vectorised stores
            tl.store(to, zero, mask=((row < H) & ~in_rows)[:, None] & (e < W * INNER)[None, :])
            tl.store(to, zero, mask=in_rows[:, None] & ((e < W * INNER) & ~in_columns)[None, :])


# `debug` compiles the assertions in; the checks for integer overflow, which it implies, stay off
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True, "debug": True, "sanitize_overflow": False}


def forward(
    images: list[Tensor], top: Tensor, left: Tensor, heights: Tensor | None, widths: Tensor | None,
    height: int, width: int, size: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """Dense images (B, C, H, W) → (B, C, *size) each."""
    results = [empty_like(image, size) for image in images]
    boxes = _box_arguments(top, left, heights, widths, height, width)
    for image, views in launches(x=images, y=results):
        count, inner = planes(image)
        columns = min(MAX_COLUMNS, triton.next_power_of_2(size[1] * inner))
        rows = min(TILE // columns, triton.next_power_of_2(size[0]))
        tiles = triton.cdiv(size[0], rows) * triton.cdiv(size[1] * inner, columns)
        _forward_kernel[(count * tiles, views["VIEWS"])](
            **views, **boxes, per_sample=count // len(image), H=image.shape[2], W=image.shape[3], OH=size[0],
            OW=size[1], INNER=inner, SCALED=image.dtype == torch.uint8, BI=rows, BE=columns, **OPTIONS,
        )  # fmt: skip
    return results


def backward(
    gradients: list[Tensor], top: Tensor, left: Tensor, heights: Tensor | None, widths: Tensor | None,
    height: int, width: int, size: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """Dense gradients to the outputs → gradients to the images (B, C, *size)."""
    results = [empty_like(gradient, size) for gradient in gradients]
    boxes = _box_arguments(top, left, heights, widths, height, width)
    for gradient, views in launches(g=gradients, dx=results):
        count, inner = planes(gradient)
        largest = (size[0] if heights is not None else height) * (size[1] if widths is not None else width) * inner
        box_programs = triton.cdiv(largest, PIXELS)
        columns = min(MAX_COLUMNS, triton.next_power_of_2(size[1] * inner))
        _backward_kernel[(count * (box_programs + triton.cdiv(size[0], ZERO_ROWS)), views["VIEWS"])](
            **views, **boxes, per_sample=count // len(gradient), box_programs=box_programs, H=size[0], W=size[1],
            OH=gradient.shape[2], OW=gradient.shape[3], INNER=inner, PIXELS=PIXELS, ZERO_ROWS=ZERO_ROWS, BE=columns,
            **OPTIONS,
        )  # fmt: skip
    return results


def _box_arguments(
    top: Tensor, left: Tensor, heights: Tensor | None, widths: Tensor | None, height: int, width: int
) -> dict[str, Any]:
    """The kernels' arguments for the boxes; sizes that they do not read point to the corners."""
    return {
        "top_ptr": top,
        "left_ptr": left,
        "heights_ptr": top if heights is None else heights,
        "widths_ptr": left if widths is None else widths,
        "height": height,
        "width": width,
        "VARIES_H": heights is not None,
        "VARIES_W": widths is not None,
    }
