"""SIGReg's sums and their gradient in torch, by the recipe of `sigreg_knots`.

On a CPU they are compiled where that pays. Elsewhere they run eagerly, a tile at a time.

    P, sine, cosine    (M, Q, C): projections, and sin θ and cos θ of θ = Δ·P. M slices, Q runs of C samples each,
                       C contiguous, so that sums run along memory
    F                  the functions of the basis

Without weights M and Q are one axis: a run is a row of its own, and one compiled form does whatever M and Q are.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sigreg_knots import Knots, wide

# a run's sums are made in fp32, the sums over runs in float64
MAX_RUN = 1024
# up to so many angles a call is mostly overhead, uncompiled and in fp64 too
FEW_ANGLES = 1 << 14
# with more functions than these, compiling takes minutes
MAX_COMPILED_BASIS = 200
# angles in a tile of the uncompiled form: on a CPU its temporaries, about ten at a time, stay in the caches
CPU_TILE, GPU_TILE = 1 << 15, 1 << 22


def compute_dtype(z: Tensor, slices: Tensor) -> torch.dtype:
    """That of z; fp64 where angles are few: it costs little there, and the errors of few slices do not average out."""
    few = z.shape[0] * z.shape[1] * slices.shape[1] <= FEW_ANGLES
    return wide(z.device) if few else z.dtype


def runs_of(samples: int) -> tuple[int, int]:
    """(runs, length) for `samples`: equal runs of at most MAX_RUN, padded by less than one sample each."""
    runs = math.ceil(samples / MAX_RUN)
    return runs, math.ceil(samples / runs)


def forward(z: Tensor, slices: Tensor, weights: Tensor | None, knots: Knots) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, N, D), slices (D, M), weights (B, N) → deviations (B, 2, K − 1, M), and sine and cosine to be kept."""
    batch, samples, dim = z.shape
    runs, length = runs_of(samples)
    padding = runs * length - samples
    if padding:
        z = torch.nn.functional.pad(z, (0, 0, 0, padding))
    p = slices.T @ z.reshape(-1, dim).T
    rows = (-1, length) if weights is None else (-1, batch * runs, length)
    layout = knots.blocks, knots.reach
    sine, cosine = _run(_sincos, (_reshaped(p, rows),), layout, knots.step(z.dtype))
    expected = knots.expected(z.dtype, z.device)
    rounded = expected.to(z.dtype)
    (sums,) = _run(_basis_sums, (sine, cosine), layout, rounded, _as_runs(weights, runs, length))
    sums = sums.to(expected.dtype).view(-1, batch, runs, expected.shape[0])
    sums = sums.sum(2) if runs > 1 else sums[:, :, 0]  # [M, B, F]
    count = samples if weights is None else weights.to(sums.dtype).sum(-1, keepdim=True)
    sums = sums + count * (rounded.to(sums.dtype) - expected)
    deviations = (knots.table(sums) @ sums.permute(1, 2, 0)).unflatten(1, (2, -1))  # [B, 2, K-1, M]
    if weights is None and padding:
        # a padded sample lies at 0
        deviations[:, 0] -= padding * (1 - torch.exp(-0.5 * knots.points(z.dtype, sums).square()))[:, None]
    kept = (-1, batch * runs, length)
    return deviations, sine.view(kept), cosine.view(kept)


def slopes(
    sine: Tensor, cosine: Tensor, weights: Tensor | None, gradient: Tensor, samples: int, knots: Knots
) -> Tensor:
    """∂/∂P from the gradient to the deviations, (B, 2, K − 1, M)."""
    runs, length = runs_of(samples)
    factors = (gradient.flatten(1, 2).permute(2, 0, 1) @ knots.slopes(sine.dtype, gradient)).to(sine.dtype)  # [M, B, F]
    if runs > 1:
        factors = factors.repeat_interleave(runs, dim=1)  # [M, Q, F]
    rows = (sine.shape[0] * sine.shape[1],) if weights is None else sine.shape[:2]
    sliced = (
        _reshaped(sine, (*rows, length)),
        _reshaped(cosine, (*rows, length)),
        _reshaped(factors, (*rows, factors.shape[2])),
    )
    layout = knots.blocks, knots.reach
    (found,) = _run(_combination, sliced, layout, _as_runs(weights, runs, length))
    return found.view_as(sine)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view which does not know of what: Dynamo would compile anew for every shape of the original."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def _as_runs(weights: Tensor | None, runs: int, length: int) -> Tensor | None:
    """Weights (B, N) → (Q, C), 0 where runs are padded."""
    if weights is None:
        return None
    return torch.nn.functional.pad(weights, (0, runs * length - weights.shape[1])).view(-1, length)


