"""SIGReg's sums and their gradient in Triton, with the basis of `sigreg_knots`.

    P        projections in fp32, [B·N, M], M contiguous
    N, M     samples of one test; slices
    S        splits of N: each program sums the rows of one split for BM slices
    F        functions of the basis; a program holds the sums for at most GROUP blocks of knots
    BN, BM   rows and slices of one tile

Each thread keeps the sums of its own rows in registers and reduces them once, at the end. A second kernel adds up the
splits in a fixed order and in fp64, so that results are the same every time. If one program sees all of N, the first
kernel does both stages.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sigreg_basis_triton import basis_factors, rotate
from .sigreg_knots import Knots

# launch table, chosen by registers and occupancy as compiled for sm_80 and sm_90; not tuned on a GPU yet
BN, BM, WARPS = 4, 64, 4
FINISH_BM, FINISH_BS, FINISH_WARPS = 16, 32, 4
# a program that holds more sums than these spills registers
MAX_SUMS = 48
# with fewer rows to a split, the reduction at its end costs too much; with more, the fp32 sums lose precision
MIN_ROWS, MAX_ROWS = 64, 256
PROGRAMS_PER_SM = 8


@triton.jit
def _tile(p_ptr, split, rows, samples, M, BN: tl.constexpr, BM: tl.constexpr):
    """The program's slices [BM], its first rows [BN], its test, and P's pointers at row 0 of that test [1, BM]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = split * rows + tl.arange(0, BN)
    batch = tl.program_id(2).to(tl.int64)
    return m, n, batch, p_ptr + (batch * samples * M + m[None, :])


@triton.jit
def _load_rows(p_ptr, n, samples, m, M):
    """Rows n of P [BN, BM], 0 outside, and the mask of what lies inside."""
    mask = (n < samples)[:, None] & (m < M)[None, :]
    return tl.load(p_ptr + n.to(tl.int64)[:, None] * M, mask=mask, other=0.0), mask


@triton.jit
def _store_deviations(sums, deviations_ptr, m, block, step, live, count, M, REACH: tl.constexpr):
    """Stores the deviations at one block's knots, from its fp64 sums [BM]; returns their part of the statistic.

    That part is Σ_k w_k (Dc² + Ds²), where D are the deviations.
    """
    total = tl.zeros_like(sums[0])
    mask = m < M
    for j in tl.static_range(1 - REACH, REACH + 1):
        if j == 0:
            cosine = sums[0]
            sine = sums[1]
        elif j > 0:
            cosine = sums[4 * j - 2] - sums[4 * j - 1]
            sine = sums[4 * j] + sums[4 * j + 1]
        else:
            cosine = sums[-4 * j - 2] + sums[-4 * j - 1]
            sine = sums[-4 * j] - sums[-4 * j + 1]
        k = tl.zeros_like(m) + ((2 * block + 1) * REACH + j)
        t = k * step
        phi = tl.exp(-0.5 * t * t)
        cosine -= count * phi
        weight = tl.where(k == live, step * phi, 2 * step * phi)
        total += tl.where(k <= live, weight * (cosine * cosine + sine * sine), 0.0)
        offset = (k - 1) * M + m
        tl.store(deviations_ptr + offset, cosine, mask=mask & (k <= live))
        tl.store(deviations_ptr + live * M + offset, sine, mask=mask & (k <= live))
    return total


@triton.jit
def _load_count(counts_ptr, batch, samples, WEIGHTED: tl.constexpr):
    """N, or Σω of the test, in fp64."""
    if WEIGHTED:
        count = tl.load(counts_ptr + batch).to(tl.float64)
    else:
        count = samples.to(tl.float64)
    return count


