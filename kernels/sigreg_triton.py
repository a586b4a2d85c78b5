"""SIGReg's sums and their gradient in Triton, with the basis of `sigreg_knots`.

    P        projections in fp32, [B·N, M], M contiguous
    N, M     samples of one test; slices
    S        splits of N: each program sums the rows of one split for BM slices
    F        functions of the basis; a program holds the sums for at most GROUP blocks of knots
    BN, BM   rows and slices of one tile

A thread has one slice and keeps the sums of its split's rows in registers. Every CHUNK rows it takes the expectation
of those rows off them, so that they never grow far beyond the deviations, and fp32 holds them. Nothing here is in fp64,
which consumer GPUs do at 1/32 or 1/64 of the speed. A second kernel adds up the splits in a fixed order, so that
results are the same every time. If one program sees all of N, the first kernel does both stages.

Δ is a compile-time argument, and so every φ_k is a number in the code. All programs are on the first axis of a grid,
which alone may have more than 65,535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sigreg_basis_triton import basis_factors, rotate
from .sigreg_deviations_triton import finish_kernel, inverse_count, phi, place, store_deviations
from .sigreg_knots import Knots, basis_mean
from .sigreg_launch import (
    BM,
    CHUNK,
    FEWEST_ROWS,
    device_guard,
    finish_constants,
    group_constants,
    knot_constants,
    launch_on,
    least_rows,
    split_rows,
)

_mean = triton.constexpr_function(basis_mean)


@triton.constexpr_function
def _high(number):
    """The 24 leading bits of a number, which fp32 holds."""
    shifted = number * (2**29 + 1)
    return shifted - (shifted - number)


@triton.jit
def _load_rows(p_ptr, n, end, m, M):
    """Rows n of P [BN, BM], 0 outside, and the mask of what lies inside."""
    mask = (n < end)[:, None] & (m < M)[None, :]
    return tl.load(p_ptr + n.to(tl.int64)[:, None] * M + m[None, :], mask=mask, other=0.0), mask


@triton.jit
def _load_weights(weights_ptr, n, end, WEIGHTED: tl.constexpr):
    """ω of rows n [BN, 1], 0 outside."""
    inside = (n < end)[:, None]
    if WEIGHTED:
        weights = tl.load(weights_ptr + n[:, None], mask=inside, other=0.0)
    else:
        weights = inside.to(tl.float32)
    return weights


@triton.jit
def _less_mean(total, count, mean: tl.constexpr, LOW: tl.constexpr):
    """`total` less the expectation of `count` rows: its part that fp32 holds, or if LOW what that leaves out."""
    part: tl.constexpr = mean - _high(mean) if LOW else _high(mean)
    return total if mean == 0 else tl.fma(count, tl.full([1, 1], -part, tl.float32), total)


@triton.jit
def _less_expected(
    sums, count, LOW: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, REACH: tl.constexpr, STEP: tl.constexpr
):
    """`_less_mean` of the sums of all functions."""
    SUMS: tl.constexpr = 4 * REACH + 2
    rest = ()
    for i in tl.static_range(GROUP * SUMS):
        rest = rest + (_less_mean(sums[i], count, _mean(i % SUMS, FIRST + i // SUMS, REACH, STEP), LOW),)
    return rest


# "do_not_specialize": Triton would compile a kernel anew for a size of 1
@triton.jit(do_not_specialize=["samples", "rows", "splits"])
def _sums_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    partial_ptr,  # [B, S, F, M]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, LIVE, M]
    samples, M, rows, splits,
    STEP: tl.constexpr, LIVE: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    FUNCTIONS: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    m, split, batch = place(M, splits, BM)
    end = tl.minimum((split + 1) * rows, samples)
    p_ptr += batch * samples * M
    weights_ptr += batch * samples
    sums = ()
    for _i in tl.static_range(GROUP * SUMS):
        sums = sums + (tl.zeros([BN, BM], tl.float32),)
    count = tl.zeros([BN, 1], tl.float32)
    next_p, _mask = _load_rows(p_ptr, split * rows + tl.arange(0, BN), end, m, M)  # [BN, BM]
    for first in range(split * rows, end, CHUNK):
        chunk = tl.zeros([BN, 1], tl.float32)
        for row in range(first, tl.minimum(first + CHUNK, end), BN):
            n = row + tl.arange(0, BN)
            p = next_p
            # the next rows load while these are worked on
            next_p, _mask = _load_rows(p_ptr, n + BN, end, m, M)  # [BN, BM]
            cosines, sines, cos_q, sin_q, cos_2h, sin_2h = basis_factors(p, STEP, FIRST, REACH)
            weights = _load_weights(weights_ptr, n, end, WEIGHTED)
            chunk += weights
            added = ()
            for block in tl.static_range(GROUP):
                if block > 0:
                    cos_q, sin_q = rotate(cos_q, sin_q, cos_2h, sin_2h)
                if WEIGHTED:
                    weighted_cos = cos_q * weights
                    weighted_sin = sin_q * weights
                else:
                    weighted_cos = tl.where((n < end)[:, None], cos_q, 0.0)
                    weighted_sin = tl.where((n < end)[:, None], sin_q, 0.0)
                added = added + (sums[block * SUMS] + weighted_cos, sums[block * SUMS + 1] + weighted_sin)
                for j in tl.static_range(REACH):
                    added = added + (
                        tl.fma(weighted_cos, cosines[j], sums[block * SUMS + 4 * j + 2]),
                        tl.fma(weighted_sin, sines[j], sums[block * SUMS + 4 * j + 3]),
                        tl.fma(weighted_sin, cosines[j], sums[block * SUMS + 4 * j + 4]),
                        tl.fma(weighted_cos, sines[j], sums[block * SUMS + 4 * j + 5]),
                    )
            sums = added
        count += chunk
        sums = _less_expected(sums, chunk, False, FIRST, GROUP, REACH, STEP)
    sums = _less_expected(sums, count, True, FIRST, GROUP, REACH, STEP)

    if WHOLE:
        inverse = inverse_count(counts_ptr, batch, samples, WEIGHTED)
        total = tl.zeros([BM], tl.float32)
        deviations_ptr += batch * 2 * LIVE * M
        for block in tl.static_range(GROUP):
            block_sums = ()
            for i in tl.static_range(SUMS):
                block_sums = block_sums + (tl.sum(sums[block * SUMS + i], axis=0),)
            total += store_deviations(block_sums, deviations_ptr, m, inverse, M, LIVE, block, REACH, STEP)
        tl.store(statistics_ptr + batch * M + m, total, mask=m < M)
    else:
        partial_ptr += ((batch * splits + split) * FUNCTIONS + FIRST * SUMS) * M
        for i in tl.static_range(GROUP * SUMS):
            tl.store(partial_ptr + i * M + m, tl.sum(sums[i], axis=0), mask=m < M)


@triton.jit
def _knot_gradient(
    scale, gradient_ptr, m, M, k: tl.constexpr, LIVE: tl.constexpr, STEP: tl.constexpr, STATISTIC: tl.constexpr
):
    """The coefficients [BM] of cos kθ and sin kθ in ∂/∂P, from the gradient to the deviations.

    If STATISTIC, `gradient_ptr` has the deviations themselves, from which that gradient follows.
    """
    factor: tl.constexpr = k * STEP * ((2 if k == LIVE else 4) * STEP * phi(k, STEP) if STATISTIC else 1)
    to_cosine = tl.zeros_like(scale)
    to_sine = tl.zeros_like(scale)
    if k <= LIVE:
        to_cosine = factor * tl.load(gradient_ptr + (k - 1) * M + m, mask=m < M, other=0.0)
        to_sine = factor * tl.load(gradient_ptr + (LIVE + k - 1) * M + m, mask=m < M, other=0.0)
    if STATISTIC:
        to_cosine *= scale
        to_sine *= scale
    return to_sine, -to_cosine


@triton.jit
def _block_coefficients(
    scale, gradient_ptr, m, M, block: tl.constexpr, LIVE: tl.constexpr, REACH: tl.constexpr, STEP: tl.constexpr,
    STATISTIC: tl.constexpr,
):  # fmt: skip
    """The coefficients of one block's functions in ∂/∂P: a tuple of [1, BM], in the order of the basis."""
    q: tl.constexpr = (2 * block + 1) * REACH
    cosine, sine = _knot_gradient(scale, gradient_ptr, m, M, q, LIVE, STEP, STATISTIC)
    coefficients = (cosine[None, :], sine[None, :])
    for j in tl.static_range(1, REACH + 1):
        up_cos, up_sin = _knot_gradient(scale, gradient_ptr, m, M, q + j, LIVE, STEP, STATISTIC)
        down_cos = tl.zeros_like(up_cos)
        down_sin = tl.zeros_like(up_sin)
        # the lowest knot of a block is the highest of the block before it
        if j < REACH:
            down_cos, down_sin = _knot_gradient(scale, gradient_ptr, m, M, q - j, LIVE, STEP, STATISTIC)
        coefficients = coefficients + (
            (up_cos + down_cos)[None, :],
            (down_cos - up_cos)[None, :],
            (up_sin + down_sin)[None, :],
            (up_sin - down_sin)[None, :],
        )
    return coefficients


