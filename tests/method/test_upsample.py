"""Nearest ×2 and a convolution on the small map: what the plain form gives, with fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastle.method.upsample import upsampled_conv

Conv = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES = [(1, 1), (1, 7), (5, 1), (3, 8)]
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


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (6, 1)])
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


def test_autocast_adds_taps_in_full_precision() -> None:
    # both taps fall on the lit pixel. in bf16 the first would be 1, and the sum 0
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1:] = torch.tensor((1 + 2**-10, -1))
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    with torch.autocast("cpu", torch.bfloat16):
        out = upsampled_conv(x, weight)
    assert out.dtype == torch.bfloat16 and float(out[0, 0, 2, 2]) == 2**-10


def test_bf16_autocast_is_about_as_exact_as_the_plain_form() -> None:
    # bf16 holds these maps exactly, so only the weights and the results are rounded
    x, weight, bias = operands(12, 12, inputs=48, outputs=24, dtype=torch.float32)
    x, weight = x.bfloat16().float(), weight / 20
    exact = value_and_gradients(plain_conv, x.double(), weight.double(), bias.double())

    def errors(conv: Conv) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = value_and_gradients(conv, x, weight, bias)
        assert rounded["dw"].dtype == rounded["dx"].dtype == torch.float32
        return {name: float((rounded[name].double() - exact[name]).square().mean().sqrt()) for name in exact}

    # CPUs accumulate bf16 differently: on AVX2 the value's error is 1.4 times the plain form's
    mine, plain = errors(upsampled_conv), errors(plain_conv)
    assert all(mine[name] <= 2 * plain[name] for name in exact), (mine, plain)


def test_compiles_whole() -> None:
    x, weight, bias = operands(4, 6, dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last)

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return upsampled_conv(x, weight, bias)

    torch.compiler.reset()
    compiled = torch.compile(conv, fullgraph=True, dynamic=False, backend="aot_eager")
    got, wanted = (value_and_gradients(form, x, weight, bias) for form in (compiled, conv))
    # a graph adds the bias to the rounded result of the convolution, which some libraries round only then
    torch.testing.assert_close(got.pop("value"), wanted.pop("value"), rtol=0.016, atol=0.01)
    torch.testing.assert_close(got, wanted)
