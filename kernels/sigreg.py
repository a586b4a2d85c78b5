"""SIGReg: compares the empirical characteristic function on random slices with a Gaussian's, in fused kernels.

    P_nm = Σ_d Z_nd A_dm            t_k = k·t_max/(K−1),  k = 0..K−1            φ_k = exp(−t_k²/2)
    C_km = mean_n cos(t_k P_nm)     S_km = mean_n sin(t_k P_nm)                 w_k = 2Δ·φ_k, halved at both ends
    statistic_m = N · Σ_k w_k [(C_km − φ_k)² + S_km²]

    N samples, D features, M slices, K knots (t = 0 contributes nothing, so K − 1 are live), B tests (leading indices).

No (N, M, K) tensor exists: one sine and one cosine for each (n, m) give all knots (`sigreg_knots`). P and the gradient
to Z are matrix products; everything between them is fused, in Triton or in torch.

The kernels sum deviations over n, Σ_n ω_n (cos t_k P_nm − φ_k) and Σ_n ω_n sin t_k P_nm. Deviations add up over samples
and ranks, and they avoid the cancellation in C − φ, so fp32 can hold them.

Source: LeJEPA (arXiv 2511.08544), the Epps-Pulley test of normality with a trapezoidal rule on [0, t_max].
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import reference, sigreg_torch
from .impl import HAS_TRITON, choose, traced
from .products import exact_product, exact_products
from .sigreg_knots import Knots, sum_dtype

sigreg_triton: Any = None
if HAS_TRITON:
    from . import sigreg_triton

Impl = Literal["auto", "triton", "torch", "reference"]
IMPLS = get_args(Impl)


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
        z: (..., N, D) samples, fp32, bf16, fp16 or fp64; each leading index is one test.
        slices: (D, M), unit columns.
        weights: (..., N), a mask or real numbers ≥ 0. A sample of weight 2 counts twice; a sample of weight 0 does not
            count, even if it is NaN. N becomes Σω, and the statistic is 0 if all weights are. They get no gradient.
            With a negative weight the statistic is NaN where an error would make the host wait for a device.
        t_max: The largest knot, > 0.
        knots: K ≥ 2, counting t = 0.
        reduction: "mean" over slices and leading axes, or None.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.
            "reference" is the formula written out, for checking the others.

    Returns:
        A scalar, or (..., M) without reduction; fp32 (fp64 for fp64), also under autocast. Its mean for standard normal
        samples is about 1.05, not 0.

    Raises:
        ValueError: Shapes do not fit, there are no samples, knots or t_max is out of range, a weight is negative (on a
            CPU), or `impl` cannot run here (under torch.func's transforms, all but "reference").
    """
    if reduction not in ("mean", None):
        raise ValueError(f'SIGReg: reduction must be "mean" or None, not {reduction!r}')
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
    """The deviations Σ_n ω_n (cos t_k P_nm − φ_k) and Σ_n ω_n sin t_k P_nm, which add up over ranks.

    Arguments and errors are those of `sigreg`.

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
    """The statistic N · Σ_k w_k [(C_km − φ_k)² + S_km²] from the deviations of all samples.

    Args:
        deviations: (..., 2, K − 1, M), from `cf_deviations`.
        count: N or Σω, a number or of shape (...). Where it is 0, the statistic is 0.
        t_max, knots: Those of the deviations.
        symmetric: Whether the trapezoidal rule has its K knots on [−t_max, t_max] instead of [0, t_max]. The positive
            ones are then every second knot of the deviations, counted back from the last.

    Returns:
        (..., M).
    """
    weights = Knots(t_max, knots).weights(deviations)
    if symmetric:
        # every second knot, so twice the step
        weights = 2 * weights * (torch.arange(knots - 1, 0, -1, device=weights.device) % 2)
    squares = (weights[:, None] * deviations.square()).sum((-3, -2))
    return squares / (count.clamp_min(1e-30)[..., None] if isinstance(count, Tensor) else count)


def check_options(*, knots: int, t_max: float, impl: str) -> None:
    """Checks options without samples.

    Raises:
        ValueError: `impl` is unknown, or knots or t_max is out of range.
    """
    Knots(t_max, knots)
    if impl not in IMPLS:
        raise ValueError(f"SIGReg: impl must be one of {', '.join(IMPLS)}, not {impl!r}")


def _prepare(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size, str]:
    """Checks the arguments; returns z (B, N, D), slices and weights (B, N) in fp32 or fp64, leading shape and impl."""
    if z.ndim < 2 or slices.ndim != 2 or z.shape[-1] != slices.shape[0]:
        raise ValueError(
            f"SIGReg: z (..., N, D) and slices (D, M) do not fit: {tuple(z.shape)} and {tuple(slices.shape)}"
        )
    if 0 in z.shape[:-1] or slices.shape[1] == 0:
        raise ValueError(
            f"SIGReg needs samples and slices, but z is {tuple(z.shape)} and slices are {tuple(slices.shape)}"
        )
    if weights is not None and weights.shape != z.shape[:-1]:
        raise ValueError(
            f"SIGReg: weights {tuple(weights.shape)} do not fit z {tuple(z.shape)}; each sample has one weight"
        )
    check_options(knots=knots, t_max=t_max, impl=impl)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if impl != "reference":
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError('SIGReg: under vmap, grad and their like in torch.func, use impl="reference"')
        obstacle = "its kernels compute in fp32, and z is fp64" if dtype == torch.float64 else None
        impl = choose("sigreg", impl, z.device, obstacle)
    leading = z.shape[:-2]
    if weights is not None:
        weights = weights.detach().to(dtype)
        if z.device.type == "cpu" and not traced(z, weights):
            if (weights < 0).any():
                raise ValueError(f"SIGReg: weights must be at least 0, and one is {float(weights.min()):g}")
        else:
            # elsewhere, reading them would make the host wait
            weights = torch.where(weights < 0, math.nan, weights)
        # a sample of weight 0 must not reach the products: 0 · NaN is NaN
        z = torch.where(weights[..., None] == 0, 0, z)
        weights = weights.reshape(-1, weights.shape[-1]).contiguous()
    return z.to(dtype).reshape(-1, *z.shape[-2:]), slices.to(dtype), weights, leading, impl


# registration. the operator returns statistics (B, M) and deviations (B, 2, K − 1, M), both differentiable, and the
# tensors that the backward pass needs: P in Triton, sin Δ·P and cos Δ·P in torch.
# torch 2.4 infers no schema from annotations that are not evaluated. torch caches compiled graphs by the names of their
# operators, so an operator with another signature needs another name


def _forward(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid, (batch, samples, _) = Knots(t_max, knots), z.shape
    # autocast would compute the product in bf16, which users report to give NaN and spikes
    with torch.autocast(z.device.type, enabled=False):
        if impl == "triton":
            p = exact_product(z.reshape(batch * samples, -1), slices, "triton")
            statistics, deviations = sigreg_triton.statistics(p, weights, samples, grid)
            return statistics, deviations, p, p.new_empty(0)
    with torch.autocast(z.device.type, enabled=False), exact_products():
        dtype = sigreg_torch.compute_dtype(z, slices)
        deviations, sine, cosine = sigreg_torch.forward(z.to(dtype), slices.to(dtype), weights, grid)
        count = samples if weights is None else weights.sum(-1)
        return statistic(deviations, count, t_max=t_max, knots=knots).to(z.dtype), deviations, sine, cosine


_forward_op = torch.library.custom_op(
    "fastle::sigreg_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor z, Tensor slices, Tensor? weights, float t_max, SymInt knots, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    z: Tensor, slices: Tensor, weights: Tensor | None, t_max: float, knots: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, samples, _), number = z.shape, slices.shape[1]
    if impl == "triton":
        sums, kept = z.dtype, (z.new_empty(batch * samples, number), z.new_empty(0))
    else:
        chunks, length = sigreg_torch.chunk_layout(samples)
        dtype = sigreg_torch.compute_dtype(z, slices)
        sine = z.new_empty(number, batch * chunks, length, dtype=dtype)
        sums, kept = sum_dtype(z.device), (sine, torch.empty_like(sine))
    deviations = z.new_empty(batch, 2, knots - 1, number, dtype=sums)
    return z.new_empty(batch, number), deviations, *kept


def _projection_gradient(
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
    """∂/∂P from the gradients to statistics and deviations: (B·N, M) in Triton, (M, Q, C) in torch (`sigreg_torch`)."""
    grid = Knots(t_max, knots)
    if impl == "triton" and to_statistics is not None and to_deviations is None:
        return sigreg_triton.projection_gradient(to_statistics, deviations, kept, weights, samples, grid)
    gradient = to_deviations
    if to_statistics is not None:
        count = samples if weights is None else weights.sum(-1, keepdim=True).clamp_min(1e-30)
        share = (2 / count * to_statistics)[:, None, None]
        from_statistics = grid.weights(deviations)[:, None] * deviations * share
        gradient = from_statistics if gradient is None else gradient + from_statistics
    if gradient is None:
        gradient = torch.zeros_like(deviations)
    if impl == "triton":
        return sigreg_triton.projection_gradient(gradient, deviations, kept, weights, samples, grid)
    with torch.autocast(kept.device.type, enabled=False), exact_products():
        return sigreg_torch.projection_gradient(kept, kept_cosine, weights, gradient, samples, grid)


_backward_op = torch.library.custom_op(
    "fastle::sigreg_backward",
    _projection_gradient,
    mutates_args=(),
    schema="(Tensor? to_statistics, Tensor? to_deviations, Tensor deviations, Tensor kept, Tensor kept_cosine,"
    " Tensor? weights, SymInt samples, float t_max, SymInt knots, str impl) -> Tensor",
)


@_backward_op.register_fake
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
    # a loss that uses one output only gives None for the other
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any,
    to_statistics: Tensor | None,
    to_deviations: Tensor | None,
    *_: None,
    projection_gradient: Any = _backward_op,
) -> tuple[Any, ...]:
    z, slices, weights, deviations, kept, kept_cosine = ctx.saved_tensors
    (batch, samples, dim) = z.shape
    grad_p = projection_gradient(
        to_statistics, to_deviations, deviations, kept, kept_cosine, weights, samples, ctx.t_max, ctx.knots, ctx.impl
    )
    if ctx.impl == "torch":
        # here padded samples have rows too
        grad_p = grad_p.flatten(1).T
    to_z, to_slices = None, None
    with torch.autocast(z.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            to_z = (
                exact_product(grad_p, slices.to(grad_p.dtype).T, ctx.impl).view(batch, -1, dim)[:, :samples].to(z.dtype)
            )
        if ctx.needs_input_grad[1]:
            padding = grad_p.shape[0] // batch - samples
            rows = torch.nn.functional.pad(z, (0, 0, 0, padding)).reshape(-1, dim).to(grad_p.dtype)
            to_slices = exact_product(rows.T, grad_p, ctx.impl).to(slices.dtype)
    return to_z, to_slices, None, None, None, None


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without its dispatch, which takes about 0.2 ms in each direction."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # with create_graph, call the operator: it raises an error when someone asks for a second derivative
        return _gradient(
            ctx, *gradients, projection_gradient=_backward_op if torch.is_grad_enabled() else _projection_gradient
        )


def _statistics_and_deviations(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Statistics and deviations, through the operator if torch is tracing, directly otherwise."""
    statistics, deviations, *_ = (_forward_op if traced(z) else _Eager.apply)(z, *arguments)
    return statistics, deviations
