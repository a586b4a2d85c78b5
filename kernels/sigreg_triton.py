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

from .impl import device_guard
from .sigreg_basis_triton import basis_factors, less_expected, rotate
from .sigreg_deviations_triton import finish_kernel, inverse_count, phi, place, store_deviations
from .sigreg_knots import Knots
from .sigreg_launch import (
    BM,
    CHUNK,
    FEWEST_ROWS,
    finish_constants,
    group_constants,
    knot_constants,
    launch_on,
    least_rows,
    split_rows,
)


@triton.jit
def _load_rows(p_ptr, n, end, m, M):
    """Rows n of P [BN, BM], 0 outside, and the mask of what lies inside."""
    mask = (n < end)[:, None] & (m < M)[None, :]
    return tl.load(p_ptr + n.to(tl.int64)[:, None] * M + m[None, :], mask=mask, other=0.0), mask


@triton.jit
def _share(p_ptr, weights_ptr, samples, M, rows, splits, BM: tl.constexpr):
    """The program's slices [BM], split and test, the end of its split's rows, and its test's part of P and of ω."""
    m, split, batch = place(M, splits, BM)
    end = tl.minimum((split + 1) * rows, samples)
    return m, split, batch, end, p_ptr + batch * samples * M, weights_ptr + batch * samples


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
def _add_rows(
    sums, factors, weights, inside, GROUP: tl.constexpr, REACH: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """The sums of all functions, with what rows of these `basis_factors` add to them."""
    SUMS: tl.constexpr = 4 * REACH + 2
    cosines, sines, cos_q, sin_q, cos_2h, sin_2h = factors
    added = ()
    for block in tl.static_range(GROUP):
        if block > 0:
            cos_q, sin_q = rotate(cos_q, sin_q, cos_2h, sin_2h)
        if WEIGHTED:
            weighted_cos = cos_q * weights
            weighted_sin = sin_q * weights
        else:
            weighted_cos = tl.where(inside, cos_q, 0.0)
            weighted_sin = tl.where(inside, sin_q, 0.0)
        added = added + (sums[block * SUMS] + weighted_cos, sums[block * SUMS + 1] + weighted_sin)
        for j in tl.static_range(REACH):
            added = added + (
                tl.fma(weighted_cos, cosines[j], sums[block * SUMS + 4 * j + 2]),
                tl.fma(weighted_sin, sines[j], sums[block * SUMS + 4 * j + 3]),
                tl.fma(weighted_sin, cosines[j], sums[block * SUMS + 4 * j + 4]),
                tl.fma(weighted_cos, sines[j], sums[block * SUMS + 4 * j + 5]),
            )
    return added


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
    m, split, batch, end, p_ptr, weights_ptr = _share(p_ptr, weights_ptr, samples, M, rows, splits, BM)
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
            factors = basis_factors(p, STEP, FIRST, REACH)
            weights = _load_weights(weights_ptr, n, end, WEIGHTED)
            chunk += weights
            sums = _add_rows(sums, factors, weights, (n < end)[:, None], GROUP, REACH, WEIGHTED)
        count += chunk
        sums = less_expected(sums, chunk, False, FIRST, GROUP, REACH, STEP)
    sums = less_expected(sums, count, True, FIRST, GROUP, REACH, STEP)

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


@triton.jit
def _combination(
    coefficients, factors, GROUP: tl.constexpr, REACH: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The combination [BN, BM] of all functions with these coefficients, at rows of these `basis_factors`."""
    SUMS: tl.constexpr = 4 * REACH + 2
    cosines, sines, cos_q, sin_q, cos_2h, sin_2h = factors
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
    return total


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
    m, split, batch, end, p_ptr, weights_ptr = _share(p_ptr, weights_ptr, samples, M, rows, splits, BM)
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
        factors = basis_factors(p, STEP, FIRST, REACH)
        total = _combination(coefficients, factors, GROUP, REACH, BN, BM)
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
    weights_ptr, counts_ptr = _weights_and_counts(p, weights)
    tensors = {
        # without a second stage no kernel reads it
        "partial_ptr": p if whole else p.new_empty(batch, splits, knots.basis_size, slices),
        "counts_ptr": counts_ptr,
        "statistics_ptr": p.new_empty(batch, slices),
        "deviations_ptr": p.new_empty(batch, 2, knots.live, slices),
    }
    sizes = {"samples": samples, "M": slices, "splits": splits}
    options = {"FUNCTIONS": knots.basis_size, "WEIGHTED": weights is not None, "enable_fp_fusion": True}
    with device_guard(p.device):
        for constants in groups:
            _sums_kernel[(tiles * splits * batch,)](
                p_ptr=p, weights_ptr=weights_ptr, **tensors, **sizes, rows=rows, **constants, **options, WHOLE=whole,
                CHUNK=CHUNK, num_warps=launch.warps,
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
    weights_ptr, counts_ptr = _weights_and_counts(p, weights)
    grad_p = torch.empty_like(p)
    to_statistics = gradient.ndim == 2
    gradient_ptr = deviations if to_statistics else gradient.contiguous()
    stride_b, stride_m = gradient.stride() if to_statistics else (0, 0)
    with device_guard(p.device):
        for constants in group_constants(knots):
            _gradient_kernel[(tiles * splits * batch,)](
                p_ptr=p, weights_ptr=weights_ptr, counts_ptr=counts_ptr, upstream_ptr=gradient,
                gradient_ptr=gradient_ptr, grad_p_ptr=grad_p, samples=samples, M=p.shape[1], rows=rows, splits=splits,
                stride_b=stride_b, stride_m=stride_m, **constants, WEIGHTED=weights is not None,
                STATISTIC=to_statistics, num_warps=launch.warps, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_p


def _weights_and_counts(p: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights and their sums [B]; without weights, the kernels read neither, and P stands in for both."""
    return (p, p) if weights is None else (weights, weights.sum(-1))
