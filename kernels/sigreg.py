"""The empirical characteristic function on random slices, and the SIGReg statistic made from it.

    P_nm = Σ_d Z_nd A_dm            t_k = k·t_max/(K−1),  k = 0..K−1            φ_k = exp(−t_k²/2)
    C_km = mean_n cos(t_k P_nm)     S_km = mean_n sin(t_k P_nm)                 w_k = 2Δ·φ_k, halved at both ends
    statistic_m = N · Σ_k w_k [(C_km − φ_k)² + S_km²]

    N samples, D features, M slices, K knots (the knot t = 0 contributes exactly nothing, so K − 1 are computed).

The sums over n are one function and the statistic another, because data parallelism reduces the former between them.
Source: LeJEPA (arXiv 2511.08544), the Epps-Pulley test of normality with a trapezoidal rule on [0, t_max].
"""

from __future__ import annotations

import torch
from torch import Tensor


def cf_sums(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """Σ_n cos(t_k P_nm) and Σ_n sin(t_k P_nm) at the live knots.

    Args:
        z: (..., N, D) samples; bf16 and fp16 are raised to fp32, float64 stays.
        slices: (D, M), unit columns.
        t_max: the largest knot, > 0.
        knots: K ≥ 2, counting t = 0.

    Returns:
        (..., 2, K − 1, M) in fp32 (float64 for float64): cosines first.

    Raises:
        ValueError: shapes that do not fit, no samples, or knots and t_max out of range.
    """
    if z.ndim < 2 or slices.ndim != 2 or z.shape[-1] != slices.shape[0]:
        raise ValueError(f"z (..., N, D) and slices (D, M) do not fit: {tuple(z.shape)} and {tuple(slices.shape)}")
    if 0 in z.shape[:-1] or slices.shape[1] == 0:
        raise ValueError(f"SIGReg of nothing is undefined: z {tuple(z.shape)}, slices {tuple(slices.shape)}")
    t = _live_knots(t_max, knots, z)
    # autocast would lower the product to bf16, where users report NaN and spikes
    with torch.autocast(z.device.type, enabled=False):
        p = z.to(t.dtype) @ slices.to(t.dtype)  # [..., N, M]
    angles = t[:, None, None] * p.unsqueeze(-3)  # [..., K-1, N, M]
    return torch.stack((angles.cos().sum(-2), angles.sin().sum(-2)), dim=-3)


def statistic(sums: Tensor, count: Tensor | int, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """The Epps-Pulley statistic of each slice, from `cf_sums` over all samples (of all ranks).

    Args:
        sums: (..., 2, K − 1, M).
        count: N, the number of samples summed.

    Returns:
        (..., M). About 1.05 on average for standard normal samples, not 0.
    """
    t = _live_knots(t_max, knots, sums)
    phi = torch.exp(-0.5 * t.square())
    w = 2.0 * (t_max / (knots - 1)) * phi
    # trapezoid: the last knot has half a weight (and so has t = 0, where the integrand vanishes)
    w = torch.cat((w[:-1], 0.5 * w[-1:]))
    cos_mean, sin_mean = (sums / count).unbind(-3)  # [..., K-1, M]
    error = (cos_mean - phi[:, None]).square() + sin_mean.square()
    return count * (w[:, None] * error).sum(-2)


def _live_knots(t_max: float, knots: int, like: Tensor) -> Tensor:
    if knots < 2 or not t_max > 0:
        raise ValueError(f"SIGReg needs knots >= 2 and t_max > 0, not knots={knots} and t_max={t_max}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.arange(1, knots, device=like.device, dtype=dtype) * (t_max / (knots - 1))
