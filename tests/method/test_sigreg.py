"""SIGReg: its value, its gradient, and its module."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

import fastle.method.sigreg
from fastle.method.sigreg import SIGReg, draw_slices, sigreg, two_sample_sigreg
from tests import oracle
from tests.method.sigreg_cases import CONVENTIONS, every_convention, exact, made, slices_of, weights_of

# value and gradient


def test_standard_normal_rows_score_about_1_05() -> None:
    # E (statistic) = Σ w_k (1 − φ_k²): the variance of the empirical characteristic function, times N
    step, expected = 3 / 16, 0.0
    for k in range(17):
        t = k * step
        weight = (step if k in (0, 16) else 2 * step) * math.exp(-t * t / 2)
        expected += weight * (1 - math.exp(-t * t))
    assert abs(expected - 1.05) < 0.01

    tests, n = 400, 2000
    z = torch.randn(tests, n, 2, generator=Generator().manual_seed(2))
    # every test on a slice of its own, so that all of them are independent
    slices = slices_of(2, tests).float()
    scores = torch.stack([sigreg(z[i], slices[:, i : i + 1]) for i in range(tests)])
    spread = float(scores.std()) / math.sqrt(tests)
    assert spread < 0.1
    assert abs(float(scores.mean()) - expected) < 4 * spread
    # and far from normal, it grows with N
    assert float(sigreg(z[0] + 1, slices)) > 100


@pytest.mark.parametrize("shape", [(6, 4), (1, 3), (33, 5)], ids=lambda s: "x".join(map(str, s)))
def test_value_and_gradient_equal_the_formulas(shape: tuple[int, int]) -> None:
    z, slices = made(*shape).requires_grad_(), slices_of(shape[1], 7)
    value = sigreg(z, slices)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value, oracle.sigreg(z, slices), rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, oracle.sigreg_gradient(z.detach(), slices), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("leading", [(3,), (2, 2)], ids=["3", "2x2"])
def test_leading_axes_are_averaged(leading: tuple[int, ...]) -> None:
    z, slices = made(*leading, 6, 4), slices_of(4, 5)
    tests = [oracle.sigreg(samples, slices) for samples in z.flatten(0, -3)]
    torch.testing.assert_close(sigreg(z, slices), torch.stack(tests).mean(), rtol=1e-11, atol=0)


def test_gradcheck() -> None:
    slices = slices_of(3, 4)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices), made(5, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices, knots=5, t_max=2.0), made(2, 4, 3).requires_grad_())


def test_options_reach_the_statistic() -> None:
    z, slices = made(6, 4), slices_of(4, 5)
    for t_max, knots in ((5.0, 17), (3.0, 10), (2.0, 33)):
        expected = oracle.sigreg_statistics(z, slices, t_max=t_max, knots=knots).mean()
        torch.testing.assert_close(sigreg(z, slices, t_max=t_max, knots=knots), expected, rtol=1e-11, atol=0)


def test_zero_codes_and_zero_slices_give_no_nan() -> None:
    slices = slices_of(4, 5)
    slices[:, 1] = 0
    for convention in CONVENTIONS:
        for z in (torch.zeros(6, 4), made(6, 4)):
            z.requires_grad_()
            value = sigreg(z, slices.to(z.dtype), convention=convention)
            (gradient,) = torch.autograd.grad(value, z)
            assert value.isfinite() and gradient.isfinite().all()


def test_no_samples_is_an_error() -> None:
    for convention in CONVENTIONS:
        with pytest.raises(ValueError, match="needs samples"):
            sigreg(torch.zeros(0, 4), slices_of(4, 5), convention=convention)


def test_implementations_agree_and_others_are_errors() -> None:
    z, slices = made(9, 4), slices_of(4, 5)
    impl: Any
    unknown: Any = "cuda-graphs"
    for convention in CONVENTIONS:
        expected, _ = exact(convention, z, slices)
        for impl in ("auto", "torch"):
            result = sigreg(z, slices, convention=convention, impl=impl)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=0)
        with pytest.raises(ValueError, match=r"impl.*cuda-graphs"):
            sigreg(z, slices, convention=convention, impl=unknown)


# two samples


def between(x: Tensor, y: Tensor, slices: Tensor, x_weights: Tensor, y_weights: Tensor) -> Tensor:
    """The distance between two batches, (N, D) and (N', D), written out."""
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    w = 2 * torch.exp(-t.square() / 2) * 3 / 16
    w[[0, -1]] /= 2

    def transform(z: Tensor, weights: Tensor) -> Tensor:
        waves = torch.exp(1j * t[:, None, None] * (z @ slices))
        return (weights[:, None] * waves).sum(1) / weights.sum()

    n, m = x_weights.sum(), y_weights.sum()
    apart = (transform(x, x_weights) - transform(y, y_weights)).abs().square()
    return n * m / (n + m) * (w[:, None] * apart).sum(0).mean()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_two_samples_have_their_formula(weighted: bool) -> None:
    x, y, slices = made(2, 6, 4).requires_grad_(), (made(2, 9, 4, seed=3) + 0.3).requires_grad_(), slices_of(4, 5)
    omegas = (
        (weights_of(2, 6), weights_of(2, 9)) if weighted else (torch.ones(2, 6).double(), torch.ones(2, 9).double())
    )
    x_weights, y_weights = omegas if weighted else (None, None)
    value = two_sample_sigreg(x, y, slices, x_weights=x_weights, y_weights=y_weights)
    expected = torch.stack([between(x[i], y[i], slices, omegas[0][i], omegas[1][i]) for i in range(2)])
    torch.testing.assert_close(value, expected.mean(), rtol=1e-10, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected.mean(), (x, y)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_two_samples_that_are_the_same_and_that_do_not_fit() -> None:
    z, slices = made(2, 6, 4).float(), slices_of(4, 5).float()
    assert two_sample_sigreg(z, z, slices) == 0
    with pytest.raises(ValueError, match=r"leading axes of \(2, 6, 4\) and \(6, 4\)"):
        two_sample_sigreg(z, z[0], slices)


# conventions


@every_convention
@pytest.mark.parametrize("shape", [(9, 4), (1, 3), (3, 6, 4), (2, 2, 5, 3)], ids=lambda s: "x".join(map(str, s)))
def test_convention_has_its_formula(shape: tuple[int, ...], convention: Any) -> None:
    # an odd number of eb_jepa's knots has one at 0, an even number has none
    for options in ({}, {"knots": 17}, {"knots": 2}, {"t_max": 2.0, "knots": 9}, {"t_max": 5.0}):
        z, slices = made(*shape).requires_grad_(), slices_of(shape[-1], 7)
        value = sigreg(z, slices, convention=convention, **options)
        (gradient,) = torch.autograd.grad(value, z)
        expected, expected_gradient = exact(convention, z, slices, **options)
        assert value.shape == () and value.dtype == torch.float64
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


def test_eb_jepa_is_the_statistic_by_n_on_mirrored_knots() -> None:
    # 33 knots on [−3, 3] are 17 on [0, 3] and their mirror images, which the weight 2 stands for
    z, slices = made(9, 4), slices_of(4, 5)
    result = sigreg(z, slices, knots=33, convention="eb_jepa")
    torch.testing.assert_close(9 * result, sigreg(z, slices, knots=17), rtol=1e-12, atol=0)


def test_the_other_conventions_differ_between_ranks_only() -> None:
    z, slices = made(9, 4), slices_of(4, 5)
    expected = sigreg(z, slices)
    for convention in CONVENTIONS[:4]:
        torch.testing.assert_close(sigreg(z, slices, convention=convention), expected, rtol=1e-14, atol=0)


def test_a_convention_that_does_not_exist_is_an_error() -> None:
    unknown: Any = "lejepa2"
    for call in (lambda: sigreg(made(9, 4), slices_of(4, 5), convention=unknown), lambda: SIGReg(convention=unknown)):
        with pytest.raises(ValueError, match=unknown) as raised:
            call()
        assert all(convention in str(raised.value) for convention in CONVENTIONS)


@every_convention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_autocast_keeps_fp32(dtype: torch.dtype, convention: Any) -> None:
    z, slices = made(64, 8).to(dtype).requires_grad_(), slices_of(8, 16).float()
    module = SIGReg(num_slices=16, convention=convention)
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(z, slices, convention=convention)
        drawn = module(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.dtype == drawn.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    plain = sigreg(z, slices, convention=convention)
    assert torch.equal(value, plain) and torch.equal(drawn, SIGReg(num_slices=16, convention=convention)(z))
    assert torch.equal(gradient, *torch.autograd.grad(plain, z))
    expected, expected_gradient = exact(convention, z, slices)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    limits, slack = torch.finfo(dtype), 1e-5 * expected_gradient.abs().max()
    rounding = limits.eps / 2 * expected_gradient.abs().clamp_min(limits.smallest_normal)
    assert ((gradient.double() - expected_gradient).abs() <= rounding + slack).all()


@every_convention
def test_full_graph_compile(convention: Any) -> None:
    slices = slices_of(4, 5).float()
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])

    def loss(z: Tensor) -> Tensor:
        return sigreg(2 * z, slices, weights=mask, convention=convention) + 1

    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        z = made(2, 9, 4).float().requires_grad_()
        value = function(z)
        results += [value.detach(), *torch.autograd.grad(value, z)]
    torch.testing.assert_close(results[0], results[2], rtol=2e-6, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=1e-5, atol=1e-7)


# weights


@every_convention
@pytest.mark.parametrize("leading", [(), (3,)], ids=["one", "3"])
@pytest.mark.parametrize("boolean", [False, True], ids=["real", "mask"])
def test_weights(boolean: bool, leading: tuple[int, ...], convention: Any) -> None:
    z, slices, weights = made(*leading, 9, 4), slices_of(4, 5), weights_of(*leading, 9)
    # a sample of weight 0 may hold anything
    z[weights == 0] = math.nan
    weights = weights > 0 if boolean else weights
    z.requires_grad_()
    value = sigreg(z, slices, weights=weights, convention=convention)
    (gradient,) = torch.autograd.grad(value, z)
    expected, expected_gradient = exact(convention, z, slices, weights)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)
    assert not gradient[weights == 0].any()