# "do_not_specialize": Triton would compile a kernel anew for a size of 1
@triton.jit(do_not_specialize=["samples", "rows", "splits", "live"])
def _sums_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    partial_ptr,  # [B, S, F, M]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, live, M], fp64
    samples, M, rows, splits, live, step,
    REACH: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    split = tl.program_id(1) % splits
    group = tl.program_id(1) // splits
    groups = tl.num_programs(1) // splits
    m, n, batch, p_ptr = _tile(p_ptr, split, rows, samples, M, BN, BM)
    sums = ()
    for _i in tl.static_range(GROUP * SUMS):
        sums = sums + (tl.zeros([BN, BM], tl.float32),)
    next_p, _mask = _load_rows(p_ptr, n, samples, m, M)  # [BN, BM]
    for _row in range(0, rows, BN):
        p = next_p
        # the next rows load while these are worked on
        next_p, _mask = _load_rows(p_ptr, n + BN, samples, m, M)  # [BN, BM]
        cosines, sines, cos_q, sin_q, cos_2h, sin_2h = basis_factors(p, step, group * GROUP, REACH, GROUPED)
        added = ()
        for block in tl.static_range(GROUP):
            if block > 0:
                cos_q, sin_q = rotate(cos_q, sin_q, cos_2h, sin_2h)
            weighted_cos = cos_q
            weighted_sin = sin_q
            if WEIGHTED:
                weight = tl.load(weights_ptr + batch * samples + n, mask=n < samples, other=0.0)[:, None]  # [BN, 1]
                weighted_cos *= weight
                weighted_sin *= weight
            else:
                weighted_cos = tl.where((n < samples)[:, None], cos_q, 0.0)
                weighted_sin = tl.where((n < samples)[:, None], sin_q, 0.0)
            added = added + (sums[block * SUMS] + weighted_cos, sums[block * SUMS + 1] + weighted_sin)
            for j in tl.static_range(REACH):
                added = added + (
                    tl.fma(weighted_cos, cosines[j], sums[block * SUMS + 4 * j + 2]),
                    tl.fma(weighted_sin, sines[j], sums[block * SUMS + 4 * j + 3]),
                    tl.fma(weighted_sin, cosines[j], sums[block * SUMS + 4 * j + 4]),
                    tl.fma(weighted_cos, sines[j], sums[block * SUMS + 4 * j + 5]),
                )
        sums = added
        n += BN

    if WHOLE:
        count = _load_count(counts_ptr, batch, samples, WEIGHTED)
        total = tl.zeros([BM], tl.float64)
        step_fp64 = total + step
        deviations_ptr += batch * 2 * live * M
        for block in tl.static_range(GROUP):
            block_sums = ()
            for i in tl.static_range(SUMS):
                block_sums = block_sums + (tl.sum(sums[block * SUMS + i], axis=0).to(tl.float64),)
            total += _store_deviations(block_sums, deviations_ptr, m, block, step_fp64, live, count, M, REACH)
        total = total / tl.maximum(count, 1e-30)
        tl.store(statistics_ptr + batch * M + m, total.to(tl.float32), mask=m < M)
    else:
        partial_ptr += ((batch * splits + split) * groups + group) * GROUP * SUMS * M
        for i in tl.static_range(GROUP * SUMS):
            tl.store(partial_ptr + i * M + m, tl.sum(sums[i], axis=0), mask=m < M)


