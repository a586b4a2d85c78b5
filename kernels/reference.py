"""SIGReg written out formula by formula: `impl="reference"`, which benchmarks call naive."""

from __future__ import annotations

import torch
from torch import Tensor


def sigreg(z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """The statistics (..., M) of `kernels.sigreg`, at all K knots and with every (N, M, K) tensor in memory."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    phi = torch.exp(-(t**2) / 2)
    quadrature = torch.full_like(t, 2 * t_max / (knots - 1))
    quadrature[0] /= 2
    quadrature[-1] /= 2
    if weights is None:
        angles = (z @ slices).unsqueeze(-1) * t  # [..., N, M, K]
        error = (angles.cos().mean(-3) - phi) ** 2 + angles.sin().mean(-3) ** 2  # [..., M, K]
        return z.shape[-2] * (error * quadrature * phi).sum(-1)
    count = weights.to(z.dtype).sum(-1, keepdim=True)  # [..., 1]
    share = (weights / count.clamp_min(1e-30))[..., None, None]  # [..., N, 1, 1]
    # a sample of weight 0 may hold NaN, and 0 · NaN is NaN
    angles = (torch.where(weights[..., None] == 0, 0, z) @ slices).unsqueeze(-1) * t
    error = ((share * angles.cos()).sum(-3) - phi) ** 2 + (share * angles.sin()).sum(-3) ** 2
    return count * (error * quadrature * phi).sum(-1)


def cf_deviations(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17
) -> Tensor:
    """The deviations (..., 2, K − 1, M) of `kernels.sigreg`."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)[1:]
    share = torch.ones_like(z[..., 0]) if weights is None else weights.to(z.dtype)
    z = torch.where(share[..., None] == 0, 0, z)
    angles = (z @ slices).unsqueeze(-1) * t  # [..., N, M, K-1]
    cosines = share[..., None, None] * (angles.cos() - torch.exp(-(t**2) / 2))
    sines = share[..., None, None] * angles.sin()
    return torch.stack((cosines.sum(-3), sines.sum(-3)), dim=-3).transpose(-2, -1)
