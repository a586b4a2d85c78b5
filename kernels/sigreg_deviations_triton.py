"""From the sums of SIGReg's basis to the deviations at its knots and the statistic, in Triton.

The last step of the kernel that makes the sums, if one program sees all of N; otherwise a kernel of its own, the second
stage. Shapes are those of `sigreg_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sigreg_knots import phi as _phi_of_knot

phi = triton.constexpr_function(_phi_of_knot)


@triton.jit
def place(M, splits, BM: tl.constexpr):
    """The program's slices [BM], its split, and its test."""
    tiles = tl.cdiv(M, BM)
    program = tl.program_id(0)
    m = (program % tiles) * BM + tl.arange(0, BM)
    return m, (program // tiles) % splits, (program // tiles // splits).to(tl.int64)


@triton.jit
def inverse_count(counts_ptr, batch, samples, WEIGHTED: tl.constexpr):
    """1 / N, or 1 / Σω of the test."""
    if WEIGHTED:
        count = tl.load(counts_ptr + batch)
    else:
        count = samples.to(tl.float32)
    return 1 / tl.maximum(count, 1e-30)


@triton.jit
def _store_knot(
    cosine, sine, deviations_ptr, m, inverse, M, k: tl.constexpr, LIVE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Stores the deviations D at a knot; returns its part of the statistic, w_k (Dc² + Ds²) / N."""
    weight: tl.constexpr = (1 if k == LIVE else 2) * STEP * phi(k, STEP)
    if k <= LIVE:
        tl.store(deviations_ptr + (k - 1) * M + m, cosine, mask=m < M)
        tl.store(deviations_ptr + (LIVE + k - 1) * M + m, sine, mask=m < M)
        # divided first: the square of a deviation may exceed fp32 where the statistic does not
        part = weight * (cosine * inverse * cosine + sine * inverse * sine)
    else:
        part = tl.zeros_like(cosine)
    return part


@triton.jit
def store_deviations(
    sums, deviations_ptr, m, inverse, M, LIVE: tl.constexpr, block: tl.constexpr, REACH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Stores the deviations at one block's knots, from its sums [BM]; returns their part of the statistic."""
    q: tl.constexpr = (2 * block + 1) * REACH
    total = _store_knot(sums[0], sums[1], deviations_ptr, m, inverse, M, q, LIVE, STEP)
    for j in tl.static_range(1, REACH + 1):
        cosine = sums[4 * j - 2] - sums[4 * j - 1]
        sine = sums[4 * j] + sums[4 * j + 1]
        total += _store_knot(cosine, sine, deviations_ptr, m, inverse, M, q + j, LIVE, STEP)
        # the lowest knot of a block is the highest of the block before it
        if j < REACH:
            cosine = sums[4 * j - 2] + sums[4 * j - 1]
            sine = sums[4 * j] - sums[4 * j + 1]
            total += _store_knot(cosine, sine, deviations_ptr, m, inverse, M, q - j, LIVE, STEP)
    return total


@triton.jit(do_not_specialize=["samples", "splits"])
def finish_kernel(
    partial_ptr,  # [B, S, F, M]
    counts_ptr,  # [B]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, LIVE, M]
    samples, M, splits,
    STEP: tl.constexpr, LIVE: tl.constexpr, REACH: tl.constexpr, FUNCTIONS: tl.constexpr, WEIGHTED: tl.constexpr,
    AT_ONCE: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    m, _split, batch = place(M, 1, BM)
    inverse = inverse_count(counts_ptr, batch, samples, WEIGHTED)
    total = tl.zeros([BM], tl.float32)
    deviations_ptr += batch * 2 * LIVE * M
    within = tl.arange(0, BS)
    places = (within * FUNCTIONS).to(tl.int64)[:, None] * M + m[None, :]
    for block in tl.static_range(FUNCTIONS // SUMS):
        tiles = ()
        for _i in tl.static_range(SUMS):
            tiles = tiles + (tl.zeros([BS, BM], tl.float32),)
        for first in range(0, splits, AT_ONCE * BS):
            added = ()
            for i in tl.static_range(SUMS):
                part = tl.zeros([BS, BM], tl.float32)
                for tile in tl.static_range(AT_ONCE):
                    s = first + tile * BS
                    offset = ((batch * splits + s) * FUNCTIONS + block * SUMS + i) * M
                    mask = (s + within < splits)[:, None] & (m < M)[None, :]
                    part += tl.load(partial_ptr + offset + places, mask=mask, other=0.0)  # [BS, BM]
                added = added + (tiles[i] + part,)
            tiles = added
        sums = ()
        for i in tl.static_range(SUMS):
            sums = sums + (tl.sum(tiles[i], axis=0),)
        total += store_deviations(sums, deviations_ptr, m, inverse, M, LIVE, block, REACH, STEP)
    tl.store(statistics_ptr + batch * M + m, total, mask=m < M)
