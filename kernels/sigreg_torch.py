"""SIGReg's sums and their gradient in torch, with the basis of `sigreg_knots`.

On a CPU torch.compile compiles them if that pays. Otherwise they run eagerly, one tile at a time.

    P, sine, cosine    (M, Q, C): projections, and sin θ and cos θ, θ = Δ·P, for M slices and Q chunks of C samples.
                       C is contiguous, so that sums run along memory
    F                  functions of the basis

Without weights, M and Q are one axis of rows, so that one compiled kernel serves all M and Q.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sigreg_knots import Knots, sum_dtype

# samples in a chunk: its sums are in fp32, and the sums over chunks in fp64
MAX_CHUNK = 1024
# up to this many angles a call is mostly overhead, even uncompiled and in fp64
FEW_ANGLES = 1 << 14
# with more functions than this, compiling takes minutes
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
    p = slices.T @ z.reshape(-1, dim).T
    rows = (-1, length) if weights is None else (-1, batch * chunks, length)
    layout = knots.blocks, knots.reach
    sine, cosine = _run(_sincos, (_reshaped(p, rows),), layout, knots.step(z.dtype))
    expected = knots.expected(z.dtype, z.device)
    rounded = expected.to(z.dtype)
    (sums,) = _run(_basis_sums, (sine, cosine), layout, rounded, _chunked_weights(weights, chunks, length))
    sums = sums.to(expected.dtype).view(-1, batch, chunks, expected.shape[0])
    sums = sums.sum(2) if chunks > 1 else sums[:, :, 0]  # [M, B, F]
    count = samples if weights is None else weights.to(sums.dtype).sum(-1, keepdim=True)
    sums = sums + count * (rounded.to(sums.dtype) - expected)
    deviations = (knots.table(sums) @ sums.permute(1, 2, 0)).unflatten(1, (2, -1))  # [B, 2, K-1, M]
    if weights is None and padding:
        # padded samples are 0, where the cosine is 1 and the sine 0
        deviations[:, 0] -= padding * (1 - torch.exp(-0.5 * knots.points(z.dtype, sums).square()))[:, None]
    kept = (-1, batch * chunks, length)
    return deviations, sine.view(kept), cosine.view(kept)


def projection_gradient(
    sine: Tensor, cosine: Tensor, weights: Tensor | None, gradient: Tensor, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P (M, Q, C) from the gradient to the deviations, (B, 2, K − 1, M)."""
    chunks, length = chunk_layout(samples)
    derivatives = knots.derivative_table(sine.dtype, gradient)
    factors = (gradient.flatten(1, 2).permute(2, 0, 1) @ derivatives).to(sine.dtype)  # [M, B, F]
    if chunks > 1:
        factors = factors.repeat_interleave(chunks, dim=1)  # [M, Q, F]
    rows = (sine.shape[0] * sine.shape[1],) if weights is None else sine.shape[:2]
    by_slice = (
        _reshaped(sine, (*rows, length)),
        _reshaped(cosine, (*rows, length)),
        _reshaped(factors, (*rows, factors.shape[2])),
    )
    layout = knots.blocks, knots.reach
    (grad_p,) = _run(_combination, by_slice, layout, _chunked_weights(weights, chunks, length))
    return grad_p.view_as(sine)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view that Dynamo cannot trace back to its base: it would recompile for every shape of the base."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def _chunked_weights(weights: Tensor | None, chunks: int, length: int) -> Tensor | None:
    """Weights (B, N) → (Q, C), 0 for padded samples."""
    if weights is None:
        return None
    return torch.nn.functional.pad(weights, (0, chunks * length - weights.shape[1])).view(-1, length)


def _sincos(p: Tensor, layout: tuple[int, int], step: float) -> tuple[Tensor, Tensor]:
    """P → sin and cos of step·P.

    The compiled form reduces θ to [−π/4, π/4] once, in fp64, so that k does not multiply the rounding of θ, and uses
    Cephes's polynomials. An angle beyond 10⁷ has no phase in fp32 and gives some number in [−1, 1]. NaN stays NaN.
    """
    if not torch.compiler.is_compiling():
        theta = p * step
        return theta.sin(), theta.cos()
    theta = p.double() * step
    quadrant = torch.round(theta * (2 / math.pi))
    reduced = (theta - quadrant * (math.pi / 2)).clamp(-0.8, 0.8)
    r = reduced.float()
    rest = (reduced - r).float()
    turns = quadrant.float().to(torch.int32)
    square = r * r
    sine = r + r * square * (-1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4))
    cosine = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1 - 0.5 * square + square * square * cosine
    sine, cosine = sine + rest * cosine, cosine - rest * sine
    odd = (turns & 1) != 0
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where((turns & 2) != 0, -sine, sine), torch.where(((turns + 1) & 2) != 0, -cosine, cosine)


