"""Convolutions in the form that suits a GPU: what `nn.Conv2d` gives, value and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastle.method.conv import Conv2d
from fastle.method.upsample import nearest_x2

FORMATS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels-last"),
]


def with_gradients(function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The value, and the gradients of x and the parameters for a random one of the value."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    upstream = torch.randn(out.shape, generator=Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (leaf, *parameters), upstream)]


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_convolution_equals_the_eager_one(stride: int) -> None:
    torch.manual_seed(0)
    conv = Conv2d(3, 4, 3, stride=stride, padding=1).double()
    compiled = torch.compile(conv, fullgraph=True, dynamic=False, backend="aot_eager")
    got, wanted = (with_gradients(side, images(2, 3, 5, 6), conv.weight, conv.bias) for side in (compiled, conv))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nearest_equals_interpolation(memory_format: torch.memory_format) -> None:
    x = images(2, 3, 4, 5).to(memory_format=memory_format)
    got = with_gradients(nearest_x2, x)
    wanted = with_gradients(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
