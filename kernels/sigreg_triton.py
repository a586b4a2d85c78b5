"""SIGReg's sums and their gradient in Triton, by the recipe of `sigreg_knots`.

    P_NM    projections in fp32, (B·N, M) with M contiguous
    S       splits of N; each program sums one of them for BM slices
    F       the functions of the basis, of which a program holds those of at most GROUP blocks of knots

A program's threads keep the sums of their own rows in registers and add them up once at its end. Sums over splits are a
second stage in a fixed order and in fp64, so results are the same every time. Where one program sees all of N it does
both stages, in one launch.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sigreg_knots import Knots

# launch table, chosen by registers and occupancy as compiled for sm_80 and sm_90; not tuned on a GPU yet
BN, BM, WARPS = 4, 64, 4
FINISH_BM, FINISH_BS, FINISH_WARPS = 16, 32, 4
# sums held by one program: more than these would spill
MAX_SUMS = 48
# rows of a split: no fewer, for the sums at its end to be worth it, and no more, for fp32 to hold them
MIN_ROWS, MAX_ROWS = 64, 256
PROGRAMS_PER_SM = 8


@triton.jit
def _sincos(p, step):
    """sin and cos of step·P by one reduction (Cody and Waite, Cephes's polynomials), without the library's slow path.

    |θ| up to some 10⁴ is reduced exactly. A θ too large to be reduced has no phase left in fp32, and gives some number
    in [−1, 1]. NaN stays.
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
    """cos jθ and sin jθ, j = 1..REACH, each from two of about half its order."""
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
def _turn(cosine, sine, by_cosine, by_sine):
    return tl.fma(cosine, by_cosine, -sine * by_sine), tl.fma(sine, by_cosine, cosine * by_sine)


@triton.jit
def _deviate(sums, deviations_ptr, columns, block, step, live, count, M, REACH: tl.constexpr):
    """One block's sums (fp64, [BM] each) → its knots' deviations, stored; their part of Σ_k w_k (Dc² + Ds²)."""
    total = tl.zeros_like(sums[0])
    mask = columns < M
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
        k = tl.zeros_like(columns) + ((2 * block + 1) * REACH + j)
        t = k * step
        phi = tl.exp(-0.5 * t * t)
        cosine -= count * phi
        weight = tl.where(k == live, step * phi, 2 * step * phi)
        total += tl.where(k <= live, weight * (cosine * cosine + sine * sine), 0.0)
        offset = (k - 1) * M + columns
        tl.store(deviations_ptr + offset, cosine, mask=mask & (k <= live))
        tl.store(deviations_ptr + live * M + offset, sine, mask=mask & (k <= live))
    return total


# a size of 1 must stay a number of the kernel's, not one of the compiler's
@triton.jit(do_not_specialize=["samples", "rows", "splits", "live"])
def _sums_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    partial_ptr,  # [B, S, F, M]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, live, M], fp64
    samples,
    M,
    rows,
    splits,
    live,
    step,
    REACH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    SUMS: tl.constexpr = 4 * REACH + 2
    columns = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1) % splits
    group = tl.program_id(1) // splits
    groups = tl.num_programs(1) // splits
    batch = tl.program_id(2).to(tl.int64)
    in_m = columns < M

    sums = ()
    for _i in tl.static_range(GROUP * SUMS):
        sums = sums + (tl.zeros([BN, BM], tl.float32),)
    n = split * rows + tl.arange(0, BN)
    p_ptr += batch * samples * M + columns[None, :]
    p = tl.load(p_ptr + n.to(tl.int64)[:, None] * M, mask=(n < samples)[:, None] & in_m[None, :], other=0.0)
    for _row in range(0, rows, BN):
        now = p
        # the next rows are on their way while these are worked on
        following = n + BN
        in_p = (following < samples)[:, None] & in_m[None, :]
        p = tl.load(p_ptr + following.to(tl.int64)[:, None] * M, mask=in_p, other=0.0)
        cosines, sines = _harmonics(now, step, REACH)
        q_cosine = cosines[REACH - 1]
        q_sine = sines[REACH - 1]
        two_h_cosine = tl.fma(-2 * q_sine, q_sine, 1.0)
        two_h_sine = 2 * q_sine * q_cosine
        if GROUPED:
            for _before in range(group * GROUP):
                q_cosine, q_sine = _turn(q_cosine, q_sine, two_h_cosine, two_h_sine)
        added = ()
        for block in tl.static_range(GROUP):
            if block > 0:
                q_cosine, q_sine = _turn(q_cosine, q_sine, two_h_cosine, two_h_sine)
            cos_q = q_cosine
            sin_q = q_sine
            if WEIGHTED:
                weight = tl.load(weights_ptr + batch * samples + n, mask=n < samples, other=0.0)[:, None]
                cos_q *= weight
                sin_q *= weight
            else:
                cos_q = tl.where((n < samples)[:, None], cos_q, 0.0)
                sin_q = tl.where((n < samples)[:, None], sin_q, 0.0)
            added = added + (sums[block * SUMS] + cos_q, sums[block * SUMS + 1] + sin_q)
            for j in tl.static_range(REACH):
                added = added + (
                    tl.fma(cos_q, cosines[j], sums[block * SUMS + 4 * j + 2]),
                    tl.fma(sin_q, sines[j], sums[block * SUMS + 4 * j + 3]),
                    tl.fma(sin_q, cosines[j], sums[block * SUMS + 4 * j + 4]),
                    tl.fma(cos_q, sines[j], sums[block * SUMS + 4 * j + 5]),
                )
        sums = added
        n = following

    if WHOLE:
        if WEIGHTED:
            count = tl.load(counts_ptr + batch).to(tl.float64)
        else:
            count = samples.to(tl.float64)
        total = tl.zeros([BM], tl.float64)
        wide_step = total + step
        for block in tl.static_range(GROUP):
            of_block = ()
            for i in tl.static_range(SUMS):
                of_block = of_block + (tl.sum(sums[block * SUMS + i], axis=0).to(tl.float64),)
            total += _deviate(
                of_block, deviations_ptr + batch * 2 * live * M, columns, block, wide_step, live, count, M, REACH,
            )  # fmt: skip
        total = total / tl.maximum(count, 1e-30)
        tl.store(statistics_ptr + batch * M + columns, total.to(tl.float32), mask=in_m)
    else:
        partial_ptr += ((batch * splits + split) * groups + group) * GROUP * SUMS * M
        for i in tl.static_range(GROUP * SUMS):
            tl.store(partial_ptr + i * M + columns, tl.sum(sums[i], axis=0), mask=in_m)


