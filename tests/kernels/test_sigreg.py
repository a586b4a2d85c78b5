"""kernels.sigreg, every implementation, against formulas in fp64.

The oracle gets the samples and slices that the implementation gets, raised to fp64. Without a GPU, Triton's kernels run
in its interpreter, which is slow.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.sigreg import cf_deviations, sigreg, statistic
from tests import oracle
from tests.kernels.sigreg_cases import (
    DEVICE,
    GRADIENT,
    INTERPRETED,
    LOSS,
    check,
    error,
    evaluate,
    every_impl,
    every_size,
    finest,
    made,
    marks,
    some_weights,
    unit_columns,
)
from tests.kernels.views import needs_triton

pytestmark = marks

KNOTS_AND_RANGE = [(2, 1.0), (10, 3.0), (17, 3.0), (41, 5.0)]


def problem(n: int, d: int, m: int) -> tuple[Tensor, Tensor]:
    """Samples and slices; with D = M the slices are axes.

    A loss of few samples on few slices may be near zero by chance, and then the rounding of projections to fp32, which
    no implementation can avoid, exceeds the limits. Projections on axes need no rounding.
    """
    return made(n, d), torch.eye(d) if d == m else unit_columns(d, m)


# one sample, one tile and several, one split and several; one slice and several tiles of them. With 41 knots two
# programs share the blocks. The reference is not held to fp32's limits: its mean cos − φ cancels
TORCH = [
    (n, d, m, *case) for n, d, m in ((1, 1, 1), (2, 7, 7), (127, 130, 300), (1500, 3, 300)) for case in KNOTS_AND_RANGE
]
TRITON = [
    (1, 1, 1, 17, 3.0),
    (2, 7, 7, 10, 3.0),
    (64, 5, 5, 17, 3.0),
    (65, 3, 130, 2, 1.0),
    (300, 7, 7, 41, 5.0),
    (300, 3, 130, 17, 3.0),
]
GRID = [*(("torch", *x) for x in TORCH if x[0] > 1 or x[3] > 2), *(("triton", *x) for x in TRITON)]


@pytest.mark.parametrize(
    ("impl", "n", "d", "m", "knots", "t_max"), GRID, ids=["{}-N{}-D{}-M{}-K{}-t{}".format(*x) for x in GRID]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_fp32_equals_the_formula(n: int, d: int, m: int, knots: int, t_max: float, weighted: bool, impl: Any) -> None:
    z, slices = problem(n, d, m)
    if weighted and n * m < 1000:
        pytest.skip("too few weighted samples for fp32 to keep the limits")
    weights = some_weights(n) if weighted else None
    result = evaluate(z, slices, weights=weights, t_max=t_max, knots=knots, impl=impl)
    assert result.value.shape == () and result.value.dtype == torch.float32
    check(result, oracle.sigreg_and_gradients(z, slices, weights=weights, t_max=t_max, knots=knots))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (7, 3, 33), (1025, 4, 20)], ids=str)
def test_fp64_equals_the_formula(n: int, d: int, m: int, impl: Any) -> None:
    z, slices = made(2, n, d, dtype=torch.float64), unit_columns(d, m, torch.float64)
    for knots, t_max in KNOTS_AND_RANGE:
        for weights in (None, some_weights(2, n, dtype=torch.float64) + 0.1):
            options: dict[str, Any] = {"t_max": t_max, "knots": knots}
            exact = oracle.sigreg_and_gradients(z, slices, weights=weights, **options)
            check(evaluate(z, slices, weights=weights, impl=impl, **options), exact, f"K={knots} t_max={t_max}")


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all tests have its tiles")
def test_tiles_of_a_gpu() -> None:
    # flatter tiles mean more terms in each sum, and more rounding. With D = 1 slices do not average it out
    z, slices = problem(300, 7, 7)
    check(
        evaluate(z, slices, t_max=1.0, knots=2, impl="triton"),
        oracle.sigreg_and_gradients(z, slices, t_max=1.0, knots=2),
    )


@every_impl
@pytest.mark.parametrize("leading", [(2, 3), (1, 1)], ids=["2x3", "1x1"])
def test_each_leading_index_is_one_test(leading: tuple[int, ...], impl: Any) -> None:
    z, slices, weights = made(*leading, 7, 5), unit_columns(5, 6), some_weights(*leading, 7)
    for omega in (None, weights):
        exact = oracle.sigreg_and_gradients(z, slices, weights=omega)
        check(evaluate(z, slices, weights=omega, impl=impl), exact)
    statistics = sigreg(z.to(DEVICE), slices.to(DEVICE), reduction=None, impl=impl)
    exact = oracle.sigreg_and_gradients(z, slices)
    assert statistics.shape == (*leading, 6) and statistics.dtype == torch.float32
    assert error(statistics.mean(-1), exact.statistics.mean(-1)) <= LOSS * float(exact.statistics.mean(-1).min())


@every_size
def test_gradient_of_any_function_of_the_statistics(impl: Any, n: int, m: int) -> None:
    z, slices, upstream = made(2, n, 4), unit_columns(4, m), made(2, m, seed=2)
    leaves = [x.double().requires_grad_() for x in (z, slices)]
    statistics = torch.stack([oracle.sigreg_statistics(samples, leaves[1]) for samples in leaves[0]])
    expected = torch.autograd.grad((statistics * upstream.double()).sum(), leaves)
    leaves = [x.to(DEVICE).requires_grad_() for x in (z, slices)]
    # transposed, so that the gradient that arrives is not contiguous
    value = (sigreg(leaves[0], leaves[1], reduction=None, impl=impl).T * upstream.T.contiguous().to(DEVICE)).sum()
    for gradient, right in zip(torch.autograd.grad(value, leaves, retain_graph=True), expected, strict=True):
        assert error(gradient, right) <= GRADIENT * float(right.abs().max())
    for leaf, right in zip(leaves, expected, strict=True):
        (alone,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert error(alone, right) <= GRADIENT * float(right.abs().max())


LAYOUTS: dict[str, tuple[Tensor, Tensor]] = {
    "transposed": (made(6, 7).T, made(10, 6, seed=1).T),
    "strided": (made(14, 18)[::2, ::3], unit_columns(6, 10)[:, ::2]),
    "channels-last": (made(7, 6, 4).permute(2, 0, 1), unit_columns(6, 10)),
    "expanded": (made(7, 1).expand(3, 7, 6), unit_columns(6, 1).expand(6, 10)),
}


@every_impl
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout(layout: str, impl: Any) -> None:
    z, slices = LAYOUTS[layout]
    weights = some_weights(z.shape[-2], 4).T[0].expand(z.shape[:-1])
    for omega in (None, weights):
        check(evaluate(z, slices, weights=omega, impl=impl), oracle.sigreg_and_gradients(z, slices, weights=omega))


@every_size
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_raised_to_fp32(dtype: torch.dtype, impl: Any, n: int, m: int) -> None:
    z = made(n, 8).to(dtype)
    for slices in (unit_columns(8, m).to(dtype), unit_columns(8, m)):
        low, full = (evaluate(x, a, impl=impl) for x, a in ((z, slices), (z.float(), slices.float())))
        assert low.value.dtype == torch.float32
        torch.testing.assert_close(low.value, full.value, rtol=LOSS, atol=0)
        for ours, right, like in ((low.to_z, full.to_z, z), (low.to_slices, full.to_slices, slices)):
            assert ours.dtype == like.dtype
            # one rounding to the low dtype, of numbers that agree within fp32's limit
            limits = torch.finfo(ours.dtype)
            allowed = limits.eps / 2 * right.abs().clamp_min(limits.smallest_normal) + GRADIENT * right.abs().max()
            assert ((ours.float() - right).abs() <= allowed).all()


# weights


@every_size
def test_samples_of_weight_zero_may_hold_anything(impl: Any, n: int, m: int) -> None:
    z, slices = made(2, n, 4), unit_columns(4, m)
    mask = some_weights(2, n) > 0.8
    exact = oracle.sigreg_and_gradients(z, slices, weights=mask)
    z[~mask] = torch.tensor([math.nan, math.inf, 1e30, 0.0])
    for weights in (mask, mask.float(), mask.half()):
        result = evaluate(z, slices, weights=weights, impl=impl)
        check(result, exact)
        assert not result.to_z.cpu()[~mask].any()


@every_impl
def test_weight_two_counts_twice(impl: Any) -> None:
    z, slices = made(9, 4, dtype=finest(impl)), unit_columns(4, 5, finest(impl))
    times = torch.tensor([2, 0, 1, 3, 1, 0, 5, 1, 2])
    exact = oracle.sigreg_and_gradients(z.repeat_interleave(times, 0), slices)
    exact.to_z = torch.stack([rows.sum(0) for rows in exact.to_z.split(times.tolist())])
    check(evaluate(z, slices, weights=times.to(z.dtype), impl=impl), exact)


@every_size
def test_a_test_without_weight_scores_zero(impl: Any, n: int, m: int) -> None:
    z, slices, weights = made(2, n, 4), unit_columns(4, m), torch.ones(2, n)
    z[1, 2], weights[1] = math.nan, 0
    check(evaluate(z, slices, weights=weights, impl=impl), oracle.sigreg_and_gradients(z, slices, weights=weights))
    statistics = sigreg(z.to(DEVICE), slices.to(DEVICE), weights=weights.to(DEVICE), reduction=None, impl=impl)
    assert not statistics[1].any() and statistics[0].all()


# deviations


@every_impl
@pytest.mark.parametrize(("n", "d", "m", "knots", "t_max"), [(9, 4, 3, 17, 3.0), (129, 3, 70, 2, 5.0)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_deviations_and_their_gradients(
    n: int, d: int, m: int, knots: int, t_max: float, weighted: bool, impl: Any
) -> None:
    z, slices = made(n, d, dtype=finest(impl)), unit_columns(d, m, finest(impl))
    weights = some_weights(n, dtype=z.dtype) if weighted else None
    upstream, options = made(2, knots - 1, m, seed=3, dtype=z.dtype), {"t_max": t_max, "knots": knots}
    leaves = [x.double().requires_grad_() for x in (z, slices)]
    expected = oracle.cf_deviations(*leaves, weights=weights, **options)  # type: ignore[arg-type]
    rights = torch.autograd.grad((expected * upstream).sum(), leaves)
    leaves = [x.to(DEVICE).requires_grad_() for x in (z, slices)]
    here = None if weights is None else weights.to(DEVICE)
    deviations = cf_deviations(*leaves, weights=here, impl=impl, **options)  # type: ignore[arg-type]
    assert deviations.shape == (2, knots - 1, m) and deviations.dtype == z.dtype
    limit = 1e-10 if z.dtype == torch.float64 else GRADIENT
    assert error(deviations, expected.detach()) <= limit * float(expected.detach().abs().max())
    gradients = torch.autograd.grad((deviations * upstream.to(DEVICE)).sum(), leaves)
    for gradient, right in zip(gradients, rights, strict=True):
        assert error(gradient, right) <= limit * float(right.abs().max())


@every_size
def test_statistic_of_the_deviations_is_sigreg(impl: Any, n: int, m: int) -> None:
    z, slices, weights = made(2, n, 4).to(DEVICE), unit_columns(4, m).to(DEVICE), some_weights(2, n).to(DEVICE)
    options: dict[str, Any] = {"t_max": 2.0, "knots": 17, "impl": impl}
    for omega, count in ((None, n), (weights, weights.sum(-1))):
        parts = [
            cf_deviations(z[:, part], slices, weights=None if omega is None else omega[:, part], **options)
            for part in (slice(0, 3), slice(3, None))
        ]
        assert parts[0].shape == (2, 2, 16, m)
        # deviations of the parts of a batch add up
        result = statistic(parts[0] + parts[1], count, t_max=2.0, knots=17)
        torch.testing.assert_close(result.mean(), sigreg(z, slices, weights=omega, **options), rtol=LOSS, atol=0)


# the limits of fp32


def eager(z: Tensor, slices: Tensor) -> Tensor:
    """The statistics as they are usually written, in the dtype of z."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    phi, weights = torch.exp(-(t**2) / 2), torch.full_like(t, 6 / 16)
    weights[0] = weights[-1] = 3 / 16
    angles = (z @ slices).unsqueeze(-1) * t
    errors = (angles.cos().mean(-3) - phi) ** 2 + angles.sin().mean(-3) ** 2
    return z.shape[-2] * (errors * phi * weights).sum(-1)