@every_convention
def test_a_mask_is_the_subset_and_all_ones_are_no_weights(convention: Any) -> None:
    z, slices = made(9, 4), slices_of(4, 5)
    mask = torch.arange(9) % 3 > 0
    result = sigreg(z, slices, weights=mask, convention=convention)
    torch.testing.assert_close(result, sigreg(z[mask], slices, convention=convention), rtol=1e-12, atol=0)
    result = sigreg(z, slices, weights=torch.ones(9), convention=convention)
    torch.testing.assert_close(result, sigreg(z, slices, convention=convention), rtol=1e-12, atol=0)


@every_convention
def test_a_test_without_weight_has_statistic_zero(convention: Any) -> None:
    z, slices, weights = made(3, 9, 4).requires_grad_(), slices_of(4, 5), weights_of(3, 9)
    weights[1] = 0
    value = sigreg(z, slices, weights=weights, convention=convention)
    (gradient,) = torch.autograd.grad(value, z)
    others = [exact(convention, z[i], slices, weights[i])[0] for i in (0, 2)]
    torch.testing.assert_close(value, sum(others) / 3, rtol=1e-10, atol=0)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_weights_that_do_not_fit_are_an_error() -> None:
    for convention in CONVENTIONS:
        for weights in (torch.ones(8), torch.ones(9, 4)):
            with pytest.raises(ValueError, match=r"do(es)? not fit"):
                sigreg(made(9, 4), slices_of(4, 5), weights=weights, convention=convention)


