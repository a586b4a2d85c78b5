"""SIGReg's sums and their gradient in torch, with the basis of `sigreg_knots`.

In fp32 on a CPU, `sigreg_cpu` does what takes time, where it can be compiled. Otherwise torch does, one tile at a time.

    P, sine, cosine    (M, Q, C): projections, and sin θ and cos θ, θ = Δ·P, for M slices and Q chunks of C samples.
                       C is contiguous, so that sums run along memory
    F                  functions of the basis
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import sigreg_cpu
from .sigreg_knots import Knots, sum_dtype

# samples in a chunk: its sums are in fp32, and the sums over chunks in fp64
MAX_CHUNK = 1024
# up to this many angles a call is mostly overhead, even uncompiled and in fp64
FEW_ANGLES = 1 << 14
# with more functions than this, the compiler's time and the registers it spills are no longer worth it
MAX_COMPILED_BASIS = 200
# angles in a tile of the eager kernels: on a CPU their temporaries, about ten at a time, stay in the caches
CPU_TILE, GPU_TILE = 1 << 15, 1 << 22


def compute_dtype(z: Tensor, slices: Tensor) -> torch.dtype:
    """The dtype of z; fp64 for few angles: it costs little then, and errors of few slices do not average out."""
    few = z.shape[0] * z.shape[1] * slices.shape[1] <= FEW_ANGLES
    return sum_dtype(z.device) if few else z.dtype


def chunk_layout(samples: int) -> tuple[int, int]:
    """(chunks, length) for `samples`: equal chunks of at most MAX_CHUNK, each padded by less than one sample."""
    chunks = math.ceil(samples / MAX_CHUNK)
    return chunks, math.ceil(samples / chunks)


def forward(z: Tensor, slices: Tensor, weights: Tensor | None, knots: Knots) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, N, D), slices (D, M), weights (B, N) → deviations (B, 2, K − 1, M), and sine and cosine for backward."""
    batch, samples, dim = z.shape
    chunks, length = chunk_layout(samples)
    padding = chunks * length - samples
    if padding:
        z = torch.nn.functional.pad(z, (0, 0, 0, padding))
    p = (slices.T @ z.reshape(-1, dim).T).view(-1, batch * chunks, length)
    expected = knots.expected(z.dtype, z.device)
    rounded, chunked = expected.to(z.dtype), _chunked_weights(weights, chunks, length)
    if _compiled(p, knots):
        sine, cosine, sums = sigreg_cpu.sums(p, chunked, rounded, knots.step(z.dtype), knots)
    else:
        sine, cosine, sums = _tiled(_sums, (p,), knots, rounded, knots.step(z.dtype), chunked)
    sums = sums.to(expected.dtype).view(-1, batch, chunks, expected.shape[0])
    sums = sums.sum(2) if chunks > 1 else sums[:, :, 0]  # [M, B, F]
    count = samples if weights is None else weights.to(sums.dtype).sum(-1, keepdim=True)
    sums = sums + count * (rounded.to(sums.dtype) - expected)
    deviations = (knots.table(sums) @ sums.permute(1, 2, 0)).unflatten(1, (2, -1))  # [B, 2, K-1, M]
    if weights is None and padding:
        # padded samples are 0, where the cosine is 1 and the sine 0
        deviations[:, 0] -= padding * (1 - torch.exp(-0.5 * knots.points(z.dtype, sums).square()))[:, None]
    return deviations, sine, cosine