# "exact" has axes as slices, whose projections need no rounding. D = 3 is left out: BLAS libraries sum products of few
# columns in an order that depends on the layout of the operands, so their rounding is not eager's (MKL on an AMD CPU:
# 3 to 5 times as much). Exact angles of 10 are left out: they round little more than sines and cosines do
@pytest.mark.parametrize(("largest", "d"), [(10.0, 130), (1e3, 130), (100.0, None), (1e3, None)])
@every_size
def test_large_projections_are_as_exact_as_in_eager_fp32(
    impl: Any, m: int, n: int, d: int | None, largest: float
) -> None:
    # root mean squares of the errors of 384 statistics and of all entries of the gradient
    slices = torch.eye(384) if d is None else unit_columns(d, 384)
    z = made(90 if m == 400 else 64, len(slices))
    z *= largest / float((z @ slices).abs().max())
    exact = oracle.sigreg_and_gradients(z, slices)

    def rms(statistics: Tensor, gradient: Tensor) -> list[float]:
        pairs = (statistics, exact.statistics), (gradient, exact.to_z)
        return [float((ours.detach().cpu().double() - right).square().mean().sqrt()) for ours, right in pairs]

    leaf = z.clone().requires_grad_()
    statistics = eager(leaf, slices)
    allowed = rms(statistics, *torch.autograd.grad(statistics.mean(), leaf))
    leaf = z.to(DEVICE).requires_grad_()
    statistics = sigreg(leaf, slices.to(DEVICE), reduction=None, impl=impl)
    errors = rms(statistics, *torch.autograd.grad(statistics.mean(), leaf))
    for name, ours, theirs in zip(("statistics", "gradient"), errors, allowed, strict=True):
        assert ours <= 2 * theirs, f"{name}: {ours / theirs:.2f} times the error of eager fp32"


