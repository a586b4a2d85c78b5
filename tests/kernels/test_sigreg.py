"""kernels.sigreg, every implementation, against formulas in float64.

Samples and slices are what they are in the dtype under test: the oracle gets the same numbers, raised to float64.
Without a GPU, Triton's kernels run under its interpreter, which is slow: they get fewer of the large shapes.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.sigreg import cf_deviations, sigreg
from tests import oracle
from tests.kernels.sigreg_cases import (
    GRADIENT,
    INTERPRETED,
    LOSS,
    check,
    error,
    evaluate,
    every_impl,
    every_size,
    fused,
    made,
    marks,
    unit_columns,
)

KNOTS_AND_RANGE = list(product((2, 10, 17, 41), (1.0, 3.0, 5.0)))
SHAPES = list(product((1, 2, 127, 1000), (1, 3, 130), (1, 7, 300)))

pytestmark = marks


# value and gradients


@cache
def problem(n: int, d: int, m: int) -> tuple[Tensor, Tensor]:
    """Samples and slices for which the limits can be kept.

    A loss or gradient may be near zero by chance, all the more of few samples on few slices, and then the rounding of
    projections to fp32, which nobody can avoid, is much of it. Where it is a quarter of a limit, another seed is taken.
    """
    for seed in range(100):
        z, slices = made(n, d, seed=seed), unit_columns(d, m)
        if n * m > 7000 or all(rounding_share(z, slices, *case) < 0.25 for case in KNOTS_AND_RANGE):
            return z, slices
    raise AssertionError("no seed will do")


def rounding_share(z: Tensor, slices: Tensor, knots: int, t_max: float) -> float:
    """What the rounding of projections costs, as a share of the limits."""
    exact_NM = z.double() @ slices.double()
    identity = torch.eye(exact_NM.shape[1])
    exact, rounded = (
        oracle.sigreg_and_gradients(p, identity, t_max=t_max, knots=knots) for p in (exact_NM, exact_NM.float())
    )
    # roundings are as good as random: their root mean square for the loss
    loss = 2**-24 * (exact.to_z * exact_NM).norm() / exact.statistics.mean()
    gradient, change = ((x @ slices.double().T).abs().max() for x in (exact.to_z, rounded.to_z - exact.to_z))
    return max(float(loss) / LOSS, float(change / gradient) / GRADIENT)


@cache
def exact_of(n: int, d: int, m: int, knots: int, t_max: float) -> oracle.SIGRegOracle:
    """What all implementations are compared with: computed once."""
    return oracle.sigreg_and_gradients(*problem(n, d, m), t_max=t_max, knots=knots)


def cases(impl: str, n: int, d: int, m: int) -> list[tuple[int, float]]:
    """The knots and ranges that are tried on a shape."""
    # of one sample at one far knot there is a test of its own
    all_but_degenerate = [case for case in KNOTS_AND_RANGE if n > 1 or case not in ((2, 3.0), (2, 5.0))]
    if impl != "triton" or not INTERPRETED:
        return all_but_degenerate
    # every shape with one of them, and each of them with two or three shapes
    return [all_but_degenerate[SHAPES.index((n, d, m)) % len(all_but_degenerate)]]


# the reference is the naive form: mean cos − φ cancels, and few slices do not average it out, so that in fp32 it misses
# the limits on loss at some shapes. it is held to the formula in fp64.
# Triton's kernels never see D: of the many samples, which take it longest, one D under the interpreter
GRID = [
    (impl, *shape)
    for shape, impl in product(SHAPES, ("torch", "triton"))
    if not (impl == "triton" and INTERPRETED and shape[0] == 1000 and shape[1] != 3)
]


@pytest.mark.parametrize(("impl", "n", "d", "m"), GRID, ids=[f"{impl}-N{n}-D{d}-M{m}" for impl, n, d, m in GRID])
def test_fp32_equals_the_formula(n: int, d: int, m: int, impl: Any, device: torch.device) -> None:
    for knots, t_max in cases(impl, n, d, m):
        # on a CPU the torch path compiles a form for each number of knots, half a minute for 41
        with torch.compiler.set_stance("default" if knots == 17 else "force_eager"):
            found = evaluate(*problem(n, d, m), device, t_max=t_max, knots=knots, impl=impl)
        assert found.value.shape == () and found.value.dtype == torch.float32
        check(found, exact_of(n, d, m, knots, t_max), f"K={knots} t_max={t_max}")


@fused
@pytest.mark.parametrize("t_max", [3.0, 5.0], ids=["t3", "t5"])
@pytest.mark.parametrize("d", [1, 3, 130])
@pytest.mark.parametrize("m", [1, 7, 300])
def test_one_sample_at_one_far_knot(d: int, m: int, t_max: float, impl: Any, device: torch.device) -> None:
    # φ at the one live knot, exp(−4.5) or exp(−12.5), nears the rounding of the cosine of the one sample. The gradient
    # S·cos − (C − φ)·sin is φ·sin then: torch computes so few angles in fp64, and fp32 can hold it to one rounding of
    # the cosine, which is 3 % of exp(−12.5)
    z, slices = problem(1, d, m)
    exact = exact_of(1, d, m, 2, t_max)
    found = evaluate(z, slices, device, t_max=t_max, knots=2, impl=impl)
    if impl == "torch":
        check(found, exact)
        return
    assert error(found.value, exact.statistics.mean()) <= LOSS * float(exact.statistics.mean())
    limit = max(GRADIENT, 2**-23 / math.exp(-0.5 * t_max**2))
    assert error(found.to_z, exact.to_z) <= limit * float(exact.to_z.abs().max())
    assert error(found.to_slices, exact.to_slices) <= limit * exact.parts


@pytest.mark.skipif(not INTERPRETED, reason="all tests have the tiles of a GPU there")
def test_sums_in_the_tiles_of_a_gpu(device: torch.device) -> None:
    # flatter tiles mean more terms in each sum, and more to be lost. With D = 1 slices do not average it out
    check(evaluate(*problem(1000, 1, 7), device, t_max=1.0, knots=2, impl="triton"), exact_of(1000, 1, 7, 2, 1.0))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (7, 3, 33), (65, 17, 1), (3, 130, 257)], ids=str)
def test_fp64_equals_the_formula(n: int, d: int, m: int, impl: Any, device: torch.device) -> None:
    z, slices = made(n, d, dtype=torch.float64), unit_columns(d, m, torch.float64)
    for knots, t_max in KNOTS_AND_RANGE:
        exact = oracle.sigreg_and_gradients(z, slices, t_max=t_max, knots=knots)
        found = evaluate(z, slices, device, t_max=t_max, knots=knots, impl=impl)
        assert found.value.dtype == torch.float64
        check(found, exact, f"K={knots} t_max={t_max}")
        statistics = sigreg(z.to(device), slices.to(device), t_max=t_max, knots=knots, reduction=None, impl=impl)
        torch.testing.assert_close(statistics.cpu(), exact.statistics, rtol=1e-10, atol=0)


@every_impl
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(2, 1025, 3), (3, 3)], ids=["many-samples", "many-slices"])
def test_sizes_beyond_one_tile(shape: tuple[int, ...], weighted: bool, impl: Any, device: torch.device) -> None:
    interpreted = INTERPRETED and impl == "triton"
    many, few, knots = (300, 5, 5) if interpreted else (2500, 70, 17)
    z, slices = made(*shape), unit_columns(shape[-1], few if shape[-2] > 1000 else many)
    weights = 2 * torch.rand(shape[:-1], generator=Generator().manual_seed(5)) if weighted else None
    exact = oracle.sigreg_and_gradients(z, slices, weights=weights, knots=knots)
    check(evaluate(z, slices, device, weights=weights, knots=knots, impl=impl), exact)
    if impl != "triton":
        double = None if weights is None else weights.double()
        check(evaluate(z.double(), slices.double(), device, weights=double, knots=knots, impl=impl), exact)


@every_impl
@pytest.mark.parametrize("leading", [(2,), (2, 3), (1, 1), (9,)], ids=lambda shape: "x".join(map(str, shape)))
def test_leading_axes_are_tests_of_their_own(leading: tuple[int, ...], impl: Any, device: torch.device) -> None:
    z, slices = made(*leading, 7, 5), unit_columns(5, 6)
    exact = oracle.sigreg_and_gradients(z, slices)
    check(evaluate(z, slices, device, impl=impl), exact)
    statistics = sigreg(z.to(device), slices.to(device), reduction=None, impl=impl)
    assert statistics.shape == (*leading, 6) and statistics.dtype == torch.float32
    assert error(statistics.mean(-1), exact.statistics.mean(-1)) <= LOSS * float(exact.statistics.mean(-1).min())


@every_size
def test_gradient_of_any_function_of_the_statistics(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(2, n, 4), unit_columns(4, m)
    upstream = made(2, m, seed=2)

    leaves = [x.double().requires_grad_() for x in (z, slices)]
    statistics = torch.stack([oracle.sigreg_statistics(samples, leaves[1]) for samples in leaves[0]])
    expected = torch.autograd.grad((statistics * upstream.double()).sum(), leaves)

    leaves = [x.to(device).requires_grad_() for x in (z, slices)]
    value = (sigreg(leaves[0], leaves[1], reduction=None, impl=impl) * upstream.to(device)).sum()
    for found, gradient in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert error(found, gradient) <= GRADIENT * float(gradient.abs().max())


@every_size
def test_gradient_of_one_argument_alone(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(n, 4).to(device), unit_columns(4, m).to(device)
    both = evaluate(z, slices, device, impl=impl)
    for argument, gradient in ((0, both.to_z), (1, both.to_slices)):
        leaves = [z, slices]
        leaves[argument] = leaves[argument].clone().requires_grad_()
        value = sigreg(leaves[0], leaves[1], impl=impl)
        (found,) = torch.autograd.grad(value, leaves[argument])
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)
    assert not sigreg(z, slices, impl=impl).requires_grad


CONSTANTS = {"equal-rows": 1.0, "zero": 0.0, "tiny": 1e-3, "tinier": 1e-12}


@every_size
@pytest.mark.parametrize("kind", list(CONSTANTS))
@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (17, 5.0)], ids=["t3", "t5"])
def test_constants(kind: str, knots: int, t_max: float, impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(1, 4, scale=CONSTANTS[kind]).repeat(n, 1), unit_columns(4, m)
    exact = oracle.sigreg_and_gradients(z, slices, t_max=t_max, knots=knots)
    check(evaluate(z, slices, device, t_max=t_max, knots=knots, impl=impl), exact)


def layouts(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    slices = unit_columns(6, 10).to(device)
    return {
        "transposed": (made(6, 7).to(device).T, made(10, 6, seed=1).to(device).T),
        "strided": (made(14, 18).to(device)[::2, ::3], slices[:, ::2]),
        "channels-last": (made(7, 6, 4).to(device).permute(2, 0, 1), slices),
        "one-sample-expanded": (made(1, 6).to(device).expand(7, 6), slices),
        "one-feature-expanded": (made(7, 1).to(device).expand(7, 6), slices),
        "one-test-expanded": (made(7, 6).to(device).expand(3, 7, 6), slices[:, :1].expand(6, 10)),
        "not-at-its-storage's-beginning": (made(9, 7).to(device)[2:, 1:], slices[:, 3:]),
    }


@every_impl
@pytest.mark.parametrize("layout", list(layouts(torch.device("cpu"))))
def test_non_contiguous(layout: str, impl: Any, device: torch.device) -> None:
    z, slices = layouts(device)[layout]
    check(evaluate(z, slices, device, impl=impl), oracle.sigreg_and_gradients(z.cpu(), slices.cpu()))


@every_size
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("both", [False, True], ids=["z", "z-and-slices"])
def test_halves_are_raised_to_fp32(
    both: bool, dtype: torch.dtype, impl: Any, n: int, m: int, device: torch.device
) -> None:
    z, slices = made(n, 8).to(dtype), unit_columns(8, m).to(dtype if both else torch.float32)
    found, raised = (evaluate(x, a, device, impl=impl) for x, a in ((z, slices), (z.float(), slices.float())))
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, raised.value, rtol=LOSS, atol=0)
    for low, full in ((found.to_z, raised.to_z), (found.to_slices, raised.to_slices)):
        assert low.dtype == (torch.float32 if low is found.to_slices and not both else dtype)
        # one rounding to the low dtype, of numbers that are equal within fp32's limit
        limits = torch.finfo(low.dtype)
        allowed = limits.eps / 2 * full.abs().clamp_min(limits.smallest_normal) + GRADIENT * full.abs().max()
        assert ((low.float() - full).abs() <= allowed).all()


@every_size
def test_autocast_changes_nothing(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(n, 8).to(device).requires_grad_(), unit_columns(8, m).to(device)
    plain = evaluate(z, slices, device, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        value = sigreg(z, slices, impl=impl)
        deviations = cf_deviations(z, slices, impl=impl)
        inside = evaluate(z, slices, device, impl=impl)
    assert torch.equal(value, plain.value) and torch.equal(inside.value, plain.value)
    assert torch.equal(deviations, cf_deviations(z, slices, impl=impl))
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.equal(gradient, plain.to_z)
    if impl != "reference":
        # whoever differentiates under autocast, which torch advises against, lowers the products of plain torch
        assert torch.equal(inside.to_z, plain.to_z) and torch.equal(inside.to_slices, plain.to_slices)


# the limits of fp32


def eager(z: Tensor, slices: Tensor) -> Tensor:
    """The statistics as they are usually written, in the dtype of z."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    phi, weights = torch.exp(-(t**2) / 2), torch.full_like(t, 6 / 16)
    weights[0] = weights[-1] = 3 / 16
    angles = (z @ slices).unsqueeze(-1) * t
    errors = (angles.cos().mean(-3) - phi) ** 2 + angles.sin().mean(-3) ** 2
    return z.shape[-2] * (errors * phi * weights).sum(-1)


