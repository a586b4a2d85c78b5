"""kernels.sigreg as compiled for GPUs that need not be there: the PTX is executed and held to the formula in float64.

Slices are the unit vectors, so that samples are projections, and each statistic and gradient is one number of a kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.sigreg import cf_deviations, sigreg
from tests.kernels.sigreg_cases import made, some_weights
from tests.ptx.launches import every_arch, executed, marks, other_archs

pytestmark = marks

# of the largest entry; the kernels' own rounding is some 3e-7
LIMIT = 1e-6
# knots: kernels of more take longer to compile
FEW = 7


def evaluated(function: Any, z: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A function of samples on unit slices, and its gradient to them from one to its results."""
    z = z.clone().requires_grad_()
    value = function(z, torch.eye(z.shape[-1], dtype=z.dtype), **options)
    (gradient,) = torch.autograd.grad(value, z, upstream.expand_as(value).to(value.dtype))
    return value.detach(), gradient


def check(function: Any, z: Tensor, upstream: Tensor, arch: int, **options: Any) -> list[str]:
    """Holds values and gradients to the naive form in float64; the kernels that were launched."""
    with executed(arch) as launched:
        found = evaluated(function, z, upstream, impl="triton", **options)
    exact = evaluated(function, z.double(), upstream.double(), impl="reference", **options)
    for what, ours, right in zip(("value", "gradient"), found, exact, strict=True):
        # NaN, which no limit admits, where one of the two has a NaN
        largest = float((ours.double() - right).abs().max() / right.abs().max())
        assert largest <= LIMIT, f"{what}: {largest:.3g} of the largest entry, {LIMIT:.3g} allowed"
    return launched


def statistics_case(batch: int, samples: int, slices: int, weighted: bool, knots: int, arch: int) -> list[str]:
    z = made(batch, samples, slices, scale=1.5)
    weights = some_weights(batch, samples) if weighted else None
    upstream = made(batch, slices, seed=2)
    return check(sigreg, z, upstream, arch, weights=weights, knots=knots, reduction=None)


@every_arch
@pytest.mark.parametrize(
    ("batch", "samples", "slices", "weighted", "knots", "launches"),
    [
        # several splits of the samples, the last one ragged, and a ragged tile of slices; rows aligned to 16 and not
        pytest.param(2, 70, 96, False, 17, 3, id="B2-N70-M96-K17"),
        pytest.param(2, 70, 70, True, FEW, 3, id="B2-N70-M70-weighted"),
        # more splits than the second stage adds up at a time
        pytest.param(1, 2100, 7, True, FEW, 3, id="N2100-M7-weighted"),
        # all in one launch, with a single sample and slice as the extreme
        pytest.param(3, 50, 70, True, FEW, 2, id="B3-N50-M70-weighted"),
        pytest.param(1, 1, 1, False, FEW, 2, id="N1-M1"),
        # more knots than a program holds: groups of them, whose gradients are added up
        pytest.param(1, 37, 70, True, 25, 5, id="N37-M70-K25-weighted"),
    ],
)
def test_statistics(
    batch: int, samples: int, slices: int, weighted: bool, knots: int, launches: int, arch: int
) -> None:
    launched = statistics_case(batch, samples, slices, weighted, knots, arch)
    assert len(launched) == launches


@other_archs
def test_statistics_on_other_gpus(arch: int) -> None:
    statistics_case(2, 70, 70, True, FEW, arch)


@every_arch
def test_the_mean_of_bf16_samples(arch: int) -> None:
    # the one gradient of all statistics comes expanded, with strides of 0
    weights = some_weights(2, 70)
    z = made(2, 70, 70, dtype=torch.bfloat16)
    with executed(arch):
        found = sigreg(z, torch.eye(70), weights=weights, knots=FEW, impl="triton")
    exact = sigreg(z.double(), torch.eye(70, dtype=torch.float64), weights=weights, knots=FEW, impl="reference")
    assert abs(float(found) - float(exact)) <= LIMIT * float(exact)
    check(sigreg, z.float(), torch.ones(()), arch, weights=weights, knots=FEW)


@every_arch
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_deviations(weighted: bool, arch: int) -> None:
    z = made(2, 50, 70, scale=1.5)
    weights = some_weights(2, 50) if weighted else None
    check(cf_deviations, z, made(2, 2, FEW - 1, 70, seed=3), arch, weights=weights, knots=FEW)
