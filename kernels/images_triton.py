"""What the kernels on images share, see `images`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_of(view, a, b, c, d, VIEWS: tl.constexpr):
    """The pointer of this program's image batch."""
    chosen = a
    if VIEWS > 1:
        if view == 1:
            chosen = b
    if VIEWS > 2:
        if view == 2:
            chosen = c
    if VIEWS > 3:
        if view == 3:
            chosen = d
    return chosen


@triton.jit
def load_corner(pointer):
    """A pixel's row or column as int32: one that is out of reach stays out of reach, on the same side."""
    return tl.minimum(tl.maximum(tl.load(pointer).to(tl.int64), -(2**29)), 2**29).to(tl.int32)


@triton.jit
def divide(number, divisor):
    """Quotient, rounded down, and remainder of integers; the divisor is positive."""
    # integer division takes some thirty instructions; the float quotient is off by one at most
    quotient = tl.floor(number.to(tl.float32) / divisor).to(tl.int32)
    rest = number - quotient * divisor
    quotient = tl.where(rest < 0, quotient - 1, tl.where(rest >= divisor, quotient + 1, quotient))
    return quotient, number - quotient * divisor
