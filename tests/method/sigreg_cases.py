"""Samples, slices, weights and the formulas of the conventions, for the tests of SIGReg."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.method.sigreg import draw_slices
from tests import oracle


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def slices_of(dim: int, number: int, seed: int = 1) -> Tensor:
    return draw_slices(dim, number, Generator().manual_seed(seed)).double()


CONVENTIONS: list[Any] = ["leautoencoder", "minimal", "lejepa", "lightly", "eb_jepa"]
every_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def exact(
    convention: Any, z: Tensor, slices: Tensor, weights: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss of the samples of one process, and its gradient, by the formulas in fp64."""
    z, slices = z.detach().double(), slices.double()
    if convention != "eb_jepa":
        formula = oracle.sigreg_and_gradients(z, slices, weights=weights, **options)
        return formula.statistics.mean(), formula.to_z
    z.requires_grad_()
    counted = torch.ones(z.shape[:-1]) if weights is None else weights
    tests = zip(z.view(-1, *z.shape[-2:]), counted.reshape(-1, z.shape[-2]), strict=True)
    losses = [oracle.sigreg_eb_jepa(samples, slices, weights=omega, **options) for samples, omega in tests]
    value = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def weights_of(*shape: int) -> Tensor:
    weights = 2 * torch.rand(shape, generator=Generator().manual_seed(5), dtype=torch.float64)
    return torch.where(weights < 0.5, 0, weights)