@pytest.mark.parametrize("largest", [10.0, 100.0, 1e3], ids=["10", "100", "1000"])
@pytest.mark.parametrize("d", [None, 3, 130], ids=["exact", "D3", "D130"])
@every_size
def test_large_projections(impl: Any, m: int, n: int, d: int | None, largest: float, device: torch.device) -> None:
    if d is None and largest == 10:
        pytest.skip("angles that fp32 rounds little more than the sine and cosine that all knots are made from")
    # fp32 rounds angles of this size, so an error is compared with that of eager fp32: root mean squares over 384
    # statistics and over all entries of the gradient. Axes as slices leave out the rounding of projections, which is
    # common to both
    slices = torch.eye(384) if d is None else unit_columns(d, 384)
    z = made(90 if m == 400 else 64, len(slices))
    z *= largest / float((z @ slices).abs().max())
    exact = oracle.sigreg_and_gradients(z, slices)

    def rms(statistics: Tensor, gradient: Tensor) -> list[float]:
        pairs = (statistics, exact.statistics), (gradient, exact.to_z)
        return [float((found.detach().cpu().double() - right).square().mean().sqrt()) for found, right in pairs]

    leaf = z.clone().requires_grad_()
    statistics = eager(leaf, slices)
    allowed = rms(statistics, *torch.autograd.grad(statistics.mean(), leaf))
    leaf = z.to(device).requires_grad_()
    statistics = sigreg(leaf, slices.to(device), reduction=None, impl=impl)
    found = rms(statistics, *torch.autograd.grad(statistics.mean(), leaf))
    for name, ours, theirs in zip(("statistics", "gradient"), found, allowed, strict=True):
        assert ours <= 2 * theirs, f"{name}: {ours / theirs:.2f} times the error of eager fp32"