@triton.jit(do_not_specialize=["samples", "rows", "splits"])
def _gradient_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    upstream_ptr,  # the gradient to the statistics, [B, M] with any strides
    gradient_ptr,  # the deviations, or without STATISTIC the gradient to them, [B, 2, LIVE, M]
    grad_p_ptr,  # [B*N, M]
    samples, M, rows, splits, stride_b, stride_m,
    STEP: tl.constexpr, LIVE: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr, STATISTIC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    m, split, batch = place(M, splits, BM)
    end = tl.minimum((split + 1) * rows, samples)
    p_ptr += batch * samples * M
    weights_ptr += batch * samples
    gradient_ptr += batch * 2 * LIVE * M
    grad_p_ptr += batch * samples * M
    scale = tl.zeros([BM], tl.float32)
    if STATISTIC:
        inverse = inverse_count(counts_ptr, batch, samples, WEIGHTED)
        scale += tl.load(upstream_ptr + batch * stride_b + m * stride_m, mask=m < M, other=0.0) * inverse  # [BM]
    coefficients = ()
    for block in tl.static_range(GROUP):
        coefficients = coefficients + _block_coefficients(
            scale, gradient_ptr, m, M, FIRST + block, LIVE, REACH, STEP, STATISTIC
        )

    next_p, next_mask = _load_rows(p_ptr, split * rows + tl.arange(0, BN), end, m, M)  # [BN, BM]
    for row in range(split * rows, end, BN):
        n = row + tl.arange(0, BN)
        p = next_p
        mask = next_mask
        # the next rows load while these are worked on
        next_p, next_mask = _load_rows(p_ptr, n + BN, end, m, M)  # [BN, BM]
        cosines, sines, cos_q, sin_q, cos_2h, sin_2h = basis_factors(p, STEP, FIRST, REACH)
        total = tl.zeros([BN, BM], tl.float32)
        for block in tl.static_range(GROUP):
            if block > 0:
                cos_q, sin_q = rotate(cos_q, sin_q, cos_2h, sin_2h)
            with_cos = coefficients[block * SUMS] + tl.zeros([BN, BM], tl.float32)
            with_sin = coefficients[block * SUMS + 1] + tl.zeros([BN, BM], tl.float32)
            for j in tl.static_range(REACH):
                with_cos = tl.fma(coefficients[block * SUMS + 4 * j + 2], cosines[j], with_cos)
                with_cos = tl.fma(coefficients[block * SUMS + 4 * j + 5], sines[j], with_cos)
                with_sin = tl.fma(coefficients[block * SUMS + 4 * j + 3], sines[j], with_sin)
                with_sin = tl.fma(coefficients[block * SUMS + 4 * j + 4], cosines[j], with_sin)
            total = tl.fma(cos_q, with_cos, total)
            total = tl.fma(sin_q, with_sin, total)
        if WEIGHTED:
            total *= _load_weights(weights_ptr, n, end, WEIGHTED)
        places = grad_p_ptr + n.to(tl.int64)[:, None] * M + m[None, :]
        # a later group of knots adds to what those before it wrote
        if FIRST > 0:
            total += tl.load(places, mask=mask, other=0.0)  # [BN, BM]
        tl.store(places, total, mask=mask)


