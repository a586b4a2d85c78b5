"""Matrix products in fp32 proper, also where TF32 is allowed, which keeps 10 bits of each factor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .impl import traced


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


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (N, K) and (K, M), without TF32. Where torch traces, an operator keeps the setting for the graph."""
    if fp32_products() in (None, "highest"):
        return a @ b
    return (_operator if traced(a, b) else _product)(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    with exact_products():
        return a @ b


_operator = torch.library.custom_op("fastle::exact_product", _product, mutates_args=())


@_operator.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
