"""Matrix products in fp32 proper, also where TF32 is allowed, which keeps 10 bits of each factor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .impl import HAS_TRITON, traced

products_triton: Any = None
if HAS_TRITON:
    from . import products_triton


def fp32_products() -> str | None:
    """`torch.get_float32_matmul_precision`, or None where torch's newer switches of single libraries contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 for the products in it; the process's setting is restored afterwards. A graph does not see it."""
    before = fp32_products()
    if before in (None, "highest"):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_product(a: Tensor, b: Tensor, impl: Literal["triton", "torch"]) -> Tensor:
    """a @ b, (N, K) and (K, M), without TF32. Where torch traces, an operator keeps TF32 out of the graph.

    Args:
        impl: With "triton", large fp32 products are computed on tensor cores, in parts, where that is faster.
    """
    parts = impl == "triton" and products_triton.is_faster(a, b)
    if not parts and fp32_products() in (None, "highest"):
        return a @ b
    # neither the kernels nor the setting would be part of what a second derivative differentiates: the operator raises
    return (_operator if traced(a, b) or torch.is_grad_enabled() else _product)(a, b, parts)


def _product(a: Tensor, b: Tensor, parts: bool) -> Tensor:
    if parts:
        product: Tensor = products_triton.product(a, b)
        return product
    with exact_products():
        return a @ b


# torch caches compiled graphs by the names of their operators, so an operator with another signature needs another name
_operator = torch.library.custom_op(
    "fastle::fp32_product", _product, mutates_args=(), schema="(Tensor a, Tensor b, bool parts) -> Tensor"
)


@_operator.register_fake
def _(a: Tensor, b: Tensor, parts: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