def statistics(p: Tensor, weights: Tensor | None, samples: int, knots: Knots) -> tuple[Tensor, Tensor]:
    """P [B·N, M] and weights [B, N] → statistics [B, M], and deviations [B, 2, K − 1, M]."""
    batch, slices = p.shape[0] // samples, p.shape[1]
    groups, tiles = group_constants(knots), triton.cdiv(slices, BM)
    launch, multiprocessors = launch_on(p.device)
    programs = tiles * batch * len(groups)
    least = least_rows(samples, programs, multiprocessors)
    rows, splits = split_rows(samples, programs, launch.programs * multiprocessors, least)
    whole = splits == 1 and len(groups) == 1
    # an argument that a kernel does not read is P
    tensors = {
        "partial_ptr": p if whole else p.new_empty(batch, splits, knots.basis_size, slices),
        "counts_ptr": p if weights is None else weights.sum(-1),
        "statistics_ptr": p.new_empty(batch, slices),
        "deviations_ptr": p.new_empty(batch, 2, knots.live, slices),
    }
    sizes = {"samples": samples, "M": slices, "splits": splits}
    options = {"FUNCTIONS": knots.basis_size, "WEIGHTED": weights is not None, "enable_fp_fusion": True}
    with device_guard(p.device):
        for constants in groups:
            _sums_kernel[(tiles * splits * batch,)](
                p_ptr=p, weights_ptr=p if weights is None else weights, **tensors, **sizes, rows=rows,
                **constants, **options, WHOLE=whole, CHUNK=CHUNK, num_warps=launch.warps,
            )  # fmt: skip
        if not whole:
            constants = finish_constants(splits, launch, knots)
            finish_kernel[(triton.cdiv(slices, constants["BM"]) * batch,)](
                **tensors, **sizes, **knot_constants(knots), **options, **constants
            )
    return tensors["statistics_ptr"], tensors["deviations_ptr"]


