"""kernels.sigreg against the reference and the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels import reference
from fastle.kernels.sigreg import cf_sums, statistic
from tests import oracle


def made(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def unit_columns(dim: int, number: int) -> Tensor:
    slices = made(dim, number, seed=1)
    return slices / slices.norm(dim=0)


def statistics(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    sums = cf_sums(z, slices, t_max=t_max, knots=knots)
    return statistic(sums, z.shape[-2], t_max=t_max, knots=knots)


SHAPES = [(1, 1, 1), (2, 1, 5), (7, 3, 33), (64, 16, 8), (65, 17, 1), (3, 130, 257)]


@pytest.mark.parametrize(("n", "d", "m"), SHAPES, ids=[f"N{n}-D{d}-M{m}" for n, d, m in SHAPES])
@pytest.mark.parametrize(("t_max", "knots"), [(3.0, 17), (3.0, 2), (5.0, 10), (1.5, 33)], ids=str)
def test_equals_the_formula(n: int, d: int, m: int, t_max: float, knots: int) -> None:
    z, slices = made(n, d), unit_columns(d, m)
    sums = cf_sums(z, slices, t_max=t_max, knots=knots)
    assert sums.shape == (2, knots - 1, m) and sums.dtype == torch.float64
    expected = oracle.sigreg_statistics(z, slices, t_max=t_max, knots=knots)
    for ours in (statistics, reference.sigreg):
        found = ours(z, slices, t_max=t_max, knots=knots)
        assert found.shape == (m,)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_knot_zero_contributes_nothing() -> None:
    # 17 knots, 16 of them live: the sums hold those only
    z, slices = made(9, 4), unit_columns(4, 3)
    angles = 3.0 / 16 * torch.arange(1, 17, dtype=torch.float64)[:, None, None] * (z @ slices)
    cosines, sines = cf_sums(z, slices)
    torch.testing.assert_close(cosines, angles.cos().sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sines, angles.sin().sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leading", [(2,), (4,), (2, 3), (1, 1)], ids=lambda shape: "x".join(map(str, shape)))
def test_leading_axes_are_tests_of_their_own(leading: tuple[int, ...]) -> None:
    z, slices = made(*leading, 7, 5), unit_columns(5, 6)
    found = statistics(z, slices)
    assert found.shape == (*leading, 6)
    for index in torch.cartesian_prod(*[torch.arange(k) for k in leading]).view(-1, len(leading)).tolist():
        torch.testing.assert_close(found[tuple(index)], oracle.sigreg_statistics(z[tuple(index)], slices))
    torch.testing.assert_close(found, reference.sigreg(z, slices))


@pytest.mark.parametrize(("n", "d", "m"), SHAPES[:4], ids=[f"N{n}-D{d}-M{m}" for n, d, m in SHAPES[:4]])
@pytest.mark.parametrize("knots", [2, 17])
def test_gradient_equals_the_formula(n: int, d: int, m: int, knots: int) -> None:
    z, slices = made(n, d).requires_grad_(), unit_columns(d, m)
    (gradient,) = torch.autograd.grad(statistics(z, slices, knots=knots).mean(), z)
    expected = oracle.sigreg_gradient(z.detach(), slices, knots=knots)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    z, slices = made(5, 3).requires_grad_(), unit_columns(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(statistics, (z, slices))
    assert torch.autograd.gradcheck(statistics, (made(2, 3, 3).requires_grad_(), slices.detach()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_are_raised_to_fp32(dtype: torch.dtype) -> None:
    z, slices = made(64, 8).to(dtype), unit_columns(8, 16).float()
    sums = cf_sums(z, slices)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, cf_sums(z.float(), slices), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cf_sums(z, slices), sums, rtol=0, atol=0)


def test_fp32_is_as_exact_as_fp32_can_be() -> None:
    z, slices = made(512, 32), unit_columns(32, 64)
    exact = oracle.sigreg_statistics(z, slices)
    torch.testing.assert_close(statistics(z.float(), slices.float()).double(), exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4], ids=["zero", "tiny", "huge"])
def test_extreme_samples_are_finite_with_their_gradient(scale: float) -> None:
    z = made(6, 4, scale=scale).float().requires_grad_()
    value = statistics(z, unit_columns(4, 5).float())
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_zero_slice_is_finite() -> None:
    z, slices = made(6, 4).requires_grad_(), unit_columns(4, 5)
    slices[:, 2] = 0
    value = statistics(z, slices)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(value[2], oracle.sigreg_statistics(z.detach(), slices)[2])


def test_nan_stays_in_its_own_test() -> None:
    z, slices = made(3, 6, 4), unit_columns(4, 5)
    expected = statistics(z, slices)
    z[1, 2, 3] = float("nan")
    found = statistics(z, slices)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], expected[::2])


def test_strided_samples() -> None:
    z, slices = made(5, 4, 6), unit_columns(4, 3)
    found = statistics(z.permute(2, 0, 1), slices)
    torch.testing.assert_close(found, statistics(z.permute(2, 0, 1).contiguous(), slices), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("z_shape", "slices_shape", "options"),
    [
        pytest.param((4, 3), (5, 2), {}, id="dimensions-differ"),
        pytest.param((3,), (3, 2), {}, id="no-sample-axis"),
        pytest.param((4, 3), (3,), {}, id="slices-not-a-matrix"),
        pytest.param((0, 3), (3, 2), {}, id="no-samples"),
        pytest.param((4, 3), (3, 2), {"knots": 1}, id="one-knot"),
        pytest.param((4, 3), (3, 2), {"t_max": 0.0}, id="no-range"),
        pytest.param((4, 3), (3, 2), {"t_max": float("nan")}, id="nan-range"),
    ],
)
def test_errors(z_shape: tuple[int, ...], slices_shape: tuple[int, ...], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"SIGReg|do not fit"):
        cf_sums(torch.zeros(z_shape), torch.zeros(slices_shape), **options)  # type: ignore[arg-type]