@triton.jit(do_not_specialize=["samples", "splits", "live"])
def _finish_kernel(
    partial_ptr,  # [B, S, F, M]
    counts_ptr,  # [B]
    statistics_ptr,  # [B, M]
    deviations_ptr,  # [B, 2, live, M], fp64
    samples,
    M,
    splits,
    functions,
    live,
    step,
    REACH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
):
    SUMS: tl.constexpr = 4 * REACH + 2
    columns = tl.program_id(0) * BM + tl.arange(0, BM)
    batch = tl.program_id(1).to(tl.int64)
    in_m = columns < M
    if WEIGHTED:
        count = tl.load(counts_ptr + batch).to(tl.float64)
    else:
        count = samples.to(tl.float64)
    total = tl.zeros([BM], tl.float64)
    wide_step = total + step
    for block in range((live + 2 * REACH - 1) // (2 * REACH)):
        of_block = ()
        for i in tl.static_range(SUMS):
            found = tl.zeros([BM], tl.float64)
            for first in range(0, splits, BS):
                s = first + tl.arange(0, BS)
                offsets = ((batch * splits + s) * functions + block * SUMS + i)[:, None] * M + columns[None, :]
                part = tl.load(partial_ptr + offsets, mask=(s < splits)[:, None] & in_m[None, :], other=0.0)
                found += tl.sum(part.to(tl.float64), axis=0)
            of_block = of_block + (found,)
        total += _deviate(
            of_block, deviations_ptr + batch * 2 * live * M, columns, block, wide_step, live, count, M, REACH,
        )  # fmt: skip
    total = total / tl.maximum(count, 1e-30)
    tl.store(statistics_ptr + batch * M + columns, total.to(tl.float32), mask=in_m)


@triton.jit
def _knot_gradient(scale, gradient_ptr, deviations_ptr, columns, k, live, step, M, STATISTIC: tl.constexpr):
    """The coefficients of cos kθ and sin kθ in ∂/∂P, from the gradient to the statistic or to the deviations."""
    k = tl.zeros_like(columns) + k
    mask = (columns < M) & (k <= live)
    offset = (k - 1) * M + columns
    t = k * step
    if STATISTIC:
        factor = scale * tl.where(k == live, 2 * step, 4 * step) * tl.exp(-0.5 * t * t)
        to_cosine = factor * tl.load(deviations_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        to_sine = factor * tl.load(deviations_ptr + live * M + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        to_cosine = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        to_sine = tl.load(gradient_ptr + live * M + offset, mask=mask, other=0.0).to(tl.float32)
    return t * to_sine, -t * to_cosine


@triton.jit(do_not_specialize=["samples", "rows", "live", "first_block"])
def _slopes_kernel(
    p_ptr,  # [B*N, M]
    weights_ptr,  # [B, N]
    counts_ptr,  # [B]
    gradient_ptr,  # to the statistics, [B, M] with any strides, or to the deviations, [B, 2, live, M], fp64
    deviations_ptr,  # [B, 2, live, M], fp64
    slopes_ptr,  # [B*N, M]
    samples,
    M,
    rows,
    live,
    first_block,
    step,
    stride_b,
    stride_m,
    REACH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STATISTIC: tl.constexpr,
    ADD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    SUMS: tl.constexpr = 4 * REACH + 2
    columns = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    in_m = columns < M
    deviations_ptr += batch * 2 * live * M
    scale = tl.zeros([BM], tl.float32)
    if STATISTIC:
        scale += tl.load(gradient_ptr + batch * stride_b + columns * stride_m, mask=in_m, other=0.0)
        if WEIGHTED:
            scale /= tl.maximum(tl.load(counts_ptr + batch), 1e-30)
        else:
            scale /= samples.to(tl.float32)
    else:
        gradient_ptr += batch * 2 * live * M
    coefficients = ()
    for block in tl.static_range(GROUP):
        q = (2 * (first_block + block) + 1) * REACH
        cosine, sine = _knot_gradient(scale, gradient_ptr, deviations_ptr, columns, q, live, step, M, STATISTIC)
        coefficients = coefficients + (cosine[None, :], sine[None, :])
        for j in tl.static_range(1, REACH + 1):
            up_cosine, up_sine = _knot_gradient(
                scale, gradient_ptr, deviations_ptr, columns, q + j, live, step, M, STATISTIC
            )
            down_cosine = tl.zeros_like(up_cosine)
            down_sine = tl.zeros_like(up_sine)
            # the least knot of a block is the greatest of the one before
            if j < REACH:
                down_cosine, down_sine = _knot_gradient(
                    scale, gradient_ptr, deviations_ptr, columns, q - j, live, step, M, STATISTIC
                )
            coefficients = coefficients + (
                (up_cosine + down_cosine)[None, :],
                (down_cosine - up_cosine)[None, :],
                (up_sine + down_sine)[None, :],
                (up_sine - down_sine)[None, :],
            )

    n = split * rows + tl.arange(0, BN)
    p_ptr += batch * samples * M + columns[None, :]
    slopes_ptr += batch * samples * M + columns[None, :]
    mask = (n < samples)[:, None] & in_m[None, :]
    p = tl.load(p_ptr + n.to(tl.int64)[:, None] * M, mask=mask, other=0.0)
    for _row in range(0, rows, BN):
        now = p
        # the next rows are on their way while these are worked on
        following = n + BN
        next_mask = (following < samples)[:, None] & in_m[None, :]
        p = tl.load(p_ptr + following.to(tl.int64)[:, None] * M, mask=next_mask, other=0.0)
        cosines, sines = _harmonics(now, step, REACH)
        q_cosine = cosines[REACH - 1]
        q_sine = sines[REACH - 1]
        two_h_cosine = tl.fma(-2 * q_sine, q_sine, 1.0)
        two_h_sine = 2 * q_sine * q_cosine
        if GROUPED:
            for _before in range(first_block):
                q_cosine, q_sine = _turn(q_cosine, q_sine, two_h_cosine, two_h_sine)
        total = tl.zeros([BN, BM], tl.float32)
        for block in tl.static_range(GROUP):
            if block > 0:
                q_cosine, q_sine = _turn(q_cosine, q_sine, two_h_cosine, two_h_sine)
            with_cosine = coefficients[block * SUMS] + tl.zeros([BN, BM], tl.float32)
            with_sine = coefficients[block * SUMS + 1] + tl.zeros([BN, BM], tl.float32)
            for j in tl.static_range(REACH):
                with_cosine = tl.fma(coefficients[block * SUMS + 4 * j + 2], cosines[j], with_cosine)
                with_cosine = tl.fma(coefficients[block * SUMS + 4 * j + 5], sines[j], with_cosine)
                with_sine = tl.fma(coefficients[block * SUMS + 4 * j + 3], sines[j], with_sine)
                with_sine = tl.fma(coefficients[block * SUMS + 4 * j + 4], cosines[j], with_sine)
            total = tl.fma(q_cosine, with_cosine, total)
            total = tl.fma(q_sine, with_sine, total)
        if WEIGHTED:
            total *= tl.load(weights_ptr + batch * samples + n, mask=n < samples, other=0.0)[:, None]
        offsets = n.to(tl.int64)[:, None] * M
        if ADD:
            total += tl.load(slopes_ptr + offsets, mask=mask, other=0.0)
        tl.store(slopes_ptr + offsets, total, mask=mask)
        n = following
        mask = next_mask


def statistics(p: Tensor, weights: Tensor | None, samples: int, knots: Knots) -> tuple[Tensor, Tensor]:
    """P_NM, weights (B, N) → statistics (B, M) and deviations (B, 2, K − 1, M) in fp64."""
    batch, slices = p.shape[0] // samples, p.shape[1]
    group, groups = groups_of(knots)
    rows, splits = _split(samples, triton.cdiv(slices, BM) * batch * groups, p.device)
    functions = groups * group * (4 * knots.reach + 2)
    whole = splits == 1 and groups == 1
    found = p.new_empty(batch, slices)
    deviations = p.new_empty(batch, 2, knots.live, slices, dtype=torch.float64)
    # an argument that a kernel does not read is P
    partial = p if whole else p.new_empty(batch, splits, functions, slices)
    counts = p if weights is None else weights.sum(-1)
    with _on(p.device):
        _sums_kernel[(triton.cdiv(slices, BM), splits * groups, batch)](
            p,
            p if weights is None else weights,
            counts,
            partial,
            found,
            deviations,
            samples,
            slices,
            rows,
            splits,
            knots.live,
            knots.step(p.dtype),
            REACH=knots.reach,
            GROUP=group,
            GROUPED=groups > 1,
            WEIGHTED=weights is not None,
            WHOLE=whole,
            BN=BN,
            BM=BM,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        if not whole:
            _finish_kernel[(triton.cdiv(slices, FINISH_BM), batch)](
                partial,
                counts,
                found,
                deviations,
                samples,
                slices,
                splits,
                functions,
                knots.live,
                knots.step(p.dtype),
                REACH=knots.reach,
                WEIGHTED=weights is not None,
                BS=FINISH_BS,
                BM=FINISH_BM,
                num_warps=FINISH_WARPS,
                enable_fp_fusion=True,
            )
    return found, deviations


def slopes(
    gradient: Tensor, deviations: Tensor, p: Tensor, weights: Tensor | None, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P_NM from the gradient to the statistics, (B, M) with any strides, or to the deviations, (B, 2, K − 1, M)."""
    batch, slices = p.shape[0] // samples, p.shape[1]
    group, groups = groups_of(knots)
    rows, splits = _split(samples, triton.cdiv(slices, BM) * batch, p.device)
    found = torch.empty_like(p)
    of_statistics = gradient.ndim == 2
    strides = gradient.stride() if of_statistics else (0, 0)
    with _on(p.device):
        for index in range(groups):
            _slopes_kernel[(triton.cdiv(slices, BM), splits, batch)](
                p,
                p if weights is None else weights,
                p if weights is None else weights.sum(-1),
                gradient if of_statistics else gradient.contiguous(),
                deviations,
                found,
                samples,
                slices,
                rows,
                knots.live,
                index * group,
                knots.step(p.dtype),
                *strides,
                REACH=knots.reach,
                GROUP=group,
                GROUPED=groups > 1,
                WEIGHTED=weights is not None,
                STATISTIC=of_statistics,
                ADD=index > 0,
                BN=BN,
                BM=BM,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return found


def groups_of(knots: Knots) -> tuple[int, int]:
    """(blocks that one program holds, programs for all of them)."""
    group = min(knots.blocks, max(1, MAX_SUMS // (4 * knots.reach + 2)))
    return group, math.ceil(knots.blocks / group)


def _split(samples: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(rows of a split, splits) for about PROGRAMS_PER_SM programs on each multiprocessor."""
    wanted = math.ceil(PROGRAMS_PER_SM * _multiprocessors(device) / programs)
    rows = min(max(math.ceil(samples / wanted), MIN_ROWS), MAX_ROWS, samples)
    rows = triton.cdiv(rows, BN) * BN
    return rows, math.ceil(samples / rows)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # interpreted, as on some GPU
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
