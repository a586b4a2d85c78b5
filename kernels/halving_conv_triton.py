"""The halving convolution with its SiLU and means, and its gradients, in Triton; `halving_conv` has the formulas.

    t       a tap and a channel of the blocks: tap 2r + c = t // KP, of row r and column c, and channel k = t % KP
    KP      channels of a block, filled up to a power of two
    BW, BN  pixels of a row and output channels of a tile

The convolution's result is written nowhere. The gradients compute it again: its images are some thirty times smaller.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .impl import device_guard

# launch table: the fastest of a few on an H100, for 256 images of 128 px and 128 outputs in bf16 (µs: 214 forward, 503
# and 486 to 537 for the gradients; with eight warps 231, 787 and 574)
MAX_BW, MAX_BN = 64, 64
IMAGES_BN = 32  # at most, for the gradient that holds three tiles
PROGRAMS = 512  # that share the pixels of the weight's gradient; fixed, so that every GPU adds in the same order
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def _taps(KP: tl.constexpr):
    """The tap 2r + c and the channel k of each t, [4KP]."""
    t = tl.arange(0, 4 * KP)
    return t // KP, t % KP


@triton.jit
def _pixels(x_ptr, sample, row, column, W, K, SB, SI, KP: tl.constexpr):
    """The blocks that a row's pixels read: [BW, 4KP], zeros outside."""
    tap, k = _taps(KP)
    r, c = tap // 2, tap % 2
    x_ptr += sample.to(tl.int64) * SB
    offset = (row + r)[None, :] * SI + (column[:, None] + c[None, :]) * K + k[None, :]
    return tl.load(x_ptr + offset, mask=(column < W)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _weights(w_ptr, tap, k, n, N, K, SN, SK, SR, SC):
    """The weights at taps, channels and outputs, whose shapes are broadcast; zeros outside."""
    offset = k * SK + tap // 2 * SR + tap % 2 * SC + n * SN
    return tl.load(w_ptr + offset, mask=(k < K) & (n < N), other=0.0)


@triton.jit
def _gradient_to_p(p, gy_ptr, gs_ptr, sample, row, column, n, H, W, N):
    """The gradient to the convolution's result p, [BW, BN], zeros outside."""
    mask = (column < W)[:, None] & (n < N)[None, :]
    base = sample.to(tl.int64) * (H * W * N)
    g = tl.load(gy_ptr + base + (row * W + column)[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
    # half as many rows and columns of twice the channels
    square = (row // 2) * (W // 2) + column // 2
    mean = tl.load(gs_ptr + base // 2 + square[:, None] * (2 * N) + (2 * n + row % 2)[None, :], mask=mask, other=0.0)
    s = tl.sigmoid(p)
    return (g + 0.5 * mean.to(tl.float32)) * s * (1 + p * (1 - s))


@triton.jit
def _conv_forward_kernel(
    x_ptr,  # [B, H+1, W+1, K], samples and rows SB and SI apart
    w_ptr,  # [N, K, 2, 2]
    y_ptr,  # [B, H, W, N]
    s_ptr,  # [B, H/2, W/2, 2N]
    H, W, N, K, SB, SI, SN, SK, SR, SC,
    KP: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(W, BW)
    pair = tl.program_id(0) // across
    sample, i = pair // (H // 2), pair % (H // 2)
    start, first = (tl.program_id(0) % across) * BW, tl.program_id(1) * BN
    column, n = start + tl.arange(0, BW), first + tl.arange(0, BN)
    tap, k = _taps(KP)
    w = _weights(w_ptr, tap[:, None], k[:, None], n[None, :], N, K, SN, SK, SR, SC)  # [4KP, BN]
    base = sample.to(tl.int64) * (H * W * N)
    mask = (column < W)[:, None] & (n < N)[None, :]
    p0 = tl.dot(_pixels(x_ptr, sample, 2 * i, column, W, K, SB, SI, KP), w, input_precision="ieee")
    y0 = p0 * tl.sigmoid(p0)
    offset = (2 * i * W + column)[:, None] * N + n[None, :]
    tl.store(y_ptr + base + offset, y0.to(y_ptr.dtype.element_ty), mask=mask)
    p1 = tl.dot(_pixels(x_ptr, sample, 2 * i + 1, column, W, K, SB, SI, KP), w, input_precision="ieee")
    y1 = p1 * tl.sigmoid(p1)
    tl.store(y_ptr + base + W * N + offset, y1.to(y_ptr.dtype.element_ty), mask=mask)
    means = tl.join(
        tl.sum(tl.reshape(y0, (BW // 2, 2, BN)), 1) * 0.5, tl.sum(tl.reshape(y1, (BW // 2, 2, BN)), 1) * 0.5
    )
    half, channel = start // 2 + tl.arange(0, BW // 2), 2 * first + tl.arange(0, 2 * BN)
    offset = (i * (W // 2) + half)[:, None] * (2 * N) + channel[None, :]
    mask = (half < W // 2)[:, None] & (channel < 2 * N)[None, :]
    tl.store(s_ptr + base // 2 + offset, tl.reshape(means, (BW // 2, 2 * BN)).to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _images_kernel(
    gy_ptr, gs_ptr,  # [B, H, W, N], [B, H/2, W/2, 2N]
    x_ptr, w_ptr,  # as in the forward kernel
    gx_ptr,  # [B, H, W, 2, 2, K]
    H, W, N, K, SB, SI, SN, SK, SR, SC,
    KP: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(W, BW)
    line = tl.program_id(0) // across
    sample, row = line // H, line % H
    column = (tl.program_id(0) % across) * BW + tl.arange(0, BW)
    x = _pixels(x_ptr, sample, row, column, W, K, SB, SI, KP)
    tap, k = _taps(KP)
    gradient = tl.zeros((BW, 4 * KP), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        w = _weights(w_ptr, tap[:, None], k[:, None], n[None, :], N, K, SN, SK, SR, SC)  # [4KP, BN]
        p = tl.dot(x, w, input_precision="ieee")
        g = _gradient_to_p(p, gy_ptr, gs_ptr, sample, row, column, n, H, W, N).to(x.dtype)
        turned = _weights(w_ptr, tap[None, :], k[None, :], n[:, None], N, K, SN, SK, SR, SC)  # [BN, 4KP]
        gradient = tl.dot(g, turned, gradient, input_precision="ieee")
    offset = (row * W + column)[:, None] * (4 * K) + (tap * K + k)[None, :]
    mask = (column < W)[:, None] & (k < K)[None, :]
    gx_ptr += sample.to(tl.int64) * (H * W * 4 * K)
    tl.store(gx_ptr + offset, gradient.to(gx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    gy_ptr, gs_ptr,  # [B, H, W, N], [B, H/2, W/2, 2N]
    x_ptr, w_ptr,  # as in the forward kernel
    gw_ptr,  # [programs, 2, 2, K, N]
    B, H, W, N, K, SB, SI, SN, SK, SR, SC,
    KP: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    program, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    across = tl.cdiv(W, BW)
    tiles = B * H * across
    share = tl.cdiv(tiles, tl.num_programs(0))
    tap, k = _taps(KP)
    w = _weights(w_ptr, tap[:, None], k[:, None], n[None, :], N, K, SN, SK, SR, SC)  # [4KP, BN]
    sums = tl.zeros((4 * KP, BN), tl.float32)
    for tile in range(program * share, tl.minimum((program + 1) * share, tiles)):
        row, column = tile // across, (tile % across) * BW + tl.arange(0, BW)
        x = _pixels(x_ptr, row // H, row % H, column, W, K, SB, SI, KP)
        p = tl.dot(x, w, input_precision="ieee")
        g = _gradient_to_p(p, gy_ptr, gs_ptr, row // H, row % H, column, n, H, W, N).to(x.dtype)
        sums = tl.dot(tl.trans(x), g, sums, input_precision="ieee")
    offset = ((program * 4 + tap) * K + k)[:, None] * N + n[None, :]
    tl.store(gw_ptr + offset, sums, mask=(k < K)[:, None] & (n < N)[None, :])


def constants(channels: int, outputs: int, width: int, most: int = MAX_BN) -> dict[str, int]:
    """The compile-time arguments for K channels of a block, N outputs, of which a tile has `most` at most, and W."""
    # each side of a tensor core's product is sixteen at least
    outputs, width = (max(16, triton.next_power_of_2(size)) for size in (outputs, width))
    return {"KP": max(8, triton.next_power_of_2(channels)), "BW": min(MAX_BW, width), "BN": min(most, outputs)}


def forward(blocks: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, H+1, W+1) and (N, K, 2, 2) → (B, N, H, W) and (B, 2N, H/2, W/2), channels-last."""
    batch, height, width, channels = _sizes(blocks)
    outputs, fixed = len(weight), constants(channels, len(weight), width)
    y = blocks.new_empty(batch, height, width, outputs)
    means = blocks.new_empty(batch, height // 2, width // 2, 2 * outputs)
    grid = (batch * (height // 2) * triton.cdiv(width, fixed["BW"]), triton.cdiv(outputs, fixed["BN"]))
    if grid[0]:
        with device_guard(blocks.device):
            _conv_forward_kernel[grid](y_ptr=y, s_ptr=means, **_inputs(blocks, weight), **fixed, **OPTIONS)
    return y.permute(0, 3, 1, 2), means.permute(0, 3, 1, 2)


def images_gradient(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, 2, 2, K): what a pixel gives to each of the four blocks that it reads; the caller adds the four."""
    batch, height, width, channels = _sizes(blocks)
    gradient = blocks.new_empty(batch, height, width, 2, 2, channels)
    fixed = constants(channels, len(weight), width, IMAGES_BN)
    programs = batch * height * triton.cdiv(width, fixed["BW"])
    if programs:
        with device_guard(blocks.device):
            _images_kernel[(programs,)](
                gy_ptr=_last(to_y), gs_ptr=_last(to_means), gx_ptr=gradient, **_inputs(blocks, weight), **fixed,
                **OPTIONS,
            )  # fmt: skip
    return gradient


def weight_gradient(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    """(N, K, 2, 2), contiguous, in the weight's dtype."""
    batch, height, width, channels = _sizes(blocks)
    outputs, fixed = len(weight), constants(channels, len(weight), width)
    tiles = batch * height * triton.cdiv(width, fixed["BW"])
    sums = blocks.new_empty(max(1, min(PROGRAMS, tiles)), 2, 2, channels, outputs, dtype=torch.float32)
    with device_guard(blocks.device):
        _weight_kernel[(len(sums), triton.cdiv(outputs, fixed["BN"]))](
            gy_ptr=_last(to_y), gs_ptr=_last(to_means), gw_ptr=sums, B=batch, **_inputs(blocks, weight), **fixed,
            **OPTIONS,
        )  # fmt: skip
    return sums.sum(0).permute(3, 2, 0, 1).to(weight.dtype).contiguous()


def _sizes(blocks: Tensor) -> tuple[int, int, int, int]:
    """B, H, W, K."""
    batch, channels, height, width = blocks.shape
    return batch, height - 1, width - 1, channels


def _inputs(blocks: Tensor, weight: Tensor) -> dict[str, Any]:
    """The arguments for blocks and weight, which all kernels share; a row's blocks without gaps and channels-last."""
    if blocks.stride(1) != 1 or blocks.stride(3) != blocks.shape[1]:
        blocks = _last(blocks)
    _, height, width, channels = _sizes(blocks)
    sizes = {"H": height, "W": width, "N": len(weight), "K": channels}
    strides = {"SB": blocks.stride(0), "SI": blocks.stride(2)}
    weight_strides = dict(zip(("SN", "SK", "SR", "SC"), weight.stride(), strict=True))
    return {"x_ptr": blocks, "w_ptr": weight} | sizes | strides | weight_strides


def _last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)
