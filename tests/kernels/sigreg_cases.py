"""Implementations and sizes, samples and slices, and error limits for the tests of kernels.sigreg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.sigreg import sigreg
from tests import oracle

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# the largest relative error of an fp32 loss, and of a gradient relative to its largest entry
LOSS, GRADIENT = 2e-6, 1e-5

marks = pytest.mark.usefixtures("larger_tiles")
every_impl = pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
fused = pytest.mark.parametrize("impl", ["torch", "triton"])
# with many angles the torch implementation is `sigreg_cpu`. 65 samples are two tiles in Triton (`larger_tiles`)
EVERY_SIZE = {"torch": ("torch", 130, 5), "torch-many": ("torch", 130, 400), "triton": ("triton", 65, 5)}
every_size = pytest.mark.parametrize(("impl", "n", "m"), list(EVERY_SIZE.values()), ids=list(EVERY_SIZE))


def made(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return scale * torch.randn(shape, generator=Generator().manual_seed(seed), dtype=dtype)


def unit_columns(dim: int, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    slices = made(dim, number, seed=1, dtype=torch.float64)
    return (slices / slices.norm(dim=0)).to(dtype)


def some_weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights in [0, 2), some of them 0."""
    weights = 2 * torch.rand(shape, generator=Generator().manual_seed(5), dtype=dtype)
    return torch.where(weights < 0.3, 0, weights)


def finest(impl: Any) -> torch.dtype:
    """The most precise dtype that an implementation takes."""
    return torch.float32 if impl == "triton" else torch.float64


@dataclass
class Result:
    """A loss and its gradients."""

    value: Tensor
    to_z: Tensor
    to_slices: Tensor


def evaluate(z: Tensor, slices: Tensor, **options: Any) -> Result:
    z, slices = z.detach().to(DEVICE).requires_grad_(), slices.detach().to(DEVICE).requires_grad_()
    weights = options.pop("weights", None)
    value = sigreg(z, slices, weights=None if weights is None else weights.to(DEVICE), **options)
    return Result(value.detach(), *torch.autograd.grad(value, (z, slices)))


def error(result: Tensor, expected: Tensor) -> float:
    """The largest error. It is NaN, which exceeds every limit, if one of the two has a NaN."""
    assert result.shape == expected.shape
    return float((result.detach().cpu().double() - expected.detach()).abs().max())


def check(result: Result, exact: oracle.SIGRegOracle, what: str = "") -> None:
    """Holds a loss and its gradients to the limits of their dtype."""
    double = result.value.dtype == torch.float64
    value, limits = exact.statistics.mean(), (1e-10, 1e-10) if double else (LOSS, GRADIENT)
    for name, ours, right, allowed in (
        ("loss", result.value, value, limits[0] * float(value)),
        ("gradient to z", result.to_z, exact.to_z, limits[1] * float(exact.to_z.abs().max())),
        ("gradient to slices", result.to_slices, exact.to_slices, limits[1] * exact.parts),
    ):
        largest = error(ours, right)
        # the dtype has no smaller normal numbers
        limit = max(allowed, torch.finfo(ours.dtype).tiny)
        assert largest <= limit, f"{name} {what}: {largest:.3g} off, {limit:.3g} allowed"
