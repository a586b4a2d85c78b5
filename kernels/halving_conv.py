"""A 2×2 convolution of blocks of pixels, its SiLU, and the means over pairs of columns, in one pass on a GPU.

    x  blocks [B, K, H+1, W+1]    w  weight [N, K, 2, 2]    p  the convolution [B, N, H, W]

    p[n, i, j] = Σ_{k,r,c} w[n, k, r, c] · x[k, i+r, j+c]           y = SiLU(p)
    m[2n+r, i, j] = (y[n, 2i+r, 2j] + y[n, 2i+r, 2j+1]) / 2

It is the first layer of an encoder and the shortcut around its second one. The blocks are far smaller than p, so p is
computed again for the gradients: it is never written, nor is its own gradient. Libraries write and read both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .impl import HAS_TRITON, Impl, choose, traced

halving_conv_triton: Any = None
if HAS_TRITON:
    from . import halving_conv_triton

HALF = (torch.bfloat16, torch.float16)


def halving_conv(blocks: Tensor, weight: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """y and m, differentiable once with respect to blocks and weight.

    Args:
        blocks: (B, K, H+1, W+1), floating, with H and W even; fastest channels-last.
        weight: (N, K, 2, 2), in the blocks' dtype and on their device.
        impl: "triton" (CUDA and ROCm tensors; not fp64), "torch", or "auto": Triton where it runs and the blocks are in
            half precision, torch elsewhere. In fp32 Triton multiplies without TF32.

    Returns:
        (B, N, H, W) and (B, 2N, H/2, W/2), in the blocks' dtype; channels-last from Triton. The same input gives the
        same bits every time.

    Raises:
        ValueError: Arguments of the wrong shape, dtype or device, or an impl that cannot be had.
    """
    if blocks.ndim != 4 or blocks.shape[2] % 2 == 0 or blocks.shape[3] % 2 == 0:
        raise ValueError(f"halving_conv: blocks must be (B, K, H+1, W+1) with H and W even, not {tuple(blocks.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (blocks.shape[1], 2, 2):
        raise ValueError(f"halving_conv: weight must be (N, {blocks.shape[1]}, 2, 2), not {tuple(weight.shape)}")
    if (blocks.dtype, blocks.device) != (weight.dtype, weight.device) or not blocks.is_floating_point():
        raise ValueError(
            "halving_conv: blocks and weight must be of one floating dtype and on one device, not "
            f"{blocks.dtype} on {blocks.device} and {weight.dtype} on {weight.device}"
        )
    obstacle = "its kernels compute no fp64" if blocks.dtype == torch.float64 else None
    if impl == "auto" and blocks.dtype not in HALF:
        impl = "torch"
    if choose("halving_conv", impl, blocks.device, obstacle) == "torch":
        y = F.silu(F.conv2d(blocks, weight))
        return y, F.pixel_unshuffle(y, 2).unflatten(1, (-1, 2)).mean(2)
    results: tuple[Tensor, Tensor] = (_operator if traced(blocks, weight) else _Eager.apply)(blocks, weight)
    return results


def _forward(blocks: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = halving_conv_triton.forward(blocks, weight)
    return results


def _to_images(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    gradient: Tensor = halving_conv_triton.images_gradient(to_y, to_means, blocks, weight)
    return gradient


def _to_weight(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    gradient: Tensor = halving_conv_triton.weight_gradient(to_y, to_means, blocks, weight)
    return gradient


# Inductor spreads rows to aligned addresses, which the kernels take; without the tag it would copy them back. before
# torch 2.8 every operator has the tag, and none can be given
_TAGS: dict[str, Any] = {"tags": (torch.Tag.needs_fixed_stride_order,)} if torch.__version__ >= "2.8" else {}
_operator = torch.library.custom_op(
    "fastle::halving_conv", _forward, mutates_args=(), **_TAGS,
    schema="(Tensor blocks, Tensor weight) -> (Tensor, Tensor)",
)  # fmt: skip
_images_operator, _weight_operator = (
    torch.library.custom_op(
        f"fastle::halving_conv_to_{what}", gradient, mutates_args=(), **_TAGS,
        schema="(Tensor to_y, Tensor to_means, Tensor blocks, Tensor weight) -> Tensor",
    )
    for what, gradient in (("images", _to_images), ("weight", _to_weight))
)  # fmt: skip


@_operator.register_fake
def _(blocks: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, height, width = blocks.shape
    y = blocks.new_empty(batch, height - 1, width - 1, len(weight))
    means = blocks.new_empty(batch, height // 2, width // 2, 2 * len(weight))
    return y.permute(0, 3, 1, 2), means.permute(0, 3, 1, 2)


@_images_operator.register_fake
def _(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = blocks.shape
    return blocks.new_empty(batch, height - 1, width - 1, 2, 2, channels)


@_weight_operator.register_fake
def _(to_y: Tensor, to_means: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(
    ctx: Any, to_y: Tensor, to_means: Tensor, to_images: Any = _images_operator, to_weight: Any = _weight_operator
) -> tuple[Tensor | None, Tensor | None]:
    blocks, weight = ctx.saved_tensors
    images_gradient, weight_gradient = None, None
    if ctx.needs_input_grad[0]:
        taps = to_images(to_y, to_means, blocks, weight)
        # a block is read by the pixels of its own row and column and of those before
        parts = [F.pad(taps[:, :, :, r, c], (0, 0, c, 1 - c, r, 1 - r)) for r in (0, 1) for c in (0, 1)]
        images_gradient = (parts[0] + parts[1] + (parts[2] + parts[3])).permute(0, 3, 1, 2)
    if ctx.needs_input_grad[1]:
        weight_gradient = to_weight(to_y, to_means, blocks, weight)
    return images_gradient, weight_gradient


_operator.register_autograd(_gradient, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without the cost of its dispatch."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # the registered operators refuse a second derivative
        operators = () if torch.is_grad_enabled() else (_to_images, _to_weight)
        return _gradient(ctx, *gradients, *operators)
