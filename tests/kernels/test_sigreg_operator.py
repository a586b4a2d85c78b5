"""What kernels.sigreg refuses, and what torch requires of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.sigreg import cf_deviations, sigreg, statistic
from fastle.kernels.sigreg_knots import Knots
from tests import oracle
from tests.kernels import views
from tests.kernels.sigreg_cases import (
    DEVICE,
    GRADIENT,
    LOSS,
    error,
    evaluate,
    every_impl,
    every_size,
    fused,
    made,
    marks,
    some_weights,
    unit_columns,
)  # fmt: skip

pytestmark = marks

BAD: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "dimensions-differ": ((4, 3), (5, 2), {}),
    "no-sample-axis": ((3,), (3, 2), {}),
    "slices-with-leading-axis": ((4, 3), (1, 3, 2), {}),
    "no-samples": ((0, 3), (3, 2), {}),
    "no-tests": ((0, 4, 3), (3, 2), {}),
    "no-slices": ((4, 3), (3, 0), {}),
    "one-knot": ((4, 3), (3, 2), {"knots": 1}),
    "no-range": ((4, 3), (3, 2), {"t_max": 0.0}),
    "nan-range": ((4, 3), (3, 2), {"t_max": math.nan}),
    "infinite-range": ((4, 3), (3, 2), {"t_max": math.inf}),
    "weights-too-long": ((4, 3), (3, 2), {"weights": torch.ones(5)}),
    "weight-for-each-feature": ((4, 3), (3, 2), {"weights": torch.ones(4, 3)}),
}


@every_impl
@pytest.mark.parametrize("bad", list(BAD))
def test_bad_arguments_are_errors(bad: str, impl: Any) -> None:
    z_shape, slices_shape, options = BAD[bad]
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=r"SIGReg.*(do not fit|needs)"):
            function(torch.zeros(z_shape), torch.zeros(slices_shape), impl=impl, **options)


def test_unknown_choices_are_errors() -> None:
    z, slices = made(6, 4).to(DEVICE), unit_columns(4, 5).to(DEVICE)
    choice: Any
    for choice in ("cuda-graphs", None):
        for function in (sigreg, cf_deviations):
            with pytest.raises(ValueError, match="impl"):
                function(z, slices, impl=choice)
    choice = "none"
    with pytest.raises(ValueError, match="reduction"):
        sigreg(z, slices, reduction=choice)
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=r"triton.*fp64"):
            function(z.double(), slices.double(), impl="triton")


def test_gradcheck() -> None:
    z, slices = made(2, 5, 3, dtype=torch.float64), unit_columns(3, 4, torch.float64)
    leaves = [x.to(DEVICE).requires_grad_() for x in (z, slices)]
    weights = torch.tensor([1.0, 0.5, 0, 2, 1], dtype=torch.float64, device=DEVICE).expand(2, 5)
    for omega in (None, weights):
        assert torch.autograd.gradcheck(lambda *x: sigreg(*x, weights=omega, reduction=None, impl="torch"), leaves)  # noqa: B023
        assert torch.autograd.gradcheck(lambda *x: cf_deviations(*x, weights=omega, impl="torch"), leaves)  # noqa: B023


def test_torch_func_takes_the_reference() -> None:
    z, slices = made(3, 5, 4, dtype=torch.float64), unit_columns(4, 6, torch.float64)
    values = torch.func.vmap(lambda x: sigreg(x, slices, impl="reference"))(z)
    gradients = torch.func.vmap(torch.func.grad(lambda x: sigreg(x, slices, impl="reference")))(z)
    for samples, value, gradient in zip(z, values, gradients, strict=True):
        exact = oracle.sigreg_and_gradients(samples, slices)
        torch.testing.assert_close(value, exact.statistics.mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, exact.to_z, rtol=1e-9, atol=1e-12)
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(ValueError, match='use impl="reference"'):
            transform(lambda x: sigreg(x, slices))(z)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("impl", "n"), [("torch", 9), ("torch", 1030), ("triton", 9)])
def test_opcheck(n: int, weighted: bool, impl: Any) -> None:
    z, slices = made(2, n, 4).to(DEVICE).requires_grad_(), unit_columns(4, 5).to(DEVICE).requires_grad_()
    weights = some_weights(2, n).to(DEVICE) if weighted else None
    arguments = (z, slices, weights, 3.0, 5, impl)
    torch.library.opcheck(torch.ops.fastle.sigreg_forward.default, arguments)
    statistics, *saved = torch.ops.fastle.sigreg_forward(*arguments)
    upstream = (torch.ones_like(statistics), None, *(x.detach() for x in saved))
    torch.library.opcheck(torch.ops.fastle.sigreg_backward.default, (*upstream, weights, n, 3.0, 5, impl))


@pytest.mark.parametrize(("t_max", "knots"), [(3.0, 18), (0.7, 11), (1e-9, 4), (5.0, 41)])
def test_the_step_of_fp32_is_a_number_of_fp32(t_max: float, knots: int) -> None:
    # else angles, which the kernels round, would not be those of φ
    assert Knots(t_max, knots).step(torch.float32) == float(torch.tensor(t_max / (knots - 1), dtype=torch.float32))


def test_tables_are_copied_to_a_device_once() -> None:
    knots, like = Knots(3.0, 17), torch.zeros(1, dtype=torch.float32)
    assert knots.table(like) is knots.table(like)
    assert knots.derivative_table(torch.float32, like) is knots.derivative_table(torch.float32, like)
    assert knots.expected(torch.float32, like.device) is knots.expected(torch.float32, like.device)
    assert knots.table(like).dtype == torch.float32 and knots.table(like.double()).dtype == torch.float64


@every_size
def test_autocast_and_repetition_change_no_bit(impl: Any, n: int, m: int) -> None:
    z, slices, weights = made(2, n, 20), unit_columns(20, m), some_weights(2, n)
    for omega in (None, weights):
        plain = evaluate(z, slices, weights=omega, impl=impl)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            again = evaluate(z, slices, weights=omega, impl=impl)
        assert all(torch.equal(getattr(plain, x), getattr(again, x)) for x in ("value", "to_z", "to_slices"))


@fused
def test_second_derivative_is_an_error(impl: Any) -> None:
    z, slices = made(5, 3).to(DEVICE).requires_grad_(), unit_columns(3, 4).to(DEVICE)

    def second() -> None:
        (gradient,) = torch.autograd.grad(sigreg(z, slices, impl=impl), z, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), z)

    with pytest.raises(RuntimeError, match=r"autograd|backward|derivative|differentia"):
        second()


def test_auto_takes_what_suits_the_device() -> None:
    z, slices = made(70, 4).to(DEVICE), unit_columns(4, 9).to(DEVICE)
    assert torch.equal(sigreg(z, slices), sigreg(z, slices, impl="triton" if DEVICE.type == "cuda" else "torch"))
    assert torch.equal(sigreg(z.double(), slices.double()), sigreg(z.double(), slices.double(), impl="torch"))
    assert not sigreg(z, slices).requires_grad


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
def test_full_graph_compile(impl: Any) -> None:
    z, slices = made(2, 9, 4).to(DEVICE), unit_columns(4, 5).to(DEVICE)
    mask = torch.arange(9, device=DEVICE).expand(2, 9) < 6

    def masked(z: Tensor, slices: Tensor, mask: Tensor) -> Tensor:
        return sigreg(2 * z, slices, weights=mask, reduction=None, impl=impl).square().sum() + 1

    def in_two_steps(z: Tensor, slices: Tensor) -> Tensor:
        return statistic(cf_deviations(z, slices, impl=impl), 9).mean()

    compiled_equals_eager(masked, "aot_eager", (z, slices, mask))
    compiled_equals_eager(in_two_steps, "aot_eager", (z, slices))


def test_full_graph_compile_by_inductor() -> None:
    z, slices = made(2, 9, 4).to(DEVICE), unit_columns(4, 5).to(DEVICE)
    compiled_equals_eager(lambda z, slices: sigreg(2 * z, slices) + 1, "inductor", (z, slices))


@fused
def test_one_graph_serves_all_sizes(impl: Any) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    inputs = [(made(n, 4).to(DEVICE), unit_columns(4, m).to(DEVICE)) for n, m in ((9, 5), (12, 5), (70, 33))]
    compiled_equals_eager(lambda z, slices: sigreg(z, slices, impl=impl), count, *inputs)
    assert len(graphs) == 1


@views.needs_gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_cuda_graph(impl: Any) -> None:
    z, slices = made(2, 130, 20).to(DEVICE).requires_grad_(), unit_columns(20, 70).to(DEVICE)
    mask = torch.arange(130, device=DEVICE).expand(2, 130) < 100

    def step() -> tuple[Tensor, ...]:
        value = sigreg(z, slices, impl=impl) + sigreg(z, slices, weights=mask, impl=impl)
        return value, *torch.autograd.grad(value, z)

    views.replays(step, lambda: z.data.copy_(made(2, 130, 20, seed=9)))
