"""kernels.products on tensor cores: as exact as fp32's, and chosen where they are faster.

Without a GPU the PTX for sm_80 is executed. On Hopper the same kernel multiplies by wgmma, which the executor lacks.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from fastle.kernels.impl import MISSING_TRITON

if MISSING_TRITON:
    pytest.skip(MISSING_TRITON, allow_module_level=True)

from fastle.kernels import products_triton, sigreg_launch
from fastle.kernels.products import exact_product
from fastle.kernels.sigreg import sigreg
from tests.ptx.launches import executed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the norm; fp32's own products are off by 4e-7 for 512 terms
LIMIT = 2e-7


def factors(n: int, k: int, m: int, transposed: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # numbers of all sizes, with all of fp32's bits
    a = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    b = torch.randn(m, k, generator=generator).T if transposed else torch.randn(k, m, generator=generator)
    return a.to(DEVICE), b.to(DEVICE)


@pytest.mark.parametrize(
    ("n", "k", "m", "transposed", "rows"),
    [
        pytest.param(70, 100, 80, False, 64, id="ragged"),
        pytest.param(128, 64, 128, True, 128, id="transposed-large-tile"),
        # several tiles of rows and columns, and steps of terms; nothing is a multiple of 8
        pytest.param(131, 37, 67, True, 64, id="odd-transposed"),
        pytest.param(1, 1, 1, False, 64, id="one"),
    ],
)
def test_a_product_is_as_exact_as_in_fp32(
    n: int, k: int, m: int, transposed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_triton, "ROWS", (rows, rows))
    a, b = factors(n, k, m, transposed)
    with contextlib.nullcontext() if DEVICE == "cuda" else executed(80):
        found = products_triton.product(a, b)
    exact = a.double() @ b.double()
    # NaN, which no limit admits, where an entry was not written
    assert float((found.double() - exact).norm() / exact.norm()) <= LIMIT
    # tensor cores cut off: a bias, which a sum over samples would not average out
    assert abs(float(((found.double() - exact) * exact.sign()).sum() / exact.abs().sum())) <= LIMIT


def test_sigreg_with_its_products_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_triton, "is_faster", lambda *_: True)
    _, z = factors(1, 70, 20, False)
    slices, upstream = factors(20, 24, 24, False)
    slices = torch.nn.functional.normalize(slices, dim=0)
    results = []
    with contextlib.nullcontext() if DEVICE == "cuda" else executed(80) as launched:
        for samples, options in ((z, {"impl": "triton"}), (z.double(), {"impl": "reference"})):
            given = samples.clone().requires_grad_(), slices.to(samples.dtype).requires_grad_()
            value = sigreg(*given, reduction=None, **options)  # type: ignore[arg-type]
            results.append((value, *torch.autograd.grad(value @ upstream[:, 0].to(value.dtype), given)))
    # forward, to the samples, and to the slices
    assert launched is None or launched.count("_product_kernel") == 3
    for found, exact in zip(*results, strict=True):
        assert float(((found.double() - exact).norm() / exact.norm()).detach()) <= 1e-6


def test_a_second_derivative_through_the_tensor_cores_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_triton, "is_faster", lambda *_: True)
    monkeypatch.setattr(products_triton, "product", torch.matmul)
    a, b = (factor.requires_grad_() for factor in factors(5, 3, 4, False))
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(exact_product(a, b, "triton").sum(), a)


def test_only_products_that_fill_the_gpu_take_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(
        n: int, k: int, m: int, capability: tuple[int, int] = (9, 0), dtype: torch.dtype = torch.float32
    ) -> bool:
        launch = sigreg_launch.launch_for(capability)
        monkeypatch.setattr(products_triton, "launch_on", lambda _: (launch, 132))
        a, b = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((n, k), (k, m)))
        return products_triton.is_faster(a, b)

    assert chosen(2048, 512, 1024) and chosen(2048, 1024, 512)
    # too few tiles, too few terms, too few columns
    assert not (chosen(256, 512, 256) or chosen(32768, 32, 256) or chosen(32768, 256, 32))
    assert not chosen(2048, 512, 1024, dtype=torch.float64)
    assert not chosen(2048, 512, 1024, capability=(8, 9))
