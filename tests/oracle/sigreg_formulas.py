"""SIGReg with all its knots, and the conventions of others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def sigreg_statistics(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """(N, D) samples on (D, M) slices: the (M,) statistics, through (N, M, K) tensors."""
    step = t_max / (knots - 1)
    t = torch.arange(knots, dtype=z.dtype) * step
    phi = torch.exp(-(t**2) / 2)
    weight = 2 * step * phi
    weight[0] = weight[0] / 2
    weight[-1] = weight[-1] / 2
    angles_NMK = torch.einsum("nd,dm->nm", z, slices)[:, :, None] * t
    cosine_MK, sine_MK = angles_NMK.cos().mean(0), angles_NMK.sin().mean(0)
    return z.shape[0] * (weight * ((cosine_MK - phi) ** 2 + sine_MK**2)).sum(1)


def sigreg_gradient(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """∂SIGReg/∂z (N, D) by the formula of docs/method.md, section 2."""
    step = t_max / (knots - 1)
    projected_NM = z @ slices
    gradient_NM = torch.zeros_like(projected_NM)
    for k in range(knots):
        t = k * step
        phi = math.exp(-t * t / 2)
        weight = (step if k in (0, knots - 1) else 2 * step) * phi
        cosine_NM, sine_NM = torch.cos(t * projected_NM), torch.sin(t * projected_NM)
        inner = sine_NM.mean(0) * cosine_NM - (cosine_NM.mean(0) - phi) * sine_NM
        gradient_NM += 2 * weight * t * inner
    return gradient_NM @ slices.T / slices.shape[1]


def sigreg(z: Tensor, slices: Tensor) -> Tensor:
    """The loss of a code: (N, D), or (B, c, h, w) tested position by position."""
    if z.dim() == 2:
        return sigreg_statistics(z, slices).mean()
    positions = [z[:, :, i, j] for i in range(z.shape[2]) for j in range(z.shape[3])]
    return torch.stack([sigreg_statistics(samples, slices).mean() for samples in positions]).mean()


@dataclass
class SIGRegOracle:
    """The (..., M) statistics, and the gradients of their mean to z (..., N, D) and to the slices (D, M).

    An entry of `to_slices` is a sum over samples whose terms may cancel. `parts` is the largest sum of the terms'
    absolute values, which sets the scale of its rounding.
    """

    statistics: Tensor
    to_z: Tensor
    to_slices: Tensor
    parts: float


def sigreg_and_gradients(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17
) -> SIGRegOracle:
    """Statistics and gradients of samples (..., N, D) by the formulas, one test and one knot at a time, in fp64.

    Args:
        weights: (..., N), how often each sample counts. Samples of weight 0 are left out before anything is computed.
    """
    leading, slices = z.shape[:-2], slices.double()
    samples = z.double().flatten(0, -3) if leading else z.double()[None]
    counted = torch.ones(samples.shape[:2]) if weights is None else weights.reshape(samples.shape[:2])
    share = 1 / (samples.shape[0] * slices.shape[1])
    to_z, to_slices, parts = torch.zeros_like(samples), torch.zeros_like(slices), torch.zeros_like(slices)
    statistics = []
    for b in range(samples.shape[0]):
        kept = counted[b] > 0
        values, times = samples[b][kept], counted[b][kept].double()[:, None]
        total = float(times.sum())
        projected_NM, score_M = values @ slices, slices.new_zeros(slices.shape[1])
        gradient_NM = torch.zeros_like(projected_NM)
        for k in range(knots if total > 0 else 0):
            step = t_max / (knots - 1)
            t = k * step
            phi = math.exp(-t * t / 2)
            weight = (step if k in (0, knots - 1) else 2 * step) * phi
            cosine_NM, sine_NM = torch.cos(t * projected_NM), torch.sin(t * projected_NM)
            cosine_M, sine_M = (times * cosine_NM).sum(0) / total - phi, (times * sine_NM).sum(0) / total
            score_M += total * weight * (cosine_M**2 + sine_M**2)
            gradient_NM += 2 * weight * t * times * (sine_M * cosine_NM - cosine_M * sine_NM)
        statistics.append(score_M)
        to_z[b, kept] = share * gradient_NM @ slices.T
        to_slices += share * values.T @ gradient_NM
        parts += share * values.T.abs() @ gradient_NM.abs()
    return SIGRegOracle(torch.stack(statistics).view(*leading, -1), to_z.view(z.shape), to_slices, float(parts.max()))


def cf_deviations(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17
) -> Tensor:
    """(N, D) samples on (D, M) slices: Σ_n ω_n (cos − φ) and Σ_n ω_n sin at all knots but t = 0, (2, K − 1, M)."""
    times = torch.ones(z.shape[0], dtype=z.dtype) if weights is None else weights.to(z.dtype)
    rows = []
    for k in range(1, knots):
        t = k * t_max / (knots - 1)
        angles_NM = t * (z @ slices)
        rows.append(torch.stack([times @ (angles_NM.cos() - math.exp(-t * t / 2)), times @ angles_NM.sin()]))
    return torch.stack(rows, dim=1)


def sigreg_eb_jepa(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 10
) -> Tensor:
    """eb_jepa's loss of (N, D) samples: knots on both sides of 0, one at a time, and no factor N."""
    times = torch.ones(z.shape[0], dtype=z.dtype) if weights is None else weights.to(z.dtype)
    z, times = z[times > 0], times[times > 0]
    if z.shape[0] == 0:
        return z.sum()
    projected_NM, share_N = z @ slices, (times / times.sum()).to(torch.complex128)
    t = torch.linspace(-t_max, t_max, knots, dtype=z.dtype)
    heights = []
    for point in t:
        window = torch.exp(-(point**2) / 2)
        empirical_M = share_N @ torch.exp(1j * point * projected_NM)
        heights.append(window * (empirical_M - window).abs() ** 2)
    return torch.trapezoid(torch.stack(heights), t, dim=0).mean()
