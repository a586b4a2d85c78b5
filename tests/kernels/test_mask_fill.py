"""kernels.mask_fill, every implementation, against loops over images and channels in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastle.kernels.mask_fill import mask_fill, rectangle
from tests.kernels.mask_fill_cases import applied, at_the_corners, beyond, check, covered, inside
from tests.kernels.views import DEVICE, every_impl, laid_out, made

# batch, channels, height, width, then the rectangle's height and width. The last three are large: they take slices on a
# CPU, and a program of a GPU cannot hold their planes, or only if they are contiguous. 20 channels take two programs
CASES = [
    (1, 1, 1, 1, 1, 1),
    (4, 1, 7, 11, 1, 1),
    (1, 20, 6, 9, 6, 2),
    (2, 3, 5, 7, 5, 7),
    (2, 1, 6, 5, 0, 3),
    (2, 3, 37, 1, 9, 1),
    (1, 1, 200, 200, 140, 170),
    (2, 3, 90, 101, 70, 60),
    (1, 5, 67, 257, 40, 230),
]


@every_impl
@pytest.mark.parametrize(
    ("b", "c", "h", "w", "bh", "bw"), CASES, ids=["B{}-C{}-{}x{}-box{}x{}".format(*x) for x in CASES]
)
def test_fp32_equals_the_formula(b: int, c: int, h: int, w: int, bh: int, bw: int, impl: Any) -> None:
    corners_B2 = at_the_corners(b, (h, w), (bh, bw))
    check(made(b, c, h, w), corners_B2, (bh, bw), impl=impl)
    check(laid_out(made(b, c, h, w), "channels-last"), corners_B2, (bh, bw), impl=impl)


@pytest.mark.parametrize("size", [(6, 8), (150, 140)], ids=["small", "large"])
def test_fp64_equals_the_formula(size: tuple[int, int]) -> None:
    check(made(7, 2, *size, dtype=torch.float64), beyond(size, (3, 4)), (3, 4))


@every_impl
@pytest.mark.parametrize(
    ("size", "box"),
    [((6, 8), (3, 4)), ((6, 8), (9, 2)), ((6, 8), (30, 40)), ((150, 120), (160, 60))],
    ids=["smaller", "higher", "larger", "large-image"],
)
def test_the_part_outside_the_image_is_ignored(size: tuple[int, int], box: tuple[int, int], impl: Any) -> None:
    corners_B2 = beyond(size, box)
    check(made(7, 1, *size), corners_B2, box, impl=impl)
    for (top, left), within in zip(corners_B2.tolist(), covered(corners_B2, box, size), strict=True):
        expected = torch.zeros(size, dtype=torch.bool)
        expected[inside(top, left, box)] = True
        assert torch.equal(within[0], expected)


def test_rectangle_counts() -> None:
    top, left = torch.tensor([-2, 4, -1, 6, -9]), torch.tensor([-1, 6, 5, 0, 0])
    assert rectangle(top, left, 3, 4, (6, 8)).sum((1, 2, 3)).tolist() == [1 * 3, 2 * 2, 2 * 3, 0, 0]


@every_impl
@pytest.mark.parametrize("far", [2**31 - 1, -(2**31), 2**40, -(2**40)])
def test_far_corners_touch_nothing(far: int, impl: Any) -> None:
    images, zero = made(2, 2, 6, 8), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    away = torch.tensor([far, 0], device=DEVICE)
    for top, left in ((away, zero), (zero, away)):
        filled = mask_fill(images, top, left, 4, 5, impl=impl)
        assert torch.equal(filled[0], images[0])
        assert torch.equal(filled[1], mask_fill(images, zero, zero, 4, 5, impl=impl)[1])


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pixels_outside_the_rectangle_keep_their_bits(dtype: torch.dtype, impl: Any) -> None:
    images, corners_B2 = made(4, 3, 9, 12, dtype=dtype), at_the_corners(4, (9, 12), (4, 5))
    kept = ~covered(corners_B2.to(DEVICE), (4, 5), (9, 12)).expand_as(images)
    filled = applied(corners_B2, (4, 5), impl=impl)(images)
    assert torch.equal(filled[kept], images[kept])
    # and those inside are one number for each channel
    whole = applied(torch.zeros(4, 2, dtype=torch.int64), (9, 12), impl=impl)(images)
    assert torch.equal(whole, whole[:, :, :1, :1].expand_as(whole))


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_means_accumulate_in_fp32(layout: str, impl: Any) -> None:
    # bf16 has 8 bits: a sum of ones in it stops at 256
    images = (0.9 + 0.1 * made(1, 2, 130, 140)).to(torch.bfloat16)
    check(laid_out(images, layout), torch.tensor([[3, 5]]), (120, 130), impl=impl)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("size", [6, 130], ids=["small", "large"])
@pytest.mark.parametrize("within", [False, True], ids=["outside", "inside"])
def test_nan_and_inf_stay_in_their_channel(within: bool, size: int, layout: str, impl: Any) -> None:
    images, corners_B2 = made(3, 2, size, size), torch.tensor([[0, 0], [1, 2], [3, 3]])
    operator, hole = applied(corners_B2, (3, 3), impl=impl), inside(1, 2, (3, 3))
    expected = operator(laid_out(images, layout))
    value = math.inf if size == 6 else math.nan
    images[1, 0, 2 if within else size - 1, 3] = value
    filled = operator(laid_out(images, layout))
    assert torch.equal(filled[1, 1], expected[1, 1]) and torch.equal(filled[::2], expected[::2])
    mean = filled[1, 0][hole]
    assert mean.isnan().all() if math.isnan(value) else (mean == value).all()
    kept = torch.ones(size, size, dtype=torch.bool, device=DEVICE)
    kept[hole] = False
    assert filled[1, 0][kept].isfinite().sum() == kept.sum() - int(not within)


@every_impl
def test_nan_gradients_stay_where_they_belong(impl: Any) -> None:
    images, operator = made(3, 2, 6, 6).requires_grad_(), applied(torch.tensor([[1, 2]] * 3), (3, 3), impl=impl)
    result = operator(images)
    (expected,) = torch.autograd.grad(result, images, torch.ones_like(result), retain_graph=True)
    to_result = torch.ones_like(result)
    # outside the rectangle a gradient reaches its own pixel; inside, the whole channel shares it
    to_result[0, 1, 5, 5], to_result[1, 0, 2, 3] = float("nan"), float("nan")
    (gradient,) = torch.autograd.grad(result, images, to_result)
    assert gradient[0, 1, 5, 5].isnan() and gradient[0, 1].isnan().sum() == 1
    assert gradient[1, 0].isnan().all()
    assert torch.equal(gradient[0, 0], expected[0, 0]) and torch.equal(gradient[1, 1], expected[1, 1])
    assert torch.equal(gradient[2], expected[2])


@every_impl
def test_negative_sizes_are_errors(impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for height, width, says in ((-1, 3, "-1"), (3, -2, "-2")):
        with pytest.raises(ValueError, match=f"mask_fill: .*{says}"):
            mask_fill(made(2, 1, 5, 8), zero, zero, height, width, impl=impl)
