"""What the tests of kernels.sigreg share: implementations and sizes, samples and slices, and the limits of a dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.sigreg import sigreg
from tests import oracle

IMPLS = ["reference", "torch", "triton"]
INTERPRETED = not torch.cuda.is_available()
# what is asked of fp32: of the loss, and of the gradient's largest error against its largest entry
LOSS, GRADIENT = 2e-6, 1e-5

marks = [
    pytest.mark.usefixtures("larger_tiles"),
    # the torch path says when it compiles, once
    pytest.mark.filterwarnings("ignore:fastle compiles:UserWarning"),
]
every_impl = pytest.mark.parametrize("impl", IMPLS)
fused = pytest.mark.parametrize("impl", ["torch", "triton"])
# with many angles the torch path has forms of its own, some of them compiled; 65 samples are two tiles (`larger_tiles`)
EVERY_SIZE = {
    "reference": ("reference", 130, 5),
    "torch": ("torch", 130, 5),
    "torch-many": ("torch", 130, 400),
    "triton": ("triton", 65, 5),
}
every_size = pytest.mark.parametrize(("impl", "n", "m"), list(EVERY_SIZE.values()), ids=list(EVERY_SIZE))


def made(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return scale * torch.randn(shape, generator=Generator().manual_seed(seed), dtype=dtype)


def unit_columns(dim: int, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    slices = made(dim, number, seed=1, dtype=torch.float64)
    return (slices / slices.norm(dim=0)).to(dtype)


def finest(impl: Any) -> torch.dtype:
    """The most exact dtype that an implementation takes."""
    return torch.float32 if impl == "triton" else torch.float64


@dataclass
class Found:
    """A loss and its gradients."""

    value: Tensor
    to_z: Tensor
    to_slices: Tensor


def evaluate(z: Tensor, slices: Tensor, device: torch.device, **options: Any) -> Found:
    z, slices = z.detach().to(device).requires_grad_(), slices.detach().to(device).requires_grad_()
    weights = options.pop("weights", None)
    value = sigreg(z, slices, weights=None if weights is None else weights.to(device), **options)
    return Found(value.detach(), *torch.autograd.grad(value, (z, slices)))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error. NaN, which no limit admits, where one of the two has a NaN."""
    assert found.shape == expected.shape
    return float((found.detach().cpu().double() - expected.detach()).abs().max())


def check(found: Found, exact: oracle.SIGRegOracle, what: str = "") -> None:
    """Hold a loss and its gradients to the limits of their dtype."""
    double = found.value.dtype == torch.float64
    value, limits = exact.statistics.mean(), (1e-10, 1e-10) if double else (LOSS, GRADIENT)
    for name, ours, right, allowed in (
        ("loss", found.value, value, limits[0] * float(value)),
        ("gradient to z", found.to_z, exact.to_z, limits[1] * float(exact.to_z.abs().max())),
        ("gradient to slices", found.to_slices, exact.to_slices, limits[1] * exact.parts),
    ):
        largest = error(ours, right)
        assert largest <= allowed, f"{name} {what}: {largest:.3g} off, {allowed:.3g} allowed"
