"""Nearest ×2 and a convolution on the small map: what the plain form gives, with fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastle.method.upsample import UpsampledConv2d, nearest_x2, upsampled_conv

Conv = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES = [(1, 1), (1, 2), (1, 7), (5, 1), (2, 2), (3, 8), (7, 5), (8, 8)]
FORMATS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels-last"),
]


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The author's order: every pixel repeated by hand, then the convolution on the large map."""
    return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)


def operands(
    height: int, width: int, *, inputs: int = 4, outputs: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    generator = Generator().manual_seed(0)
    shapes = ((2, inputs, height, width), (outputs, inputs, 3, 3), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias


def value_and_gradients(conv: Conv, *tensors: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """The output, and what a random gradient of it gives each of x, weight and bias."""
    x, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    out = conv(x, weight, bias)
    upstream = torch.randn(out.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    gradients = {"dx": x.grad, "dw": weight.grad, "db": bias.grad}
    return {"value": out.detach()} | {name: g for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("height", "width"), SIZES, ids=str)
def test_float64_identity(height: int, width: int, memory_format: torch.memory_format) -> None:
    x, weight, bias = operands(height, width)
    x, weight = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
    got = value_and_gradients(upsampled_conv, x, weight, bias)
    wanted = value_and_gradients(plain_conv, x, weight, bias)
    assert got["value"].shape == (2, 3, 2 * height, 2 * width)
    assert got.keys() == wanted.keys() == {"value", "dx", "dw", "db"}
    for name, expected in wanted.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (6, 1), (3, 3)])
def test_any_number_of_channels(inputs: int, outputs: int) -> None:
    tensors = operands(3, 4, inputs=inputs, outputs=outputs)
    got, wanted = value_and_gradients(upsampled_conv, *tensors), value_and_gradients(plain_conv, *tensors)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_gradient() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in operands(2, 3, inputs=2, outputs=2))
    assert torch.autograd.gradcheck(upsampled_conv, (x, weight, bias))
    assert torch.autograd.gradgradcheck(upsampled_conv, (x, weight, bias))


def test_bias_may_be_missing() -> None:
    x, weight, bias = operands(3, 2)
    torch.testing.assert_close(
        upsampled_conv(x, weight), plain_conv(x, weight, torch.zeros_like(bias)), rtol=1e-12, atol=1e-12
    )


def test_each_tap_lands_where_the_plain_form_puts_it() -> None:
    # one pixel lit, one tap at a time: an error in the order of taps cannot hide in sums
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    for tap in range(9):
        weight = torch.zeros(9)
        weight[tap] = 1
        weight = weight.view(1, 1, 3, 3)
        assert torch.equal(upsampled_conv(x, weight), plain_conv(x, weight, torch.zeros(1))), tap


def test_one_by_one_convolution_commutes_with_nearest() -> None:
    x, _, bias = operands(3, 5)
    weight = torch.randn(3, 4, 1, 1, generator=Generator().manual_seed(2), dtype=torch.float64)
    got = value_and_gradients(lambda x, w, b: nearest_x2(F.conv2d(x, w, b)), x, weight, bias)
    wanted = value_and_gradients(lambda x, w, b: F.conv2d(nearest_x2(x), w, b), x, weight, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_module_is_a_plain_convolution_to_a_checkpoint() -> None:
    plain = torch.nn.Conv2d(4, 3, 3, padding=1)
    small = UpsampledConv2d(4, 3)
    small.load_state_dict(plain.state_dict())
    plain.load_state_dict(small.state_dict())
    x = torch.randn(2, 4, 5, 3, generator=Generator().manual_seed(0))
    torch.testing.assert_close(small(x), plain(nearest_x2(x)), rtol=1e-5, atol=1e-6)


class Copies(TorchDispatchMode):
    """The shapes of what is copied, in any operation that moves values and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in {"clone", "copy_", "_to_copy", "contiguous", "cat", "constant_pad_nd"}:
            self.shapes.append(out.shape)
        return out


@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_format_is_kept_and_no_map_is_copied(memory_format: torch.memory_format) -> None:
    x, weight, bias = operands(6, 4, inputs=8, outputs=5, dtype=torch.float32)
    x = x.to(memory_format=memory_format).requires_grad_()
    weight = weight.to(memory_format=memory_format).requires_grad_()
    with Copies() as copies:
        out = upsampled_conv(x, weight, bias)
        out.backward(torch.ones_like(out))
    assert out.is_contiguous(memory_format=memory_format)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=memory_format)
    # weights are padded, maps (two images of them) are not
    assert copies.shapes and all(shape[0] != 2 for shape in copies.shapes), copies.shapes


def test_bf16_autocast_is_no_worse_than_the_plain_form() -> None:
    # what bf16 loses: maps that bf16 holds exactly, so that the weights' and the output's rounding is what remains
    x, weight, bias = operands(12, 12, inputs=48, outputs=24, dtype=torch.float32)
    x, weight = x.bfloat16().float(), weight / 20
    exact = value_and_gradients(plain_conv, x.double(), weight.double(), bias.double())

    def errors(conv: Conv) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = value_and_gradients(conv, x, weight, bias)
        assert rounded["value"].dtype == torch.bfloat16
        assert rounded["dw"].dtype == rounded["dx"].dtype == torch.float32
        return {name: float((rounded[name].double() - exact[name]).square().mean().sqrt()) for name in exact}

    got, plain = errors(upsampled_conv), errors(plain_conv)
    assert all(got[name] <= 1.02 * plain[name] for name in exact), (got, plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiles_whole(precision: str) -> None:
    x, weight, bias = operands(4, 6, dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last)

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return upsampled_conv(x, weight, bias)

    torch.compiler.reset()
    compiled = torch.compile(conv, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, x, weight, bias), value_and_gradients(conv, x, weight, bias)
    )


def test_four_ninths_of_the_operations() -> None:
    tensors = operands(6, 7)

    def flops(conv: Conv) -> int:
        with FlopCounterMode(display=False) as counter:
            value_and_gradients(conv, *tensors)
        return counter.get_total_flops()

    assert 9 * flops(upsampled_conv) == 4 * flops(plain_conv)
