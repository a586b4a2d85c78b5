"""How launches of the real launchers come to the executor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastle.kernels import impl, products_triton
from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.halving_conv import halving_conv
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_patches
from fastle.kernels.sigreg import sigreg
from tests.ptx import launches
from tests.ptx.launches import executed, kernel_modules, kernels_of

pytestmark = launches.marks


def test_every_kernel_is_executed() -> None:
    # the smallest calls of all operators: whoever adds a kernel adds its operator here, and tests beside the others
    z, images = torch.zeros(1, 130, 3, requires_grad=True), torch.zeros(1, 1, 8, 8, requires_grad=True)
    corner = torch.zeros(1, dtype=torch.int64)
    blocks = torch.zeros(1, 8, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    with executed(80) as launched:
        results: list[Any] = [
            sigreg(z, torch.eye(3), knots=3, impl="triton"),
            crop_resize(images, corner, corner, 5, 7, impl="triton"),
            mask_fill(images, corner, corner, 5, 7, impl="triton"),
            mask_patches(images, corner, ratio=0.5, impl="triton"),
            halving_conv(blocks, weight, impl="triton")[0],
        ]
        for result in results:
            result.sum().backward()
        # its operator takes it on a GPU only
        products_triton.product(torch.zeros(2, 2), torch.zeros(2, 2))
    assert set(launched) == {name for module in kernel_modules() for name in kernels_of(module)}


def test_what_a_kernel_leaves_out_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(launches, "execute", lambda *_, **__: 0)
    with executed(80):
        found = mask_fill(torch.ones(1, 1, 8, 8), corner, corner, 5, 7, impl="triton")
    assert found.isnan().all()


def test_afterwards_everything_is_as_it_was() -> None:
    def state() -> list[Any]:
        kernels = [kernel for module in kernel_modules() for kernel in kernels_of(module).values()]
        return [*kernels, impl.interpreted, torch.are_deterministic_algorithms_enabled()]

    before = state()

    def fail_inside() -> None:
        with executed(80):
            assert state() != before
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert state() == before


def test_what_does_not_compile_says_why() -> None:
    (module,) = (module for module in kernel_modules() if module.__name__.endswith("mask_fill_triton"))
    (name,) = kernels_of(module)
    with executed(80), pytest.raises(AssertionError, match=r"TypeError: .*missing"):
        getattr(module, name)[(1,)](torch.zeros(3))
