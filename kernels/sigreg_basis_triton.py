"""The basis of `sigreg_knots` in Triton: one sine and one cosine for each projection give those at all knots."""

from __future__ import annotations

import triton
import triton.language as tl

from .sigreg_knots import basis_mean

_mean = triton.constexpr_function(basis_mean)


@triton.constexpr_function
def _high(number):
    """The 24 leading bits of a number, which fp32 holds."""
    shifted = number * (2**29 + 1)
    return shifted - (shifted - number)


@triton.jit
def _sincos(p, step):
    """sin and cos of θ = step·P by one range reduction (Cody and Waite) and Cephes's polynomials.

    This avoids the slow path of the library's functions. The reduction is exact for |θ| up to about 10⁴. Far larger
    angles have no phase left in fp32 and give some number in [−1, 1]. NaN stays NaN.
    """
    quadrant = tl.floor(tl.fma(p * step, 0.6366197723675814, 0.5))
    # the first part of π/2 times the quadrant is exact, so that θ itself is never rounded
    r = tl.fma(p, step, quadrant * -1.5703125)
    r = tl.fma(quadrant, -4.837512969970703125e-4, r)
    r = tl.fma(quadrant, -7.54978995489188216e-8, r)
    r = tl.clamp(r, -0.8, 0.8, propagate_nan=tl.PropagateNan.ALL)
    square = r * r
    sine = tl.fma(square, tl.fma(square, -1.9515295891e-4, 8.3321608736e-3), -1.6666654611e-1)
    sine = tl.fma(sine, square * r, r)
    cosine = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    cosine = tl.fma(square, cosine, 4.166664568298827e-2)
    cosine = tl.fma(square * square, cosine, tl.fma(square, -0.5, 1.0))
    turns = quadrant.to(tl.int32)
    odd = (turns & 1) != 0
    s = tl.where(odd, cosine, sine)
    c = tl.where(odd, sine, cosine)
    return tl.where((turns & 2) != 0, -s, s), tl.where(((turns + 1) & 2) != 0, -c, c)


@triton.jit
def _harmonics(p, step, REACH: tl.constexpr):
    """cos jθ and sin jθ for j = 1..REACH, each from two harmonics of about half its order."""
    sine, cosine = _sincos(p, step)
    cosines = (cosine,)
    sines = (sine,)
    for order in tl.static_range(2, REACH + 1):
        twice = 2 * sines[order // 2 - 1]
        if order % 2 == 0:
            cosines = cosines + (tl.fma(-twice, sines[order // 2 - 1], 1.0),)
            sines = sines + (twice * cosines[order // 2 - 1],)
        else:
            cosines = cosines + (tl.fma(-twice, sines[order // 2], cosines[0]),)
            sines = sines + (tl.fma(twice, cosines[order // 2], sines[0]),)
    return cosines, sines


@triton.jit
def rotate(cosine, sine, by_cosine, by_sine):
    """cos and sin of the sum of two angles."""
    return tl.fma(cosine, by_cosine, -sine * by_sine), tl.fma(sine, by_cosine, cosine * by_sine)


@triton.jit
def basis_factors(p, step: tl.constexpr, first_block: tl.constexpr, REACH: tl.constexpr):
    """What the basis at P [BN, BM] is made of.

    Returns cos jθ and sin jθ for j = 1..REACH, cos qθ and sin qθ at the centre q of `first_block`, and cos 2Hθ and
    sin 2Hθ, which lead from one centre to the next.
    """
    cosines, sines = _harmonics(p, step, REACH)
    cos_q = cosines[REACH - 1]
    sin_q = sines[REACH - 1]
    cos_2h = tl.fma(-2 * sin_q, sin_q, 1.0)
    sin_2h = 2 * sin_q * cos_q
    for _block in tl.static_range(first_block):
        cos_q, sin_q = rotate(cos_q, sin_q, cos_2h, sin_2h)
    return cosines, sines, cos_q, sin_q, cos_2h, sin_2h


@triton.jit
def _less_mean(total, count, mean: tl.constexpr, LOW: tl.constexpr):
    """`total` less the expectation of `count` rows: its part that fp32 holds, or if LOW what that leaves out."""
    part: tl.constexpr = mean - _high(mean) if LOW else _high(mean)
    return total if mean == 0 else tl.fma(count, tl.full([1, 1], -part, tl.float32), total)


@triton.jit
def less_expected(
    sums, count, LOW: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, REACH: tl.constexpr, STEP: tl.constexpr
):
    """`_less_mean` of the sums of all functions."""
    SUMS: tl.constexpr = 4 * REACH + 2
    rest = ()
    for i in tl.static_range(GROUP * SUMS):
        rest = rest + (_less_mean(sums[i], count, _mean(i % SUMS, FIRST + i // SUMS, REACH, STEP), LOW),)
    return rest