def projection_gradient(
    sine: Tensor, cosine: Tensor, weights: Tensor | None, gradient: Tensor, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P (M, Q, C) from the gradient to the deviations, (B, 2, K − 1, M)."""
    chunks, length = chunk_layout(samples)
    derivatives = knots.derivative_table(sine.dtype, gradient)
    factors = (gradient.flatten(1, 2).permute(2, 0, 1) @ derivatives).to(sine.dtype)  # [M, B, F]
    if chunks > 1:
        factors = factors.repeat_interleave(chunks, dim=1)  # [M, Q, F]
    chunked = _chunked_weights(weights, chunks, length)
    if _compiled(sine, knots):
        return sigreg_cpu.gradient(sine, cosine, factors.contiguous(), chunked, knots)
    (grad_p,) = _tiled(_combination, (sine, cosine, factors), knots, chunked)
    return grad_p


def _chunked_weights(weights: Tensor | None, chunks: int, length: int) -> Tensor | None:
    """Weights (B, N) → (Q, C), 0 for padded samples."""
    if weights is None:
        return None
    return torch.nn.functional.pad(weights, (0, chunks * length - weights.shape[1])).view(-1, length)


def _sums(
    p: Tensor, knots: Knots, expected: Tensor, step: float, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """P (…, C), expected (F,) → sine and cosine of step·P, and the sums over C of the basis minus `expected`, (…, F).

    The differences have a mean near zero, which keeps the rounding of their fp32 sums small.
    """
    theta = p * step
    sine, cosine = theta.sin(), theta.cos()
    cosines, sines = _harmonics(sine, cosine, knots.reach)
    sums = []
    block_means = expected.unflatten(0, (knots.blocks, -1)).unbind()
    centres = _centres(cosines[-1], sines[-1], knots.blocks)
    for (cos_q, sin_q), means in zip(centres, block_means, strict=True):
        products = [cos_q - means[0], sin_q]
        for j in range(1, knots.reach + 1):
            products += [
                cos_q * cosines[j] - means[4 * j - 2],
                sin_q * sines[j] - means[4 * j - 1],
                sin_q * cosines[j],
                cos_q * sines[j],
            ]
        sums += [(product if weights is None else weights * product).sum(-1) for product in products]
    return sine, cosine, torch.stack(sums, dim=-1)


def _combination(sine: Tensor, cosine: Tensor, factors: Tensor, knots: Knots, weights: Tensor | None) -> tuple[Tensor]:
    """Sine and cosine (…, C), factors (…, F) → the linear combination of the basis with these factors, (…, C)."""
    cosines, sines = _harmonics(sine, cosine, knots.reach)
    block_factors = factors.unsqueeze(-2).unflatten(-1, (knots.blocks, -1)).unbind(-2)
    total = torch.zeros_like(sine)
    centres = _centres(cosines[-1], sines[-1], knots.blocks)
    for (cos_q, sin_q), block in zip(centres, block_factors, strict=True):
        with_cos, with_sin, *products = block.unbind(-1)
        for j in range(1, knots.reach + 1):
            cc, ss, sc, cs = products[4 * j - 4 : 4 * j]
            with_cos = with_cos + cc * cosines[j] + cs * sines[j]
            with_sin = with_sin + ss * sines[j] + sc * cosines[j]
        total = total + cos_q * with_cos + sin_q * with_sin
    return (total if weights is None else weights * total,)


def _harmonics(sine: Tensor, cosine: Tensor, reach: int) -> tuple[list[Tensor], list[Tensor]]:
    """cos jθ and sin jθ for j = 0..reach, each from two of about half its order: rounding grows with j, not j²."""
    cosines, sines = [torch.ones_like(cosine), cosine], [torch.zeros_like(sine), sine]
    for order in range(2, reach + 1):
        b = order // 2
        a = order - b
        twice = 2 * sines[b]
        cosines.append(cosines[a - b] - twice * sines[a])
        sines.append(sines[a - b] + twice * cosines[a])
    return cosines, sines


def _centres(cosine: Tensor, sine: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
    """cos qθ and sin qθ at the centres q = H, 3H, 5H, …, from those at H."""
    centres = [(cosine, sine)]
    if blocks > 1:
        cos_2h, sin_2h = 1 - 2 * sine * sine, 2 * sine * cosine
    for _ in range(1, blocks):
        cos_q, sin_q = centres[-1]
        centres.append((cos_q * cos_2h - sin_q * sin_2h, sin_q * cos_2h + cos_q * sin_2h))
    return centres


def _compiled(tensor: Tensor, knots: Knots) -> bool:
    """Whether `sigreg_cpu` computes it. Few angles are fp64."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and knots.basis_size <= MAX_COMPILED_BASIS
        and sigreg_cpu.available(knots)
    )


def _tiled(
    kernel: Callable[..., tuple[Tensor, ...]], by_slice: tuple[Tensor, ...], knots: Knots, *rest: Any
) -> tuple[Tensor, ...]:
    """Runs `kernel` on tensors whose first axis is slices, some slices at a time."""
    tile = CPU_TILE if by_slice[0].device.type == "cpu" else GPU_TILE
    size = max(1, tile * by_slice[0].shape[0] // by_slice[0].numel())
    pieces = zip(*(tensor.split(size) for tensor in by_slice), strict=True)
    results = [kernel(*piece, knots, *rest) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
