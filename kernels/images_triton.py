"""Functions that the kernels on images share; the host's side is in `images`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select_view(view, a, b, c, d, VIEWS: tl.constexpr):
    """The pointer of image batch `view`, the program's own."""
    selected = a
    if VIEWS > 1:
        if view == 1:
            selected = b
    if VIEWS > 2:
        if view == 2:
            selected = c
    if VIEWS > 3:
        if view == 3:
            selected = d
    return selected


@triton.jit
def load_corner(pointer):
    """A row or column as int32, clamped to ±2²⁹: a pixel far outside the image stays outside, on the same side."""
    return tl.minimum(tl.maximum(tl.load(pointer).to(tl.int64), -(2**29)), 2**29).to(tl.int32)


@triton.jit
def divide(number, divisor):
    """Quotient (rounded down) and remainder of int32 by a positive divisor."""
    # integer division takes about thirty instructions. the float quotient is off by one at most
    quotient = tl.floor(number.to(tl.float32) / divisor).to(tl.int32)
    rest = number - quotient * divisor
    quotient = tl.where(rest < 0, quotient - 1, tl.where(rest >= divisor, quotient + 1, quotient))
    return quotient, number - quotient * divisor
