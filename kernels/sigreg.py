"""SIGReg: the empirical characteristic function on random slices against a Gaussian's, fused.

    P_nm = Σ_d Z_nd A_dm            t_k = k·t_max/(K−1),  k = 0..K−1            φ_k = exp(−t_k²/2)
    C_km = mean_n cos(t_k P_nm)     S_km = mean_n sin(t_k P_nm)                 w_k = 2Δ·φ_k, halved at both ends
    statistic_m = N · Σ_k w_k [(C_km − φ_k)² + S_km²]

    N samples, D features, M slices, K knots (t = 0 contributes exactly nothing, so K − 1 are live), B leading indices.

No (N, M, K) tensor is made: one sine and one cosine for each (n, m) give all knots (`sigreg_knots`). P and the gradient
to Z are products of the BLAS library in use; what lies between is fused, in Triton or in torch.

What is summed over n are deviations, Σ_n ω_n (cos t_k P_nm − φ_k) and Σ_n ω_n sin t_k P_nm: they add up over samples
and ranks, and fp32 holds them without the cancellation of C − φ.

Source: LeJEPA (arXiv 2511.08544), the Epps-Pulley test of normality with a trapezoidal rule on [0, t_max].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import reference, sigreg_torch
from .impl import HAS_TRITON, choose, traced
from .sigreg_knots import Knots, wide

sigreg_triton: Any = None
if HAS_TRITON:
    from . import sigreg_triton

Impl = Literal["auto", "triton", "torch", "reference"]


def sigreg(
    z: Tensor,
    slices: Tensor,
    *,
    weights: Tensor | None = None,
    t_max: float = 3.0,
    knots: int = 17,
    reduction: Literal["mean"] | None = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """The SIGReg statistic of samples on given slices.

    Args:
        z: (..., N, D) samples, fp32, bf16, fp16 or fp64; each leading index is a test of its own.
        slices: (D, M), unit columns.
        weights: (..., N), a mask or real numbers ≥ 0. A sample of weight 2 counts twice; one of weight 0 not at all,
            whatever it holds. N becomes Σω, and a test without any weight scores 0. No gradient goes to them.
        t_max: the largest knot, > 0.
        knots: K ≥ 2, counting t = 0.
        reduction: "mean" over slices and leading axes, or None.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.
            "reference" is the formula written out, to check the others by.

    Returns:
        A scalar, or (..., M) without reduction; fp32 (fp64 for fp64), also under autocast. About 1.05 on average for
        standard normal samples, not 0.

    Raises:
        ValueError: shapes that do not fit, no samples, knots or t_max out of range, or an impl that cannot be had.
    """
    if reduction not in ("mean", None):
        raise ValueError(f'reduction is "mean" or None, not {reduction!r}')
    z, slices, weights, leading, chosen = _prepare(z, slices, weights, t_max, knots, impl)
    if chosen == "reference":
        with torch.autocast(z.device.type, enabled=False):
            statistics = reference.sigreg(z, slices, weights=weights, t_max=t_max, knots=knots)
    else:
        statistics, _ = _statistics_and_deviations(z, slices, weights, float(t_max), knots, chosen)
    return statistics.view(*leading, -1) if reduction is None else statistics.mean()


def cf_deviations(
    z: Tensor,
    slices: Tensor,
    *,
    weights: Tensor | None = None,
    t_max: float = 3.0,
    knots: int = 17,
    impl: Impl = "auto",
) -> Tensor:
    """Σ_n ω_n (cos t_k P_nm − φ_k) and Σ_n ω_n sin t_k P_nm: they add up over the parts of a batch, as ranks have them.

    Arguments and errors: those of `sigreg`.

    Returns:
        (..., 2, K − 1, M) in fp32 (fp64 for fp64), cosines first, knots from k = 1.
    """
    z, slices, weights, leading, chosen = _prepare(z, slices, weights, t_max, knots, impl)
    if chosen == "reference":
        with torch.autocast(z.device.type, enabled=False):
            deviations = reference.cf_deviations(z, slices, weights=weights, t_max=t_max, knots=knots)
    else:
        _, deviations = _statistics_and_deviations(z, slices, weights, float(t_max), knots, chosen)
    return deviations.view(*leading, *deviations.shape[1:]).to(z.dtype)


def statistic(
    deviations: Tensor, count: Tensor | float, *, t_max: float = 3.0, knots: int = 17, symmetric: bool = False
) -> Tensor:
    """Σ_k w_k [(C_km − φ_k)² + S_km²]·N from `cf_deviations` of all samples.

    Args:
        deviations: (..., 2, K − 1, M).
        count: N or Σω, of the shape (...) or a number. Where it is 0 the statistic is 0.
        t_max, knots: as they were for the deviations.
        symmetric: the trapezoidal rule with K knots on [−t_max, t_max] instead of [0, t_max]. Those of them that are
            positive are every second one of the deviations' knots, the last among them.

    Returns:
        (..., M).
    """
    weights = Knots(t_max, knots).weights(deviations)
    if symmetric:
        # twice the step, and the knots between left out
        weights = 2 * weights * (torch.arange(knots - 1, 0, -1, device=weights.device) % 2)
    squares = (weights[:, None] * deviations.square()).sum((-3, -2))
    return squares / (count.clamp_min(1e-30)[..., None] if isinstance(count, Tensor) else count)


def _prepare(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size, str]:
    """Checked arguments, z as (B, N, D) and weights as (B, N) in fp32 or fp64; the leading shape; the impl chosen."""
    if z.ndim < 2 or slices.ndim != 2 or z.shape[-1] != slices.shape[0]:
        raise ValueError(f"z (..., N, D) and slices (D, M) do not fit: {tuple(z.shape)} and {tuple(slices.shape)}")
    if 0 in z.shape[:-1] or slices.shape[1] == 0:
        raise ValueError(f"SIGReg of nothing is undefined: z {tuple(z.shape)}, slices {tuple(slices.shape)}")
    if weights is not None and weights.shape != z.shape[:-1]:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit z {tuple(z.shape)}: one for each sample")
    Knots(t_max, knots)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if impl != "reference":
        unfit = "its kernels compute in fp32, and z is fp64" if dtype == torch.float64 else None
        impl = choose("sigreg", impl, z.device, unfit)
    leading = z.shape[:-2]
    if weights is not None:
        weights = weights.detach().to(dtype)
        # what does not count must not reach the products: 0 · NaN is NaN
        z = torch.where(weights[..., None] == 0, 0, z)
        weights = weights.reshape(-1, weights.shape[-1]).contiguous()
    return z.to(dtype).reshape(-1, *z.shape[-2:]), slices.to(dtype), weights, leading, impl


# registration. statistics (B, M) and deviations (B, 2, K − 1, M) of z (B, N, D) can both be differentiated; what the
# implementation keeps for the backward pass (Triton P; torch sin Δ·P and cos Δ·P) is returned as well.
# torch caches what it compiled around an operator by the operator's name: a change of signature needs a new name


def _forward(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid, (batch, samples, _) = Knots(t_max, knots), z.shape
    # autocast would lower the product to bf16, where users report NaN and spikes
    with torch.autocast(z.device.type, enabled=False):
        if impl == "triton":
            p = z.reshape(batch * samples, -1) @ slices
            statistics, deviations = sigreg_triton.statistics(p, weights, samples, grid)
            return statistics, deviations, p, p.new_empty(0)
        dtype = sigreg_torch.compute_dtype(z, slices)
        deviations, sine, cosine = sigreg_torch.forward(z.to(dtype), slices.to(dtype), weights, grid)
        count = samples if weights is None else weights.sum(-1)
        return statistic(deviations, count, t_max=t_max, knots=knots).to(z.dtype), deviations, sine, cosine


_forward_op = torch.library.custom_op("fastle::sigreg", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, samples, _), number = z.shape, slices.shape[1]
    if impl == "triton":
        kept = z.new_empty(batch * samples, number), z.new_empty(0)
    else:
        runs, length = sigreg_torch.runs_of(samples)
        dtype = sigreg_torch.compute_dtype(z, slices)
        sine = z.new_empty(number, batch * runs, length, dtype=dtype)
        kept = sine, torch.empty_like(sine)
    deviations = z.new_empty(batch, 2, knots - 1, number, dtype=wide(z.device))
    return z.new_empty(batch, number), deviations, *kept


def _slopes(
    to_statistics: Tensor | None,
    to_deviations: Tensor | None,
    deviations: Tensor,
    kept: Tensor,
    kept_cosine: Tensor,
    weights: Tensor | None,
    samples: int,
    t_max: float,
    knots: int,
    impl: str,
) -> Tensor:
    """∂/∂P, (B·N, M) for Triton and P_MQC for torch, from the gradients to the statistics and to the deviations."""
    grid = Knots(t_max, knots)
    if impl == "triton" and to_statistics is not None and to_deviations is None:
        return sigreg_triton.slopes(to_statistics, deviations, kept, weights, samples, grid)
    gradient = to_deviations
    if to_statistics is not None:
        count = samples if weights is None else weights.sum(-1, keepdim=True).clamp_min(1e-30)
        share = (2 / count * to_statistics)[:, None, None]
        from_statistics = grid.weights(deviations)[:, None] * deviations * share
        gradient = from_statistics if gradient is None else gradient + from_statistics
    if gradient is None:
        gradient = torch.zeros_like(deviations)
    if impl == "triton":
        return sigreg_triton.slopes(gradient, deviations, kept, weights, samples, grid)
    with torch.autocast(kept.device.type, enabled=False):
        return sigreg_torch.slopes(kept, kept_cosine, weights, gradient, samples, grid)


_slopes_op = torch.library.custom_op("fastle::sigreg_slopes", _slopes, mutates_args=())


@_slopes_op.register_fake
def _(
    to_statistics: Tensor | None,
    to_deviations: Tensor | None,
    deviations: Tensor,
    kept: Tensor,
    kept_cosine: Tensor,
    weights: Tensor | None,
    samples: int,
    t_max: float,
    knots: int,
    impl: str,
) -> Tensor:
    return torch.empty_like(kept)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, slices, weights, ctx.t_max, ctx.knots, ctx.impl = inputs
    _, deviations, kept, kept_cosine = output
    ctx.save_for_backward(z, slices, weights, deviations, kept, kept_cosine)
    # a loss of one of the two outputs gives None for the other
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, to_statistics: Tensor | None, to_deviations: Tensor | None, *_: None, slopes_of: Any = _slopes_op
) -> tuple[Any, ...]:
    z, slices, weights, deviations, kept, kept_cosine = ctx.saved_tensors
    (batch, samples, dim) = z.shape
    slopes = slopes_of(
        to_statistics, to_deviations, deviations, kept, kept_cosine, weights, samples, ctx.t_max, ctx.knots, ctx.impl
    )
    if ctx.impl == "torch":
        # padded samples have rows of their own here
        slopes = slopes.flatten(1).T
    to_z, to_slices = None, None
    with torch.autocast(z.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            to_z = (slopes @ slices.to(slopes.dtype).T).view(batch, -1, dim)[:, :samples].to(z.dtype)
        if ctx.needs_input_grad[1]:
            padding = slopes.shape[0] // batch - samples
            rows = torch.nn.functional.pad(z, (0, 0, 0, padding)).reshape(-1, dim).to(slopes.dtype)
            to_slices = (rows.T @ slopes).to(slices.dtype)
    return to_z, to_slices, None, None, None, None


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without the operator's dispatch, which takes some 0.2 ms each way."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # whoever wants a second derivative is to meet the operator, which says that there is none
        return _gradient(ctx, *gradients, slopes_of=_slopes_op if torch.is_grad_enabled() else _slopes)


def _statistics_and_deviations(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """By the operator wherever somebody traces it, and directly elsewhere."""
    statistics, deviations, *_ = (_forward_op if traced(z) else _Eager.apply)(z, *arguments)
    return statistics, deviations
