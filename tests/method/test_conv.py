"""Convolutions in the form that suits a GPU: what `nn.Conv2d` gives, value and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fastle.method.conv import Conv2d, HalvingConv2d, shortcut
from fastle.method.upsample import nearest_x2, upsampled_conv, upsampled_conv_of_few

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


@pytest.mark.parametrize("memory_format", FORMATS)
# one channel gives four of eight, two fill eight up and need eight more, three give twelve of sixteen
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12)], ids=str)
def test_halving_equals_the_plain_convolution(
    height: int, width: int, channels: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    stem = HalvingConv2d(channels, 7).double().to(memory_format=memory_format)
    plain = nn.Conv2d(channels, 7, 4, stride=2, padding=1).double()
    plain.load_state_dict(stem.state_dict())
    x = images(4, channels, height, width).to(memory_format=memory_format)

    def plainly(x: Tensor) -> Tensor:
        maps = F.silu(plain(x))
        return torch.cat((maps, shortcut_back(shortcut(maps, 14))))

    def halving(x: Tensor) -> Tensor:
        maps, skip = stem(x.split((1, 3)))
        return torch.cat((maps, shortcut_back(skip)))

    got, wanted = with_gradients(halving, x, *stem.parameters()), with_gradients(plainly, x, *plain.parameters())
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def shortcut_back(skip: Tensor) -> Tensor:
    """(B, 2C, H, W) → (2B, C, …) of twice the size, so that it fits beside the maps."""
    return torch.cat(skip.repeat_interleave(2, 2).repeat_interleave(2, 3).chunk(2, 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_convolution_equals_the_eager_one(stride: int) -> None:
    torch.manual_seed(0)
    conv = Conv2d(3, 4, 3, stride=stride, padding=1).double()
    compiled = torch.compile(conv, fullgraph=True, dynamic=False, backend="aot_eager")
    got, wanted = (with_gradients(side, images(2, 3, 5, 6), *conv.parameters()) for side in (compiled, conv))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5)], ids=str)
def test_few_outputs_equal_the_other_form(
    height: int, width: int, outputs: int, memory_format: torch.memory_format
) -> None:
    x = images(2, 4, height, width).to(memory_format=memory_format)
    weight, bias = images(outputs, 4, 3, 3).requires_grad_(), images(outputs).requires_grad_()
    got, wanted = (
        with_gradients(lambda x, form=form: form(x, weight, bias), x, weight, bias)  # type: ignore[misc]
        for form in (upsampled_conv_of_few, upsampled_conv)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nearest_equals_interpolation(memory_format: torch.memory_format) -> None:
    x = images(2, 3, 4, 5).to(memory_format=memory_format)
    got = with_gradients(nearest_x2, x)
    wanted = with_gradients(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