def projection_gradient(
    gradient: Tensor, deviations: Tensor, p: Tensor, weights: Tensor | None, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P [B·N, M] from the gradient to the statistics, [B, M], or to the deviations, [B, 2, K − 1, M]."""
    batch, tiles = p.shape[0] // samples, triton.cdiv(p.shape[1], BM)
    launch, multiprocessors = launch_on(p.device)
    rows, splits = split_rows(samples, tiles * batch, launch.programs * multiprocessors, FEWEST_ROWS)
    grad_p = torch.empty_like(p)
    to_statistics = gradient.ndim == 2
    stride_b, stride_m = gradient.stride() if to_statistics else (0, 0)
    with device_guard(p.device):
        for constants in group_constants(knots):
            _gradient_kernel[(tiles * splits * batch,)](
                p_ptr=p, weights_ptr=p if weights is None else weights,
                counts_ptr=p if weights is None else weights.sum(-1), upstream_ptr=gradient,
                gradient_ptr=deviations if to_statistics else gradient.contiguous(), grad_p_ptr=grad_p,
                samples=samples, M=p.shape[1], rows=rows, splits=splits, stride_b=stride_b, stride_m=stride_m,
                **constants, WEIGHTED=weights is not None, STATISTIC=to_statistics, num_warps=launch.warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return grad_p
