"""How torch takes kernels.sigreg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.sigreg import cf_deviations, sigreg, statistic
from tests.kernels.sigreg_cases import (
    GRADIENT,
    LOSS,
    error,
    evaluate,
    every_impl,
    every_size,
    fused,
    made,
    marks,
    unit_columns,
)

pytestmark = marks


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