# slices


@pytest.mark.parametrize(("dim", "number"), [(1, 3), (2, 1), (16, 256), (512, 64)])
def test_slices_are_unit_columns(dim: int, number: int) -> None:
    slices = draw_slices(dim, number, Generator().manual_seed(0))
    assert slices.shape == (dim, number) and slices.dtype == torch.float32
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(number), rtol=1e-6, atol=0)


def test_slices_have_no_preferred_direction() -> None:
    slices = draw_slices(4, 20_000, Generator().manual_seed(0)).double()
    # each coordinate has mean 0 and variance 1/4, and no two are correlated
    assert float(slices.mean(1).abs().max()) < 5 * 0.5 / math.sqrt(20_000)
    torch.testing.assert_close(slices @ slices.T / 20_000, torch.eye(4).double() / 4, rtol=0, atol=0.01)


def test_slices_follow_their_generator() -> None:
    generator = Generator().manual_seed(3)
    first, second = draw_slices(4, 5, generator), draw_slices(4, 5, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_slices(4, 5, Generator().manual_seed(3)))


# module


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The slices that modules draw."""
    slices: list[Tensor] = []

    def draw(*arguments: Any) -> Tensor:
        slices.append(draw_slices(*arguments))
        return slices[-1]

    monkeypatch.setattr(fastle.method.sigreg, "draw_slices", draw)
    return slices


def test_module_is_the_function_on_fresh_slices(drawn: list[Tensor]) -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6, knots=9, t_max=2.0, seed=3)
    for number in range(3):
        value = module(z)
        expected = oracle.sigreg_statistics(z, drawn[number].double(), t_max=2.0, knots=9).mean()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert not list(module.parameters()) and not list(module.buffers())
    for seed in (3, 4):
        again = SIGReg(num_slices=6, seed=seed)
        again(z), again(z)
    # the seed alone decides, and neither another call nor another seed has any of the same slices
    assert len(drawn) == 7 and torch.equal(drawn[3], drawn[0]) and torch.equal(drawn[4], drawn[1])
    others = torch.cat((drawn[0], drawn[1], drawn[2], drawn[5], drawn[6]), dim=1)
    assert len(others.T.unique(dim=0)) == 30 and float((others.T @ others).triu(1).abs().max()) < 0.999


@every_convention
def test_module_has_the_knots_of_its_convention(convention: Any, drawn: list[Tensor]) -> None:
    z, weights = made(3, 8, 4), weights_of(3, 8)
    module = SIGReg(num_slices=6, convention=convention)
    # the caller's knots go first
    other = SIGReg(num_slices=6, knots=5, t_max=2.0, convention=convention)
    values = module(z), module(z, weights), other(z)
    options: tuple[dict[str, Any], ...] = ({}, {"weights": weights}, {"knots": 5, "t_max": 2.0})
    for value, slices, option in zip(values, drawn, options, strict=True):
        expected, _ = exact(convention, z, slices, **option)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_slices": 0}, "num_slices >= 1, not 0"),
        ({"knots": 1}, "knots=1"),
        ({"t_max": -1.0}, "t_max=-1"),
        ({"impl": "cuda-graphs"}, "impl must be one of auto, triton, torch, reference, not 'cuda-graphs'"),
    ],
)
def test_bad_options_are_errors_before_the_first_call(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SIGReg(**options)


def test_module_in_one_graph_draws_as_without() -> None:
    z, weights = made(2, 8, 4).float(), weights_of(2, 8)
    eager, module = SIGReg(num_slices=6), SIGReg(num_slices=6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(z), eager(z))
    torch.testing.assert_close(compiled(z, weights), eager(z, weights))
    assert torch.equal(module.state_dict()["_extra_state"], eager.state_dict()["_extra_state"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_an_error(reentrant: bool) -> None:
    module, z = SIGReg(num_slices=6), made(8, 4).requires_grad_()
    value = checkpoint(lambda z: module(z * 2), z, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        value.backward()
    # on slices of one's own it is right
    slices = slices_of(4, 6)
    (expected,) = torch.autograd.grad(sigreg(z * 2, slices), z)
    checkpoint(lambda z: sigreg(z * 2, slices), z, use_reentrant=reentrant).backward()
    torch.testing.assert_close(z.grad, expected)


def test_negative_weights_are_an_error_and_never_a_number() -> None:
    z, weights, slices = made(2, 8, 4).float(), weights_of(2, 8), slices_of(4, 5)
    weights[1, 3] = -0.5
    with pytest.raises(ValueError, match=r"weights must be at least 0, and one is -0\.5"):
        sigreg(z, slices, weights=weights)
    # in a graph, and on a GPU, no value can be looked at
    graph = torch.compile(lambda z, w: sigreg(z, slices, weights=w), fullgraph=True, backend="aot_eager")
    assert graph(z, weights).isnan()


def test_state_dict_goes_on_with_the_same_slices() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6, seed=3)
    module(z)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    following = [module(z), module(z)]

    file.seek(0)
    resumed = SIGReg(num_slices=6, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    # the state survives a second save before the first call
    again = SIGReg(num_slices=6, seed=98)
    again.load_state_dict(resumed.state_dict())
    for module in (resumed, again):
        assert [torch.equal(module(z), value) for value in following] == [True, True]


def test_loading_rewinds_a_module_that_has_gone_on() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6)
    module(z)
    state = copy.deepcopy(module.state_dict())
    value = module(z)
    assert not torch.equal(module(z), value)
    module.load_state_dict(state)
    assert torch.equal(module(z), value)


def test_a_module_that_was_never_called_has_a_state_too(tmp_path: Path) -> None:
    z = made(8, 4)
    module, other = SIGReg(num_slices=6, seed=3), SIGReg(num_slices=6)
    save_file(module.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    copied = copy.deepcopy(other)
    value = module(z)
    assert torch.equal(other(z), value) and torch.equal(copied(z), value)


def test_the_default_device_has_no_part_in_it() -> None:
    z = made(8, 4)
    with torch.device("meta"):
        module = SIGReg(num_slices=6)
    assert torch.equal(module(z), SIGReg(num_slices=6)(z))


def test_a_state_of_the_first_version_and_one_that_is_none() -> None:
    module = SIGReg(num_slices=6)
    for old in (None, Generator().get_state()):
        with pytest.warns(UserWarning, match=r"fastle 0\.1"):
            module.load_state_dict({"_extra_state": old})
    with pytest.raises(ValueError, match="no state of SIGReg"):
        module.load_state_dict({"_extra_state": torch.zeros(3)})
    assert torch.equal(module(made(8, 4)), SIGReg(num_slices=6)(made(8, 4)))


def test_module_takes_nothing_from_the_global_generator() -> None:
    z = made(8, 4)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    value = SIGReg(num_slices=6)(z)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(SIGReg(num_slices=6)(z), value)