def _sincos(p: Tensor, layout: tuple[int, int], step: float) -> tuple[Tensor, Tensor]:
    """P → sin and cos of step·P.

    Compiled, both come from one reduction to [−π/4, π/4], in fp64, so that the rounding of θ is not multiplied by k,
    and from Cephes's polynomials. A θ beyond 10⁷ has no phase in fp32: it gives some number in [−1, 1]. NaN stays.
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
    """Sine and cosine (…, C), expected (F,) → the sums over C of the basis less what is expected of it, (…, F).

    What is left has a mean near zero: fp32 sums of 1000 cosines would be off by 1e-8 of each.
    """
    blocks, reach = layout
    cosines, sines = _harmonics(sine, cosine, reach)
    sums = []
    of_block = expected.unflatten(0, (blocks, -1)).unbind()
    for (cos_q, sin_q), means in zip(_centres(cosines[reach], sines[reach], blocks), of_block, strict=True):
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
    """Sine and cosine (…, C), factors (…, F) → that combination of the basis, (…, C)."""
    blocks, reach = layout
    cosines, sines = _harmonics(sine, cosine, reach)
    of_block = factors.unsqueeze(-2).unflatten(-1, (blocks, -1)).unbind(-2)
    total = torch.zeros_like(sine)
    for (cos_q, sin_q), block in zip(_centres(cosines[reach], sines[reach], blocks), of_block, strict=True):
        with_cos, with_sin, *products = block.unbind(-1)
        for j in range(1, reach + 1):
            cc, ss, sc, cs = products[4 * j - 4 : 4 * j]
            with_cos = with_cos + cc * cosines[j] + cs * sines[j]
            with_sin = with_sin + ss * sines[j] + sc * cosines[j]
        total = total + cos_q * with_cos + sin_q * with_sin
    return (total if weights is None else weights * total,)


def _harmonics(sine: Tensor, cosine: Tensor, reach: int) -> tuple[list[Tensor], list[Tensor]]:
    """cos jθ and sin jθ, j = 0..reach, each from two of about half the order: rounding grows with j, not with j²."""
    cosines, sines = [torch.ones_like(cosine), cosine], [torch.zeros_like(sine), sine]
    for order in range(2, reach + 1):
        b = order // 2
        a = order - b
        twice = 2 * sines[b]
        cosines.append(cosines[a - b] - twice * sines[a])
        sines.append(sines[a - b] + twice * cosines[a])
    return cosines, sines


def _centres(cosine: Tensor, sine: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
    """cos qθ and sin qθ at q = H, 3H, 5H, … from those at H."""
    found = [(cosine, sine)]
    if blocks > 1:
        cos_2h, sin_2h = 1 - 2 * sine * sine, 2 * sine * cosine
    for _ in range(1, blocks):
        cos_q, sin_q = found[-1]
        found.append((cos_q * cos_2h - sin_q * sin_2h, sin_q * cos_2h + cos_q * sin_2h))
    return found


Kernel = Callable[..., tuple[Tensor, ...]]


def _run(kernel: Kernel, sliced: tuple[Tensor, ...], layout: tuple[int, int], *rest: Any) -> tuple[Tensor, ...]:
    """`kernel` on tensors whose first axis are slices (or rows): compiled, or on some slices at a time."""
    if _worth_compiling(sliced[0], layout):
        try:
            return _compiled(kernel, layout, sliced[0].ndim)(*sliced, layout, *rest)
        except RuntimeError as error:
            _cannot_compile(error)
    tile = CPU_TILE if sliced[0].device.type == "cpu" else GPU_TILE
    size = max(1, tile * sliced[0].shape[0] // sliced[0].numel())
    pieces = zip(*(tensor.split(size) for tensor in sliced), strict=True)
    found = [kernel(*piece, layout, *rest) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


# why torch.compile does not work here, once that is known
_compiler_failures: list[RuntimeError] = []


def _worth_compiling(tensor: Tensor, layout: tuple[int, int]) -> bool:
    blocks, reach = layout
    return (
        tensor.device.type == "cpu"
        # fewer angles are in fp64
        and tensor.dtype == torch.float32
        # the compiler would make a form of its own for each size that is 1
        and min(tensor.shape) > 1
        and blocks * (4 * reach + 2) <= MAX_COMPILED_BASIS
        and not _compiler_failures
        and not torch._dynamo.config.disable
    )


@functools.cache
def _compiled(kernel: Kernel, layout: tuple[int, int], ndim: int) -> Kernel:
    """One for each layout of the knots, with sizes left open; with 3 axes it takes weights."""
    _announce()
    options: dict[str, Any] = {
        # fused multiply-adds, which the compiler leaves off by default
        "cpp.enable_floating_point_contract_flag": "fast",
        # all sums in one loop
        "cpp.max_horizontal_fusion_size": 64,
    }
    compiled = torch.compile(kernel, dynamic=True, options=options)
    # the compiler generalises from what it sees first: sizes that are equal by chance would be taken for always equal,
    # and small ones would not be worth several threads
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
def _announce() -> None:
    warnings.warn(
        "fastle compiles SIGReg for this CPU: up to half a minute for each number of knots, and a few seconds where "
        "torch's cache has it from an earlier run",
        stacklevel=2,
    )


def _cannot_compile(error: RuntimeError) -> None:
    _compiler_failures.append(error)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(
        f"SIGReg runs uncompiled on this CPU, several times slower: torch.compile failed ({reason}). It needs a C++ "
        "compiler; CXX=/path/to/c++ names one",
        stacklevel=2,
    )