@every_size
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e8, 1e30], ids=["1e-30", "1e4", "1e8", "1e30"])
def test_extreme_samples_give_what_is_possible(scale: float, impl: Any, n: int, m: int, device: torch.device) -> None:
    # no figure of a huge angle is right, but cosines and sines lie in [−1, 1]: no |C − φ|² + S² is above 4
    found = evaluate(made(n, 4, scale=scale), unit_columns(4, m), device, impl=impl)
    assert 0 <= float(found.value) <= n * 4 * math.sqrt(2 * math.pi)
    assert found.to_z.isfinite().all() and found.to_slices.isfinite().all()


@every_size
def test_zero_slice_is_finite(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(n, 4), unit_columns(4, m)
    slices[:, 2] = 0
    check(evaluate(z, slices, device, impl=impl), oracle.sigreg_and_gradients(z, slices))


@every_size
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_stays_in_its_own_test(
    value: float, impl: Any, n: int, m: int, device: torch.device
) -> None:
    z, slices = made(2, n, 4).to(device), unit_columns(4, m).to(device)
    bad = z.clone()
    bad[1, n - 2, 3] = value
    found = []
    for samples in (z, bad):
        leaf = samples.requires_grad_()
        statistics = sigreg(leaf, slices, reduction=None, impl=impl)
        (gradient,) = torch.autograd.grad(statistics.sum(), leaf)
        found.append((statistics, gradient))
        assert cf_deviations(samples, slices, impl=impl)[1].isnan().all() == (samples is bad)
    (clean, clean_gradient), (spoilt, spoilt_gradient) = found
    assert spoilt[1].isnan().all() and torch.equal(spoilt[0], clean[0])
    assert spoilt_gradient[1].isnan().all() and torch.equal(spoilt_gradient[0], clean_gradient[0])
    assert sigreg(bad, slices, impl=impl).isnan()