def _basis_sums(
    sine: Tensor, cosine: Tensor, layout: tuple[int, int], expected: Tensor, weights: Tensor | None
) -> tuple[Tensor]:
    """Sine and cosine (…, C), expected (F,) → the sums over C of the basis minus its expectation, (…, F).

    The differences have a mean near zero, which keeps the rounding of their fp32 sums small.
    """
    blocks, reach = layout
    cosines, sines = _harmonics(sine, cosine, reach)
    sums = []
    block_means = expected.unflatten(0, (blocks, -1)).unbind()
    for (cos_q, sin_q), means in zip(_centres(cosines[reach], sines[reach], blocks), block_means, strict=True):
        products = [cos_q - means[0], sin_q]
        for j in range(1, reach + 1):
            products += [
                cos_q * cosines[j] - means[4 * j - 2],
                sin_q * sines[j] - means[4 * j - 1],
                sin_q * cosines[j],
                cos_q * sines[j],
            ]
        sums += [(product if weights is None else weights * product).sum(-1) for product in products]
    return (torch.stack(sums, dim=-1),)


def _combination(
    sine: Tensor, cosine: Tensor, factors: Tensor, layout: tuple[int, int], weights: Tensor | None
) -> tuple[Tensor]:
    """Sine and cosine (…, C), factors (…, F) → the linear combination of the basis with these factors, (…, C)."""
    blocks, reach = layout
    cosines, sines = _harmonics(sine, cosine, reach)
    block_factors = factors.unsqueeze(-2).unflatten(-1, (blocks, -1)).unbind(-2)
    total = torch.zeros_like(sine)
    for (cos_q, sin_q), block in zip(_centres(cosines[reach], sines[reach], blocks), block_factors, strict=True):
        with_cos, with_sin, *products = block.unbind(-1)
        for j in range(1, reach + 1):
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


Kernel = Callable[..., tuple[Tensor, ...]]


def _run(kernel: Kernel, by_slice: tuple[Tensor, ...], layout: tuple[int, int], *rest: Any) -> tuple[Tensor, ...]:
    """Runs `kernel` on tensors whose first axis is slices (or rows), compiled or some slices at a time."""
    if _worth_compiling(by_slice[0], layout):
        try:
            return _compiled(kernel, layout, by_slice[0].ndim)(*by_slice, layout, *rest)
        except RuntimeError as error:
            _warn_uncompiled(error)
    tile = CPU_TILE if by_slice[0].device.type == "cpu" else GPU_TILE
    size = max(1, tile * by_slice[0].shape[0] // by_slice[0].numel())
    pieces = zip(*(tensor.split(size) for tensor in by_slice), strict=True)
    results = [kernel(*piece, layout, *rest) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


# why torch.compile failed on this machine; empty until it does
_compiler_failures: list[RuntimeError] = []


def _worth_compiling(tensor: Tensor, layout: tuple[int, int]) -> bool:
    blocks, reach = layout
    return (
        tensor.device.type == "cpu"
        # few angles are computed in fp64, eagerly
        and tensor.dtype == torch.float32
        # the compiler would specialise on every size that is 1
        and min(tensor.shape) > 1
        and blocks * (4 * reach + 2) <= MAX_COMPILED_BASIS
        and not _compiler_failures
        and not torch._dynamo.config.disable
    )


@functools.cache
def _compiled(kernel: Kernel, layout: tuple[int, int], ndim: int) -> Kernel:
    """`kernel` compiled for one layout of the knots and any sizes; with 3 axes it takes weights."""
    _warn_compiling()
    options: dict[str, Any] = {
        # fused multiply-adds, which the compiler leaves off by default
        "cpp.enable_floating_point_contract_flag": "fast",
        # all sums in one loop
        "cpp.max_horizontal_fusion_size": 64,
    }
    compiled = torch.compile(kernel, dynamic=True, options=options)
    # the compiler generalises from its first call: it would assume that sizes that are equal by chance always are, and
    # that small ones do not need several threads
    blocks, reach = layout
    functions = blocks * (4 * reach + 2)
    angles, weights = (torch.zeros(400, 500), None) if ndim == 2 else (torch.zeros(40, 10, 500), torch.zeros(10, 500))
    if kernel is _sincos:
        compiled(angles, layout, 0.1)
    elif kernel is _basis_sums:
        compiled(angles, angles.clone(), layout, torch.zeros(functions), weights)
    else:
        compiled(angles, angles.clone(), torch.zeros(*angles.shape[:-1], functions), layout, weights)
    return compiled


@functools.cache
def _warn_compiling() -> None:
    warnings.warn(
        "fastle compiles SIGReg for this CPU, which takes up to half a minute for each number of knots, or a few "
        "seconds if torch's cache has it from an earlier run",
        stacklevel=2,
    )


def _warn_uncompiled(error: RuntimeError) -> None:
    _compiler_failures.append(error)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(
        f"SIGReg runs uncompiled on this CPU, which is several times slower: torch.compile failed ({reason}). It "
        "needs a C++ compiler; CXX=/path/to/c++ names one",
        stacklevel=2,
    )
