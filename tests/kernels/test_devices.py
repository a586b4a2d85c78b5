"""Triton launches on the current device: launchers make that of their tensors current, whichever was before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastle.kernels.impl import MISSING_TRITON

if MISSING_TRITON:
    pytest.skip(MISSING_TRITON, allow_module_level=True)

from fastle.kernels import (
    crop_resize_triton,
    halving_conv_triton,
    mask_fill_triton,
    products_triton,
    random_mask_triton,
    sigreg_launch,
    sigreg_triton,
)
from fastle.kernels.halving_conv import halving_conv
from fastle.kernels.sigreg import sigreg
from fastle.kernels.sigreg_knots import Knots
from tests.kernels.image_operators import OPERATORS
from tests.ptx.launches import kernel_modules, kernels_of

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Current:
    """Stands in for torch.cuda.device, and knows the current device: the last one."""

    devices: tuple[torch.device, ...] = (SECOND,)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        Current.devices += (self.device,)

    def __exit__(self, *_: object) -> None:
        Current.devices = Current.devices[:-1]


class Launched:
    """Stands in for a Triton kernel and passes on its name, and the devices of a launch's tensors."""

    def __init__(self, name: str, launch: Callable[[str, set[torch.device]], None]) -> None:
        self.name, self.launch = name, launch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launch(
            self.name, {value.device for value in arguments.values() if isinstance(value, Tensor)}
        )


def launch_everything(monkeypatch: pytest.MonkeyPatch, launch: Callable[[str, set[torch.device]], None]) -> set[str]:
    """Calls every launcher with tensors on the first GPU, where the second is current; returns all kernels' names."""
    names = set()
    for module in kernel_modules():
        for name in kernels_of(module):
            monkeypatch.setattr(module, name, Launched(name, launch))
            names.add(name)
        if hasattr(module, "launch_on"):
            monkeypatch.setattr(module, "launch_on", lambda _: (sigreg_launch.WIDE, 128))
    monkeypatch.setattr(torch.cuda, "device", Current)
    knots = Knots(3.0, 3)
    # fake tensors need no second GPU, and where there is none not even the first
    with FakeTensorMode():
        zeros = partial(torch.zeros, device=FIRST)
        images, corner = [zeros(1, 1, 8, 8)], zeros(1, dtype=torch.int64)
        for crop in (crop_resize_triton.forward, crop_resize_triton.backward):
            crop(images, corner, corner, None, None, 5, 7, (8, 8))
        mask_fill_triton.fill(images, corner, corner, 5, 7, adjoint=False)
        random_mask_triton.mask(images, corner, 1, 1, 6, 8)
        convolved = zeros(1, 8, 3, 3), zeros(1, 8, 2, 2)
        gradients = halving_conv_triton.forward(*convolved)
        halving_conv_triton.images_gradient(*gradients, *convolved)
        halving_conv_triton.weight_gradient(*gradients, *convolved)
        p = zeros(130, 3)
        statistics, deviations = sigreg_triton.statistics(p, None, len(p), knots)
        sigreg_triton.projection_gradient(statistics, deviations, p, None, len(p), knots)
        products_triton.product(zeros(2, 2), zeros(2, 2))
    return names


def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()

    def launch(name: str, devices: set[torch.device]) -> None:
        assert devices == {FIRST} == {Current.devices[-1]}, name
        launched.add(name)

    assert launch_everything(monkeypatch, launch) == launched
    assert Current.devices == (SECOND,)


def test_a_launch_that_fails_leaves_the_device_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, devices: set[torch.device]) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        launch_everything(monkeypatch, fail)
    assert Current.devices == (SECOND,)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_operators_on_another_gpu_than_the_current_one() -> None:
    def results(device: torch.device) -> list[Tensor]:
        made = partial(torch.rand, generator=torch.Generator().manual_seed(0))
        found: list[Tensor] = []

        def run(operator: Callable[..., Any], *inputs: Tensor) -> None:
            given = [x.to(device).requires_grad_() for x in inputs]
            value = operator(*given, impl="triton")
            value = value if isinstance(value, Tensor) else value[0]
            found.extend(x.cpu() for x in (value, *torch.autograd.grad(value.square().sum(), given)))

        for operator in OPERATORS.values():
            integers = [values.to(device) for values in operator.integers(4).values()]
            run(lambda x, impl, call=operator.call, rest=integers: call(x, *rest, impl=impl), made(4, 3, 8, 32))
        run(halving_conv, made(2, 16, 9, 17).bfloat16(), made(24, 16, 2, 2).bfloat16())
        run(sigreg, made(300, 24), made(24, 40))
        return found

    with torch.cuda.device(FIRST):
        for here, there in zip(results(FIRST), results(SECOND), strict=True):
            torch.testing.assert_close(here, there)
        assert torch.cuda.current_device() == FIRST.index
