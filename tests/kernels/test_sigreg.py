"""kernels.sigreg, every implementation, against formulas in float64.

Samples and slices are what they are in the dtype under test: the oracle gets the same numbers, raised to float64.
Without a GPU, Triton's kernels run under its interpreter, which is slow: they get fewer of the large shapes.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels import reference
from fastle.kernels.sigreg import cf_deviations, sigreg, statistic
from tests import oracle

IMPLS = ["reference", "torch", "triton"]
INTERPRETED = not torch.cuda.is_available()
# what is asked of fp32: of the loss, and of the gradient's largest error against its largest entry
LOSS, GRADIENT = 2e-6, 1e-5
KNOTS_AND_RANGE = list(product((2, 10, 17, 41), (1.0, 3.0, 5.0)))
SHAPES = list(product((1, 2, 127, 1000), (1, 3, 130), (1, 7, 300)))

# the torch path says when it compiles, once
pytestmark = pytest.mark.filterwarnings("ignore:fastle compiles:UserWarning")
every_impl = pytest.mark.parametrize("impl", IMPLS)
fused = pytest.mark.parametrize("impl", ["torch", "triton"])
# with many angles the torch path has forms of its own, some of them compiled; 65 samples are two tiles (see below)
EVERY_SIZE = {
    "reference": ("reference", 130, 5),
    "torch": ("torch", 130, 5),
    "torch-many": ("torch", 130, 400),
    "triton": ("triton", 65, 5),
}
every_size = pytest.mark.parametrize(("impl", "n", "m"), list(EVERY_SIZE.values()), ids=list(EVERY_SIZE))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def larger_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter a tile takes a tenth of a second whatever its size: larger and fewer ones, but not one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    # one or two samples are one tile anyway, and much padding would cost figures that are asked for there
    if INTERPRETED and parameters.get("impl") == "triton":
        kernels = pytest.importorskip("fastle.kernels.sigreg_triton")
        sizes = {"BM": 128, "FINISH_BM": 128} | ({"BN": 64} if parameters.get("n", 65) > 2 else {})
        for name, size in sizes.items():
            monkeypatch.setattr(kernels, name, size)


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


# how torch takes it


def test_gradcheck(device: torch.device) -> None:
    z, slices = (
        x.to(device).requires_grad_() for x in (made(5, 3, dtype=torch.float64), unit_columns(3, 4, torch.float64))
    )
    weights = torch.tensor([1.0, 0.5, 0, 2, 1], dtype=torch.float64, device=device)
    for function in (sigreg, cf_deviations):
        assert torch.autograd.gradcheck(lambda *x: function(*x, impl="torch"), (z, slices))  # noqa: B023
        assert torch.autograd.gradcheck(lambda *x: function(*x, weights=weights, impl="torch"), (z, slices))  # noqa: B023
    leading = made(2, 3, 3, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: sigreg(*x, reduction=None, knots=5, impl="torch"), (leading, slices))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("impl", "n"), [("torch", 9), ("torch", 1030), ("triton", 9)])
def test_opcheck(n: int, weighted: bool, impl: Any, device: torch.device) -> None:
    z, slices = made(2, n, 4).to(device).requires_grad_(), unit_columns(4, 5).to(device).requires_grad_()
    weights = torch.rand(2, n, generator=Generator().manual_seed(5)).to(device) if weighted else None
    arguments = (z, slices, weights, 3.0, 5, impl)
    torch.library.opcheck(torch.ops.fastle.sigreg.default, arguments)
    statistics, *saved = torch.ops.fastle.sigreg(*arguments)
    upstream = (torch.ones_like(statistics), None, *(x.detach() for x in saved))
    torch.library.opcheck(torch.ops.fastle.sigreg_slopes.default, (*upstream, weights, n, 3.0, 5, impl))


@every_size
def test_the_same_bits_twice(impl: Any, n: int, m: int, device: torch.device) -> None:
    z, slices = made(2, n, 20), unit_columns(20, m)
    weights = torch.rand(2, n, generator=Generator().manual_seed(5))
    for omega in (None, weights):
        once, twice = (evaluate(z, slices, device, weights=omega, impl=impl) for _ in range(2))
        assert all(torch.equal(getattr(once, name), getattr(twice, name)) for name in ("value", "to_z", "to_slices"))


@fused
def test_second_derivative_is_refused(impl: Any, device: torch.device) -> None:
    z, slices = made(5, 3).to(device).requires_grad_(), unit_columns(3, 4).to(device)

    def second() -> None:
        (gradient,) = torch.autograd.grad(sigreg(z, slices, impl=impl), z, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), z)

    with pytest.raises(RuntimeError, match=r"autograd|backward|derivative|differentia"):
        second()


def test_auto_takes_what_suits_the_device(device: torch.device) -> None:
    z, slices = made(70, 4).to(device), unit_columns(4, 9).to(device)
    expected = sigreg(z, slices, impl="triton" if device.type == "cuda" else "torch")
    assert torch.equal(sigreg(z, slices), expected) and torch.equal(sigreg(z, slices, impl="auto"), expected)
    assert torch.equal(sigreg(z.cpu(), slices.cpu()), sigreg(z.cpu(), slices.cpu(), impl="torch"))


def compiled_equals_eager(function: Callable[..., Tensor], backend: Any, *inputs: tuple[Tensor, ...]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=len(inputs) > 1)
    for z, slices, *rest in inputs:
        results = []
        for call in (compiled, function):
            leaves = [z.clone().requires_grad_(), slices.clone().requires_grad_()]
            value = call(*leaves, *rest)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        (value, *gradients), (expected, *rights) = results
        torch.testing.assert_close(value, expected, rtol=LOSS, atol=0)
        for gradient, right in zip(gradients, rights, strict=True):
            assert error(gradient, right.cpu().double()) <= GRADIENT * float(right.abs().max())


@every_impl
def test_full_graph_compile(impl: Any, device: torch.device) -> None:
    z, slices = made(2, 9, 4).to(device), unit_columns(4, 5).to(device)
    mask = torch.arange(9, device=device).expand(2, 9) < 6

    def loss(z: Tensor, slices: Tensor) -> Tensor:
        return sigreg(2 * z, slices, impl=impl) + 1

    def masked(z: Tensor, slices: Tensor, mask: Tensor) -> Tensor:
        return sigreg(z, slices, weights=mask, reduction=None, impl=impl).square().sum()

    def in_two_steps(z: Tensor, slices: Tensor) -> Tensor:
        return statistic(cf_deviations(z, slices, impl=impl), 9).mean()

    compiled_equals_eager(loss, "aot_eager", (z, slices))
    compiled_equals_eager(masked, "aot_eager", (z, slices, mask))
    compiled_equals_eager(in_two_steps, "aot_eager", (z, slices))


def test_full_graph_compile_by_inductor(device: torch.device) -> None:
    z, slices = made(2, 9, 4).to(device), unit_columns(4, 5).to(device)
    compiled_equals_eager(lambda z, slices: sigreg(2 * z, slices) + 1, "inductor", (z, slices))


@fused
def test_compiles_once_for_all_sizes(impl: Any, device: torch.device) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    inputs = [(made(n, 4).to(device), unit_columns(4, m).to(device)) for n, m in ((9, 5), (12, 5), (70, 33))]
    compiled_equals_eager(lambda z, slices: sigreg(z, slices, impl=impl), count, *inputs)
    assert len(graphs) == 1


def test_the_torch_path_compiles_once_for_all_sizes() -> None:
    # a form for each new size would take its seconds again and again, and after eight of them torch gives up unheard
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]

    def graphs_after(*shape: int, m: int) -> int:
        z = made(*shape).requires_grad_()
        sigreg(z, unit_columns(shape[-1], m), impl="torch").backward()
        return counters["unique_graphs"]

    compiled = graphs_after(256, 3, m=300)
    for *shape, m in ((130, 4, 400), (2, 130, 4, 400), (1000, 130, 300), (2, 1025, 3, 70), (3, 2, 33, 4, 1024)):
        assert graphs_after(*shape, m=m) == compiled, shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_cuda_graph(impl: Any) -> None:
    here = torch.device("cuda")
    z, slices = made(2, 130, 20).to(here).requires_grad_(), unit_columns(20, 70).to(here)
    mask = torch.arange(130, device=here).expand(2, 130) < 100

    def step() -> tuple[Tensor, ...]:
        value = sigreg(z, slices, impl=impl) + sigreg(z, slices, weights=mask, impl=impl)
        return value, *torch.autograd.grad(value, z)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # other samples than those of the capture
    z.data.copy_(made(2, 130, 20, seed=9))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


# errors


@every_impl
@pytest.mark.parametrize(
    ("z_shape", "slices_shape", "options"),
    [
        pytest.param((4, 3), (5, 2), {}, id="dimensions-differ"),
        pytest.param((3,), (3, 2), {}, id="no-sample-axis"),
        pytest.param((4, 3), (3,), {}, id="slices-not-a-matrix"),
        pytest.param((4, 3), (1, 3, 2), {}, id="slices-with-leading-axis"),
        pytest.param((0, 3), (3, 2), {}, id="no-samples"),
        pytest.param((0, 4, 3), (3, 2), {}, id="no-tests"),
        pytest.param((4, 3), (3, 0), {}, id="no-slices"),
        pytest.param((4, 3), (3, 2), {"knots": 1}, id="one-knot"),
        pytest.param((4, 3), (3, 2), {"t_max": 0.0}, id="no-range"),
        pytest.param((4, 3), (3, 2), {"t_max": -1.0}, id="negative-range"),
        pytest.param((4, 3), (3, 2), {"t_max": math.nan}, id="nan-range"),
        pytest.param((4, 3), (3, 2), {"t_max": math.inf}, id="infinite-range"),
        pytest.param((4, 3), (3, 2), {"weights": torch.ones(5)}, id="weights-too-long"),
        pytest.param((4, 3), (3, 2), {"weights": torch.ones(4, 3)}, id="weight-for-each-feature"),
        pytest.param((2, 4, 3), (3, 2), {"weights": torch.ones(3, 4)}, id="weights-for-other-tests"),
    ],
)
def test_errors(
    z_shape: tuple[int, ...], slices_shape: tuple[int, ...], options: dict[str, Any], impl: Any, device: torch.device
) -> None:
    here: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()
    }
    match = "of nothing" if 0 in z_shape + slices_shape else r"SIGReg|do not fit|does not fit"
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=match):
            function(torch.zeros(z_shape, device=device), torch.zeros(slices_shape, device=device), impl=impl, **here)


def test_reference_alone(device: torch.device) -> None:
    z, slices = made(2, 9, 4, dtype=torch.float64), unit_columns(4, 5, torch.float64)
    weights = torch.rand(2, 9, generator=Generator().manual_seed(5), dtype=torch.float64)
    for omega in (None, weights):
        exact = oracle.sigreg_and_gradients(z, slices, weights=omega, t_max=2.0, knots=10)
        here = None if omega is None else omega.to(device)
        found = reference.sigreg(z.to(device), slices.to(device), weights=here, t_max=2.0, knots=10)
        torch.testing.assert_close(found.cpu(), exact.statistics, rtol=1e-10, atol=0)


def test_choices_that_do_not_exist(device: torch.device) -> None:
    z, slices = made(6, 4).to(device), unit_columns(4, 5).to(device)
    choice: Any
    for choice in ("cuda-graphs", "", None):
        for function in (sigreg, cf_deviations):
            with pytest.raises(ValueError, match="impl"):
                function(z, slices, impl=choice)
    for choice in ("sum", "none", ""):
        with pytest.raises(ValueError, match="reduction"):
            sigreg(z, slices, reduction=choice)


def test_triton_does_not_take_float64(device: torch.device) -> None:
    z, slices = made(6, 4, dtype=torch.float64).to(device), unit_columns(4, 5, torch.float64).to(device)
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=r"triton.*(float64|fp64)|(float64|fp64).*triton"):
            function(z, slices, impl="triton")


def run_alone(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, in which Triton does not interpret."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2], env=inherited | environment,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("missing", ["interpreter", "triton"])
def test_triton_that_cannot_be_had_says_why(missing: str) -> None:
    # Triton decides at its import whether it interprets
    script = """if True:
        import sys, torch
        if sys.argv[1] == "triton":
            sys.modules["triton"] = None
        from fastle.kernels.sigreg import sigreg
        z, slices = torch.ones(6, 4), torch.eye(4)
        for impl in ("auto", "torch", "reference"):
            assert sigreg(z, slices, impl=impl).isfinite()
        try:
            sigreg(z, slices, impl="triton")
        except ValueError as error:
            print(error)
    """
    said = run_alone(script, missing).stdout
    assert "triton" in said and ("TRITON_INTERPRET" if missing == "interpreter" else "install") in said


def test_no_compiler_is_slower_and_said_once(tmp_path: Path) -> None:
    script = """if True:
        import torch
        from fastle.kernels.sigreg import sigreg
        z = torch.randn(256, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        slices = torch.eye(3).repeat(1, 100)
        for _ in range(2):
            value = sigreg(z, slices)
            value.backward()
            torch.testing.assert_close(value.double(), sigreg(z.double(), slices.double()), rtol=2e-6, atol=0)
        # without the compiler other knots work too
        sigreg(z, slices, knots=9).backward()
        assert z.grad.isfinite().all()
    """
    said = run_alone(script, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).stderr
    assert said.count("uncompiled") == 1 and "C++ compiler" in said
