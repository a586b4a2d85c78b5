"""kernels.halving_conv against its formula in fp64: values, every gradient, layouts, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.halving_conv import halving_conv
from tests.kernels.views import DEVICE, every_impl, needs_triton

# batch, height, width, channels of a block, outputs: one tile and several on each axis, none of them full
CASES = [(2, 4, 4, 5, 3), (1, 2, 66, 24, 70)]


def oracle(blocks: Tensor, weight: Tensor, half: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Pixel by pixel, from the four blocks that a pixel reads; the gradient to p rounded to `half` on the way."""
    blocks, height, width = blocks.permute(0, 2, 3, 1), blocks.shape[2] - 1, blocks.shape[3] - 1
    p = torch.stack(
        [blocks[:, r : r + height, c : c + width] @ weight[:, :, r, c].T for r in (0, 1) for c in (0, 1)]
    ).sum(0)
    if half is not None:
        p.register_hook(lambda gradient: gradient.to(half).to(gradient.dtype))
    y = p * torch.sigmoid(p)
    means = (y[:, :, 0::2] + y[:, :, 1::2]) / 2
    both_rows = torch.stack((means[:, 0::2], means[:, 1::2]), -1).flatten(3)
    return y.permute(0, 3, 1, 2), both_rows.permute(0, 3, 1, 2)


def made(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, height, width, channels, outputs = case
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(batch, height + 1, width + 1, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, 2, 2, generator=generator, dtype=torch.float64) / channels**0.5
    # the rows lie apart, as torch.compile may lay them; the weight is as channels-last models have it
    spread = torch.zeros(batch, height + 1, width + 4, channels, dtype=dtype, device=DEVICE)[:, :, : width + 1]
    weight = weight.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return spread.copy_(blocks).permute(0, 3, 1, 2), weight


def with_gradients(function: Any, blocks: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [blocks.detach().requires_grad_(), weight.detach().requires_grad_()]
    results = function(*leaves)
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, upstream(results))]


def upstream(results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to the results, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(-16, 17, r.shape, generator=generator) / 8).to(r.device, r.dtype) for r in results]


@every_impl
# Triton's interpreter multiplies the bits of bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formula(case: tuple[int, ...], dtype: torch.dtype, impl: Any) -> None:
    blocks, weight = made(case, dtype)
    got = with_gradients(lambda x, w: halving_conv(x, w, impl=impl), blocks, weight)
    wanted = with_gradients(oracle, blocks.double(), weight.double())
    # what is kept in half precision on the way, and a few roundings of the results
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for value, exact in zip(got, wanted, strict=True):
        assert value.dtype == dtype
        assert float((value.double() - exact).abs().max()) <= limit * float(exact.abs().max())


def test_fp64_equals_the_formula() -> None:
    blocks, weight = made(CASES[0], torch.float64)
    got, wanted = (with_gradients(f, blocks, weight) for f in (halving_conv, oracle))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@needs_triton
def test_traced_operator_gives_the_same_bits() -> None:
    blocks, weight = made(CASES[0], torch.float32)

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return halving_conv(x, w, impl="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, wanted in zip(*(with_gradients(f, blocks, weight) for f in (compiled, call)), strict=True):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


@needs_triton
def test_each_gradient_alone() -> None:
    blocks, weight = made(CASES[0], torch.float32)
    both = with_gradients(lambda x, w: halving_conv(x, w, impl="triton"), blocks, weight)[2:]
    for k, wanted in enumerate(both):
        leaves = [blocks.detach(), weight.detach()]
        leaves[k].requires_grad_()
        results = halving_conv(*leaves, impl="triton")
        assert torch.equal(torch.autograd.grad(results, leaves[k], upstream(results))[0], wanted)


def test_refuses() -> None:
    blocks, weight = made(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="H and W even"):
        halving_conv(blocks[:, :, 1:], weight)
    with pytest.raises(ValueError, match=r"weight must be \(N, 5, 2, 2\)"):
        halving_conv(blocks, weight[:, :3])
    with pytest.raises(ValueError, match="one floating dtype"):
        halving_conv(blocks, weight.double())
    with pytest.raises(ValueError, match="no fp64"):
        halving_conv(blocks.double(), weight.double(), impl="triton")