@triton.jit(do_not_specialize=["samples", "splits", "live"])
def _finish_kernel(
    partial_ptr,  # [B, S, F, M]
    counts_ptr,  # [B]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, live, M], fp64
    samples, M, splits, functions, live, step,
    REACH: tl.constexpr, WEIGHTED: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    batch = tl.program_id(1).to(tl.int64)
    in_m = m < M
    count = _load_count(counts_ptr, batch, samples, WEIGHTED)
    total = tl.zeros([BM], tl.float64)
    step_fp64 = total + step
    deviations_ptr += batch * 2 * live * M
    for block in range((live + 2 * REACH - 1) // (2 * REACH)):
        block_sums = ()
        for i in tl.static_range(SUMS):
            sum_M = tl.zeros([BM], tl.float64)
            for first in range(0, splits, BS):
                s = first + tl.arange(0, BS)
                offsets = ((batch * splits + s) * functions + block * SUMS + i)[:, None] * M + m[None, :]
                part = tl.load(partial_ptr + offsets, mask=(s < splits)[:, None] & in_m[None, :], other=0.0)  # [BS, BM]
                sum_M += tl.sum(part.to(tl.float64), axis=0)
            block_sums = block_sums + (sum_M,)
        total += _store_deviations(block_sums, deviations_ptr, m, block, step_fp64, live, count, M, REACH)
    total = total / tl.maximum(count, 1e-30)
    tl.store(statistics_ptr + batch * M + m, total.to(tl.float32), mask=in_m)


@triton.jit
def _knot_gradient(scale, gradient_ptr, deviations_ptr, m, k, live, step, M, STATISTIC: tl.constexpr):
    """The coefficients [BM] of cos kθ and sin kθ in ∂/∂P, from the gradient to the statistic or to the deviations."""
    k = tl.zeros_like(m) + k
    mask = (m < M) & (k <= live)
    offset = (k - 1) * M + m
    t = k * step
    if STATISTIC:
        factor = scale * tl.where(k == live, 2 * step, 4 * step) * tl.exp(-0.5 * t * t)
        to_cosine = factor * tl.load(deviations_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        to_sine = factor * tl.load(deviations_ptr + live * M + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        to_cosine = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        to_sine = tl.load(gradient_ptr + live * M + offset, mask=mask, other=0.0).to(tl.float32)
    return t * to_sine, -t * to_cosine


@triton.jit
def _block_coefficients(
    scale, gradient_ptr, deviations_ptr, m, block, live, step, M, REACH: tl.constexpr, STATISTIC: tl.constexpr
):
    """The coefficients of one block's functions in ∂/∂P: a tuple of [1, BM], in the order of the basis."""
    q = (2 * block + 1) * REACH
    cosine, sine = _knot_gradient(scale, gradient_ptr, deviations_ptr, m, q, live, step, M, STATISTIC)
    coefficients = (cosine[None, :], sine[None, :])
    for j in tl.static_range(1, REACH + 1):
        up_cos, up_sin = _knot_gradient(scale, gradient_ptr, deviations_ptr, m, q + j, live, step, M, STATISTIC)
        down_cos = tl.zeros_like(up_cos)
        down_sin = tl.zeros_like(up_sin)
        # the lowest knot of a block is the highest of the block before it
        if j < REACH:
            down_cos, down_sin = _knot_gradient(scale, gradient_ptr, deviations_ptr, m, q - j, live, step, M, STATISTIC)
        coefficients = coefficients + (
            (up_cos + down_cos)[None, :],
            (down_cos - up_cos)[None, :],
            (up_sin + down_sin)[None, :],
            (up_sin - down_sin)[None, :],
        )
    return coefficients


@triton.jit(do_not_specialize=["samples", "rows", "live", "first_block"])
def _gradient_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    gradient_ptr,  # to the statistics, [B, M] with any strides, or to the deviations, [B, 2, live, M], fp64
    deviations_ptr,  # [B, 2, live, M], fp64
    grad_p_ptr,  # [B*N, M]
    samples, M, rows, live, first_block, step, stride_b, stride_m,
    REACH: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, WEIGHTED: tl.constexpr, STATISTIC: tl.constexpr,
    ADD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 4 * REACH + 2
    m, n, batch, p_ptr = _tile(p_ptr, tl.program_id(1), rows, samples, M, BN, BM)
    deviations_ptr += batch * 2 * live * M
    grad_p_ptr += batch * samples * M + m[None, :]
    scale = tl.zeros([BM], tl.float32)
    if STATISTIC:
        scale += tl.load(gradient_ptr + batch * stride_b + m * stride_m, mask=m < M, other=0.0)  # [BM]
        if WEIGHTED:
            scale /= tl.maximum(tl.load(counts_ptr + batch), 1e-30)
        else:
            scale /= samples.to(tl.float32)
    else:
        gradient_ptr += batch * 2 * live * M
    coefficients = ()
    for block in tl.static_range(GROUP):
        coefficients = coefficients + _block_coefficients(
            scale, gradient_ptr, deviations_ptr, m, first_block + block, live, step, M, REACH, STATISTIC
        )

    next_p, next_mask = _load_rows(p_ptr, n, samples, m, M)  # [BN, BM]
    for _row in range(0, rows, BN):
        p = next_p
        mask = next_mask
        # the next rows load while these are worked on
        next_p, next_mask = _load_rows(p_ptr, n + BN, samples, m, M)  # [BN, BM]
        cosines, sines, cos_q, sin_q, cos_2h, sin_2h = basis_factors(p, step, first_block, REACH, GROUPED)
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
            total *= tl.load(weights_ptr + batch * samples + n, mask=n < samples, other=0.0)[:, None]  # [BN, 1]
        offsets = n.to(tl.int64)[:, None] * M
        if ADD:
            total += tl.load(grad_p_ptr + offsets, mask=mask, other=0.0)  # [BN, BM]
        tl.store(grad_p_ptr + offsets, total, mask=mask)
        n += BN


def program_constants(knots: Knots, *, weighted: bool) -> dict[str, Any]:
    """The compile-time arguments that the sums' kernel and the gradient's share."""
    group, groups = group_blocks(knots)
    return {
        "REACH": knots.reach, "GROUP": group, "GROUPED": groups > 1, "WEIGHTED": weighted, "BN": BN, "BM": BM,
    }  # fmt: skip


def statistics(p: Tensor, weights: Tensor | None, samples: int, knots: Knots) -> tuple[Tensor, Tensor]:
    """P [B·N, M] and weights [B, N] → statistics [B, M], and deviations [B, 2, K − 1, M] in fp64."""
    batch, slices = p.shape[0] // samples, p.shape[1]
    group, groups = group_blocks(knots)
    rows, splits = _split(samples, triton.cdiv(slices, BM) * batch * groups, p.device)
    functions = groups * group * (4 * knots.reach + 2)
    whole = splits == 1 and groups == 1
    statistics_BM = p.new_empty(batch, slices)
    deviations = p.new_empty(batch, 2, knots.live, slices, dtype=torch.float64)
    # an argument that a kernel does not read is P
    partial = p if whole else p.new_empty(batch, splits, functions, slices)
    counts = p if weights is None else weights.sum(-1)
    outputs = {"statistics_ptr": statistics_BM, "deviations_ptr": deviations}
    sizes = {"samples": samples, "M": slices, "splits": splits, "live": knots.live, "step": knots.step(p.dtype)}
    with _device_guard(p.device):
        _sums_kernel[(triton.cdiv(slices, BM), splits * groups, batch)](
            p_ptr=p, weights_ptr=p if weights is None else weights, counts_ptr=counts, partial_ptr=partial,
            **outputs, **sizes, rows=rows, WHOLE=whole, **program_constants(knots, weighted=weights is not None),
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if not whole:
            _finish_kernel[(triton.cdiv(slices, FINISH_BM), batch)](
                partial_ptr=partial, counts_ptr=counts, **outputs, **sizes, functions=functions,
                REACH=knots.reach, WEIGHTED=weights is not None, BS=FINISH_BS, BM=FINISH_BM,
                num_warps=FINISH_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return statistics_BM, deviations


def projection_gradient(
    gradient: Tensor, deviations: Tensor, p: Tensor, weights: Tensor | None, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P [B·N, M] from the gradient to the statistics, [B, M], or to the deviations, [B, 2, K − 1, M]."""
    batch, slices = p.shape[0] // samples, p.shape[1]
    group, groups = group_blocks(knots)
    rows, splits = _split(samples, triton.cdiv(slices, BM) * batch, p.device)
    grad_p = torch.empty_like(p)
    to_statistics = gradient.ndim == 2
    stride_b, stride_m = gradient.stride() if to_statistics else (0, 0)
    with _device_guard(p.device):
        for index in range(groups):
            _gradient_kernel[(triton.cdiv(slices, BM), splits, batch)](
                p_ptr=p, weights_ptr=p if weights is None else weights,
                counts_ptr=p if weights is None else weights.sum(-1),
                gradient_ptr=gradient if to_statistics else gradient.contiguous(),
                deviations_ptr=deviations, grad_p_ptr=grad_p,
                samples=samples, M=slices, rows=rows, live=knots.live, first_block=index * group,
                step=knots.step(p.dtype), stride_b=stride_b, stride_m=stride_m, STATISTIC=to_statistics, ADD=index > 0,
                **program_constants(knots, weighted=weights is not None), num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_p


def group_blocks(knots: Knots) -> tuple[int, int]:
    """(blocks of knots that one program holds, programs that hold all of them)."""
    group = min(knots.blocks, max(1, MAX_SUMS // (4 * knots.reach + 2)))
    return group, math.ceil(knots.blocks / group)


def _split(samples: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(rows of a split, splits) that give about PROGRAMS_PER_SM programs to each multiprocessor."""
    wanted = math.ceil(PROGRAMS_PER_SM * _multiprocessors(device) / programs)
    rows = min(max(math.ceil(samples / wanted), MIN_ROWS), MAX_ROWS, samples)
    rows = triton.cdiv(rows, BN) * BN
    return rows, math.ceil(samples / rows)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # the interpreter runs on a CPU and stands for a GPU of this size
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current: Triton launches on the current device, wherever the arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
