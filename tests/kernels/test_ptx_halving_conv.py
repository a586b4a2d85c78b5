"""kernels.halving_conv in half precision as compiled for GPUs that need not be there: the PTX is executed and held to
its formula in float64. On Hopper it multiplies by wgmma, which the executor does not have.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastle.kernels.halving_conv import halving_conv, halving_conv_triton
from tests.kernels.test_halving_conv import made, oracle, with_gradients
from tests.ptx.launches import executed, marks

pytestmark = marks

# what a result may be off beside its own rounding, in roundings of the largest entry. y and the means: none but fp32's.
# The gradient to the blocks is a sum of two parts, each rounded before. In the gradient to the weight one of the
# pixels' gradients may lie so close to a tie that fp32 rounds it to the other side
BESIDE = {"y": 0.01, "means": 0.01, "blocks": 2.0, "weight": 0.25}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # several tiles of columns and of outputs, on each axis a ragged one, and fewer channels than the least
        pytest.param((1, 2, 66, 5, 70), torch.bfloat16, id="tiles-bf16"),
        # several strips of rows and several samples, and fewer outputs than the smallest tile has
        pytest.param((2, 16, 4, 12, 3), torch.bfloat16, id="strips-bf16"),
        pytest.param((2, 16, 4, 12, 3), torch.float16, id="strips-fp16"),
    ],
)
def test_equals_the_formula(case: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # several tiles for each program, and for one of them fewer or none
    monkeypatch.setattr(halving_conv_triton, "PROGRAMS", 3)
    blocks, weight = made(case, dtype)
    with executed(80) as launched:
        got = with_gradients(partial(halving_conv, impl="triton"), blocks, weight)
    assert launched == ["_conv_forward_kernel", "_images_kernel", "_weight_kernel"]
    # the kernels multiply the gradient to p in half precision; all else on the way is in fp32
    wanted = with_gradients(partial(oracle, half=dtype), blocks.double(), weight.double())
    rounding = torch.finfo(dtype).eps / 2
    for (what, beside), value, exact in zip(BESIDE.items(), got, wanted, strict=True):
        assert value.dtype == dtype
        size = exact.abs()
        # in roundings; NaN, which no limit admits, where the result has one
        excess = float((((value.double() - exact).abs() - rounding * size) / (rounding * size.max())).max())
        assert excess <= beside, f"{what}: {excess:.3g} roundings of the largest entry, {beside} allowed"
