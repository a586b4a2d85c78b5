"""Products of fp32 matrices on tensor cores, with errors no larger than those of fp32 units, in Triton.

    A, B     factors [N, K] and [K, M]
    parts    three matrices in bf16 of which a factor is the sum: what is nearest to it, what is nearest to the rest,
             and what is left
    BN, BM   rows and columns of one tile; BK terms of its sums are added by tensor cores

bf16 keeps 8 of fp32's 24 bits, so three parts keep all, but of numbers below 1e-33. Infinity has no parts: where fp32
gives infinity, NaN results. Of the nine products of two parts, three are below fp32's rounding. The other six have
exact terms. Tensor cores cut off where others round when they add, which would bias a long sum; so they add the six
products of BK terms, and ordinary units add those. A small bias remains (docs/results/h100.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .impl import device_guard
from .sigreg_launch import launch_on

PARTS = 3
BLOCK = 1024
# the rows of a tile, many or few
ROWS = (128, 64)
BM, BK = 64, 32
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
# with fewer terms or columns, memory is what limits a product, and the parts are more of it
LEAST = 256
# tiles for each multiprocessor, from which on the tensor cores pay: on an H100 they did with 0.97, and not with 0.12
FILLED = 0.75


@triton.jit
def _split_numbers(x_ptr, parts_ptr, numbers, block, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the parts of one block of numbers."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numbers
    rest = tl.load(x_ptr + i, mask=inside, other=0.0)  # [BLOCK]
    for part in tl.static_range(PARTS):
        nearest = rest.to(tl.bfloat16)
        # a size of 1 is a compile-time number
        tl.store(parts_ptr + part * tl.cast(numbers, tl.int64) + i, nearest, mask=inside)
        rest -= nearest.to(tl.float32)


@triton.jit
def _split_kernel(
    a_ptr,  # [a_numbers]
    b_ptr,  # [b_numbers]
    a_parts_ptr,  # [3, a_numbers]
    b_parts_ptr,  # [3, b_numbers]
    a_numbers, b_numbers,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    a_blocks = tl.cdiv(tl.cast(a_numbers, tl.int64), BLOCK)
    if block < a_blocks:
        _split_numbers(a_ptr, a_parts_ptr, a_numbers, block, PARTS, BLOCK)
    else:
        _split_numbers(b_ptr, b_parts_ptr, b_numbers, block - a_blocks, PARTS, BLOCK)


@triton.jit
def _load_tile(ptr, rows, columns, row_count, column_count, row_stride, column_stride):
    """A part's entries at `rows` and `columns`, 0 outside."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    places = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(ptr + places, mask=mask, other=0.0)


@triton.jit
def _product_kernel(
    a_ptr,  # [3, N, K]
    b_ptr,  # [3, K, M], with any strides of K and M
    product_ptr,  # [N, M]
    N, K, M, stride_k, stride_m,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM)
    n = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    a_size = tl.cast(N, tl.int64) * K
    b_size = tl.cast(K, tl.int64) * M
    total = tl.zeros([BN, BM], tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        a_0 = _load_tile(a_ptr, n, k, N, K, K, 1)  # [BN, BK]
        a_1 = _load_tile(a_ptr + a_size, n, k, N, K, K, 1)
        a_2 = _load_tile(a_ptr + 2 * a_size, n, k, N, K, K, 1)
        b_0 = _load_tile(b_ptr, k, m, K, M, stride_k, stride_m)  # [BK, BM]
        b_1 = _load_tile(b_ptr + b_size, k, m, K, M, stride_k, stride_m)
        b_2 = _load_tile(b_ptr + 2 * b_size, k, m, K, M, stride_k, stride_m)
        # the smallest first
        terms = tl.dot(a_0, b_2)
        terms = tl.dot(a_1, b_1, terms)
        terms = tl.dot(a_2, b_0, terms)
        terms = tl.dot(a_0, b_1, terms)
        terms = tl.dot(a_1, b_0, terms)
        terms = tl.dot(a_0, b_0, terms)
        total += terms
    places = product_ptr + n.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(places, total, mask=(n < N)[:, None] & (m < M)[None, :])


def is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether `product` is faster than cuBLAS: on GPUs whose tensor cores pay, for products that fill them."""
    if a.dtype != torch.float32:
        return False
    launch, multiprocessors = launch_on(a.device)
    (n, k), m = a.shape, b.shape[1]
    return launch.tensor_cores and min(k, m) >= LEAST and _tiles(n, m, ROWS[1]) >= FILLED * multiprocessors


def product(a: Tensor, b: Tensor) -> Tensor:
    """A [N, K] and B [K, M] in fp32 → A·B [N, M]."""
    (n, k), m = a.shape, b.shape[1]
    # the parts of a transposed B are transposed too
    flat_b = b.T if b.stride(0) == 1 else b
    factors = a.contiguous(), flat_b.contiguous()
    a_parts, b_parts = (x.new_empty(PARTS, *x.shape, dtype=torch.bfloat16) for x in factors)
    stride_k, stride_m = (1, k) if flat_b is not b else (m, 1)
    result = a.new_empty(n, m)
    _, multiprocessors = launch_on(a.device)
    # two programs with large tiles work on a multiprocessor, and with one on some of them those set the time
    rows = ROWS[0] if _tiles(n, m, ROWS[0]) >= 1.5 * multiprocessors else ROWS[1]
    with device_guard(a.device):
        _split_kernel[(sum(triton.cdiv(x.numel(), BLOCK) for x in factors),)](
            a_ptr=factors[0], b_ptr=factors[1], a_parts_ptr=a_parts, b_parts_ptr=b_parts, a_numbers=n * k,
            b_numbers=k * m, PARTS=PARTS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        _product_kernel[(_tiles(n, m, rows),)](
            a_ptr=a_parts, b_ptr=b_parts, product_ptr=result, N=n, K=k, M=m, stride_k=stride_k, stride_m=stride_m,
            BN=rows, BM=BM, BK=BK, **OPTIONS,
        )  # fmt: skip
    return result


def _tiles(n: int, m: int, rows: int) -> int:
    count: int = triton.cdiv(n, rows) * triton.cdiv(m, BM)
    return count