@every_size
def test_degenerate_and_extreme_samples(impl: Any, n: int, m: int) -> None:
    slices = unit_columns(4, m)
    slices[:, 2] = 0
    for scale in (1.0, 0.0, 1e-3, 1e-12):
        z = made(1, 4, scale=scale).repeat(n, 1)
        check(evaluate(z, slices, impl=impl), oracle.sigreg_and_gradients(z, slices), f"scale {scale}")
    for scale in (1e-30, 1e4, 1e30):
        # fp32 has no phase of a huge angle, but |C − φ|² + S² is at most 4
        result = evaluate(made(n, 4, scale=scale), slices, impl=impl)
        assert 0 <= float(result.value) <= n * 4 * math.sqrt(2 * math.pi)
        assert result.to_z.isfinite().all() and result.to_slices.isfinite().all()


@every_size
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_nan_stays_in_its_own_test(value: float, impl: Any, n: int, m: int) -> None:
    z, slices = made(2, n, 4).to(DEVICE), unit_columns(4, m).to(DEVICE)
    spoilt = z.clone()
    spoilt[1, n - 2, 3] = value
    results = []
    for samples in (z, spoilt):
        leaf = samples.requires_grad_()
        statistics = sigreg(leaf, slices, reduction=None, impl=impl)
        results.append((statistics, *torch.autograd.grad(statistics.sum(), leaf)))
    for clean, bad in zip(*results, strict=True):
        assert bad[1].isnan().all() and torch.equal(bad[0], clean[0])
    assert cf_deviations(spoilt, slices, impl=impl)[1].isnan().all()
