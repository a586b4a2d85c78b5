"""kernels.sigreg with weights, and the deviations that it is made from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator

from fastle.kernels.sigreg import cf_deviations, sigreg, statistic
from tests import oracle
from tests.kernels.sigreg_cases import (
    GRADIENT,
    LOSS,
    check,
    error,
    evaluate,
    every_impl,
    every_size,
    finest,
    made,
    marks,
    unit_columns,
)

pytestmark = marks


# weights


@every_size
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=["one", "3", "2x2"])
def test_weights_equal_the_formula(leading: tuple[int, ...], impl: Any, n: int, m: int, device: torch.device) -> None:
    dtype = torch.float32 if m == 400 else finest(impl)
    z, slices = made(*leading, n, 4, dtype=dtype), unit_columns(4, m, dtype)
    weights = 2 * torch.rand(z.shape[:-1], generator=Generator().manual_seed(5), dtype=z.dtype)
    weights[weights < 0.3] = 0
    exact = oracle.sigreg_and_gradients(z, slices, weights=weights)
    check(evaluate(z, slices, device, weights=weights, impl=impl), exact)


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_mask_leaves_samples_out_whatever_they_hold(
    dtype: torch.dtype, impl: Any, n: int, m: int, device: torch.device
) -> None:
    z, slices = made(2, n, 4).to(dtype), unit_columns(4, m)
    mask = torch.rand(2, n, generator=Generator().manual_seed(5)) < 0.6
    left_out = (~mask).nonzero()
    z[tuple(left_out[::3].T)] = math.nan
    z[tuple(left_out[1::3].T)] = math.inf
    found = evaluate(z, slices, device, weights=mask, impl=impl)
    assert not found.to_z.cpu()[~mask].any()
    subsets = [evaluate(samples[kept], slices, device, impl=impl) for samples, kept in zip(z, mask, strict=True)]
    torch.testing.assert_close(found.value, torch.stack([s.value for s in subsets]).mean(), rtol=LOSS, atol=0)
    for b, subset in enumerate(subsets):
        gradient = subset.to_z.float() / 2
        # both sides are rounded: twice half a unit
        limits = torch.finfo(dtype)
        allowed = limits.eps * gradient.abs().clamp_min(limits.smallest_normal) + GRADIENT * gradient.abs().max()
        assert ((found.to_z[b][mask[b].to(device)].float() - gradient).abs() <= allowed).all()
    torch.testing.assert_close(
        found.to_slices, torch.stack([s.to_slices for s in subsets]).mean(0), rtol=GRADIENT, atol=GRADIENT
    )
    # the same, said with numbers
    for weights in (mask.float(), mask.to(dtype)):
        assert torch.equal(sigreg(z.to(device), slices.to(device), weights=weights.to(device), impl=impl), found.value)


@every_impl
def test_weight_two_counts_twice(impl: Any, device: torch.device) -> None:
    z, slices = made(9, 4, dtype=finest(impl)), unit_columns(4, 5, finest(impl))
    times = torch.tensor([2, 0, 1, 3, 1, 0, 5, 1, 2])
    exact = oracle.sigreg_and_gradients(z.repeat_interleave(times, 0), slices)
    exact.to_z = torch.stack([rows.sum(0) for rows in exact.to_z.split(times.tolist())])
    check(evaluate(z, slices, device, weights=times.to(z.dtype), impl=impl), exact)


@every_size
def test_no_weight_at_all_is_statistic_zero(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(2, n, 4), unit_columns(4, m)
    z[1, 2] = math.nan
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1] = False
    for weights in (mask, mask.float()):
        exact = oracle.sigreg_and_gradients(z, slices, weights=weights)
        check(evaluate(z, slices, device, weights=weights, impl=impl), exact)
        statistics = sigreg(z.to(device), slices.to(device), weights=weights.to(device), reduction=None, impl=impl)
        assert not statistics[1].any() and statistics[0].all()
    nothing = evaluate(z, slices, device, weights=torch.zeros(2, n), impl=impl)
    assert float(nothing.value) == 0 and not nothing.to_z.any() and not nothing.to_slices.any()


@every_impl
def test_strided_weights(impl: Any, device: torch.device) -> None:
    z, slices = made(3, 8, 4), unit_columns(4, 5)
    pool = made(6, 16).abs().to(device)
    for weights in (pool.view(16, 6)[:8, :3].T, pool[::2, ::2], pool[0, :8].expand(3, 8)):
        exact = oracle.sigreg_and_gradients(z, slices, weights=weights.cpu())
        check(evaluate(z, slices, device, weights=weights, impl=impl), exact)


# deviations


@every_impl
@pytest.mark.parametrize(("n", "d", "m", "knots", "t_max"), [(9, 4, 3, 17, 3.0), (129, 3, 70, 2, 5.0)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_deviations_and_their_gradients(
    n: int, d: int, m: int, knots: int, t_max: float, weighted: bool, impl: Any, device: torch.device
) -> None:
    # 17 knots, 16 of them live: the knot t = 0 contributes nothing
    z, slices = made(n, d, dtype=finest(impl)), unit_columns(d, m, finest(impl))
    weights = 2 * torch.rand(n, generator=Generator().manual_seed(5), dtype=z.dtype) if weighted else None
    upstream = made(2, knots - 1, m, seed=3, dtype=z.dtype)
    options: dict[str, Any] = {"t_max": t_max, "knots": knots}

    leaves = [x.double().requires_grad_() for x in (z, slices)]
    expected = oracle.cf_deviations(*leaves, weights=weights, **options)
    gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    leaves = [x.to(device).requires_grad_() for x in (z, slices)]
    found = cf_deviations(*leaves, weights=None if weights is None else weights.to(device), impl=impl, **options)
    assert found.shape == (2, knots - 1, m) and found.dtype == z.dtype
    limit = 1e-10 if z.dtype == torch.float64 else GRADIENT
    assert error(found, expected.detach()) <= limit * float(expected.detach().abs().max())
    for gradient, right in zip(
        torch.autograd.grad((found * upstream.to(device)).sum(), leaves), gradients, strict=True
    ):
        assert error(gradient, right) <= limit * float(right.abs().max())


@every_impl
def test_deviations_of_the_parts_add_up(impl: Any, device: torch.device) -> None:
    z, slices = made(2, 70, 4, dtype=finest(impl)).to(device), unit_columns(4, 9, finest(impl)).to(device)
    weights = made(2, 70, seed=5, dtype=z.dtype).abs().to(device)
    # to a few roundings of sums of 70 cosines
    tolerance = 1e-10 if z.dtype == torch.float64 else 70 * 2**-21
    for omega in (None, weights, weights > 0.5):
        whole = cf_deviations(z, slices, weights=omega, impl=impl)
        assert whole.shape == (2, 2, 16, 9)
        parts = [
            cf_deviations(z[:, part], slices, weights=None if omega is None else omega[:, part], impl=impl)
            for part in (slice(0, 3), slice(3, 68), slice(68, 70))
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=tolerance, atol=tolerance)


@every_size
def test_statistic_of_the_deviations_is_sigreg(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(2, n, 4).to(device), unit_columns(4, m).to(device)
    options: dict[str, Any] = {"t_max": 2.0, "knots": 17}
    found = statistic(cf_deviations(z, slices, impl=impl, **options), n, **options)
    torch.testing.assert_close(
        found.mean(), sigreg(z, slices, impl=impl, reduction="mean", **options), rtol=LOSS, atol=0
    )
    torch.testing.assert_close(found, sigreg(z, slices, impl=impl, reduction=None, **options), rtol=1e-5, atol=1e-6)
    weights = made(n, seed=5).abs().to(device)
    deviations = cf_deviations(z[0], slices, weights=weights, impl=impl, **options)
    found = statistic(deviations, weights.sum(), **options)
    torch.testing.assert_close(
        found.mean(), sigreg(z[0], slices, weights=weights, impl=impl, **options), rtol=LOSS, atol=0
    )
