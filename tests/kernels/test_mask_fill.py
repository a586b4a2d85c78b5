"""kernels.mask_fill, every implementation, against loops over images and channels in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastle.kernels.mask_fill import mask_fill, rectangle
from tests.kernels import views
from tests.kernels.mask_fill_cases import applied, at_the_corners, beyond, check, covered, inside
from tests.kernels.views import DEVICE, every_float, every_impl, every_layout, made

# values and gradients

# batch, channels, height, width, then the rectangle's height and width
SMALL = [
    (1, 1, 1, 1, 1, 1),
    (5, 3, 8, 8, 5, 5),
    (5, 1, 7, 11, 1, 1),
    (6, 5, 13, 6, 4, 6),
    (4, 2, 6, 9, 6, 2),
    (3, 3, 5, 7, 5, 7),
    (4, 2, 6, 5, 0, 3),
    (4, 2, 6, 5, 3, 0),
    (2, 1, 1, 37, 1, 5),
    (2, 3, 37, 1, 9, 1),
]
# planes that no program holds at once
LARGE = [(1, 1, 300, 300, 140, 170), (2, 3, 128, 128, 90, 90), (1, 5, 67, 257, 40, 230), (1, 1, 3, 9001, 2, 8000)]
CASES = [
    *(pytest.param("torch", *case, id="torch-B{}-C{}-{}x{}-box{}x{}".format(*case)) for case in SMALL + LARGE),
    *(
        pytest.param("triton", *case, id="triton-B{}-C{}-{}x{}-box{}x{}".format(*case), marks=views.needs_triton)
        for case in SMALL + LARGE
    ),
]


@pytest.mark.parametrize(("impl", "b", "c", "h", "w", "bh", "bw"), CASES)
def test_fp32_equals_the_formula(impl: Any, b: int, c: int, h: int, w: int, bh: int, bw: int) -> None:
    corners_B2 = at_the_corners(b, (h, w), (bh, bw))
    check(made(b, c, h, w), corners_B2, (bh, bw), impl=impl)
    check(views.laid_out(made(b, c, h, w), "channels-last"), corners_B2, (bh, bw), impl=impl)
    within = covered(corners_B2, (bh, bw), (h, w))
    assert within.shape == (b, 1, h, w) and within.dtype == torch.bool
    assert (within.sum((1, 2, 3)) == bh * bw).all()


@pytest.mark.parametrize(("b", "c", "h", "w", "bh", "bw"), SMALL + LARGE)
def test_fp64_equals_the_formula(b: int, c: int, h: int, w: int, bh: int, bw: int) -> None:
    check(made(b, c, h, w, dtype=torch.float64), at_the_corners(b, (h, w), (bh, bw)), (bh, bw))


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    ("size", "box"),
    [((6, 8), (3, 4)), ((6, 8), (9, 2)), ((6, 8), (30, 40)), ((190, 140), (200, 60))],
    ids=["smaller", "higher", "larger", "of-much"],
)
def test_what_lies_outside_the_image_is_ignored(
    size: tuple[int, int], box: tuple[int, int], layout: str, impl: Any
) -> None:
    corners_B2 = beyond(size, box)
    check(views.laid_out(made(7, 2, *size), layout), corners_B2, box, impl=impl)
    within = covered(corners_B2, box, size)
    for b, (top, left) in enumerate(corners_B2.tolist()):
        expected = torch.zeros(size, dtype=torch.bool)
        expected[inside(top, left, box)] = True
        assert torch.equal(within[b, 0], expected)


def test_rectangles_are_counted() -> None:
    top, left = torch.tensor([-2, 4, -1, 6, -9]), torch.tensor([-1, 6, 5, 0, 0])
    counts = rectangle(top, left, 3, 4, (6, 8)).sum((1, 2, 3))
    assert counts.tolist() == [1 * 3, 2 * 2, 2 * 3, 0, 0]


@every_impl
@pytest.mark.parametrize("far", [2**31 - 1, -(2**31), 2**31 - 3, 2**40, -(2**40)])
def test_corners_far_away(far: int, impl: Any) -> None:
    images, zero = made(2, 2, 6, 8), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    away = torch.tensor([far, 0], device=DEVICE)
    for top, left in ((away, zero), (zero, away)):
        found = mask_fill(images, top, left, 4, 5, impl=impl)
        assert torch.equal(found[0], images[0])
        assert torch.equal(found[1], mask_fill(images, zero, zero, 4, 5, impl=impl)[1])


@every_impl
def test_whole_image_becomes_its_mean(impl: Any) -> None:
    images, zero = made(2, 3, 5, 7), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    found = mask_fill(images, zero, zero, 5, 7, impl=impl)
    torch.testing.assert_close(found, images.mean((2, 3), keepdim=True).expand_as(images), rtol=0, atol=1e-6)
    # one number for each channel, not numbers that are nearly equal
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))


@every_impl
@every_float
def test_what_is_not_filled_is_as_it_was(dtype: torch.dtype, impl: Any) -> None:
    images, corners_B2 = made(4, 3, 9, 12, dtype=dtype), at_the_corners(4, (9, 12), (4, 5))
    kept = ~covered(corners_B2.to(DEVICE), (4, 5), (9, 12)).expand_as(images)
    for layout in ("contiguous", "channels-last"):
        found = applied(corners_B2, (4, 5), impl=impl)(views.laid_out(images, layout))
        assert torch.equal(found[kept], images[kept])
    assert torch.equal(applied(corners_B2, (0, 5), impl=impl)(images), images)


# dtypes and layouts


@every_impl
@every_float
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_dtypes(layout: str, dtype: torch.dtype, impl: Any) -> None:
    images = views.laid_out(made(4, 3, 32, 33, dtype=dtype), layout)
    check(images, at_the_corners(4, (32, 33), (19, 20)), (19, 20), impl=impl)


@every_impl
@every_float
def test_means_of_many_pixels(dtype: torch.dtype, impl: Any) -> None:
    # bf16 has 8 bits: a sum that is kept in it stands still at 256
    images = (0.9 + 0.1 * made(1, 2, 200, 210)).to(dtype)
    check(images, torch.tensor([[3, 5]]), (180, 190), impl=impl)
    check(views.laid_out(images, "channels-last"), torch.tensor([[3, 5]]), (180, 190), impl=impl)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_bytes_are_scaled(layout: str, impl: Any) -> None:
    images = views.laid_out(made(4, 3, 32, 33, dtype=torch.uint8), layout)
    check(images, at_the_corners(4, (32, 33), (19, 20)), (19, 20), impl=impl)
    white = views.laid_out(torch.full_like(images, 255), layout)
    found = applied(at_the_corners(4, (32, 33), (19, 20)), (19, 20), impl=impl)(white)
    torch.testing.assert_close(found, torch.ones(4, 3, 32, 33, device=DEVICE), rtol=0, atol=1e-6)


@every_impl
@every_layout
def test_layouts(layout: str, impl: Any) -> None:
    for c, dtype in ((3, torch.float32), (1, torch.bfloat16)):
        images = views.laid_out(made(3, c, 8, 10, dtype=dtype), layout)
        check(images, at_the_corners(3, (8, 10), (5, 3)), (5, 3), impl=impl)


@every_impl
def test_gradients_of_any_layout(impl: Any) -> None:
    operator = applied(at_the_corners(2, (4, 6), (3, 2)), (3, 2), impl=impl)
    for layout in ("contiguous", "channels-last"):
        views.takes_gradients_of_any_layout(operator, views.laid_out(made(2, 2, 4, 6), layout))


@every_impl
def test_corners_of_any_integer_type(impl: Any) -> None:
    images, corners_B2 = made(7, 3, 6, 8), beyond((6, 8), (3, 4))
    expected = applied(corners_B2, (3, 4), impl=impl)(images)
    for types in ((torch.int32, torch.int32), (torch.int64, torch.int32)):
        top, left = (x.to(DEVICE, dtype) for x, dtype in zip(corners_B2.unbind(1), types, strict=True))
        assert torch.equal(mask_fill(images, top, left, 3, 4, impl=impl), expected)


@every_impl
def test_corners_may_be_strided_or_expanded(impl: Any) -> None:
    images, corners_B2 = made(7, 3, 6, 8), beyond((6, 8), (3, 4))
    strided, expanded = corners_B2.to(DEVICE), torch.tensor([[2, 1]], device=DEVICE).expand(7, 2)
    for given in (strided, expanded):
        expected = views.value_and_gradients(applied(given.cpu(), (3, 4), impl=impl), [images])
        found = views.value_and_gradients(lambda x: mask_fill(x, given[:, 0], given[:, 1], 3, 4, impl=impl), [images])  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_impl
@every_float
def test_autocast_changes_nothing(dtype: torch.dtype, impl: Any) -> None:
    images, operator = made(4, 3, 12, 12, dtype=dtype), applied(at_the_corners(4, (12, 12), (5, 7)), (5, 7), impl=impl)
    plain = views.value_and_gradients(operator, [images])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = views.value_and_gradients(operator, [images])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


# sequences


@every_impl
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_sequences(number: int, impl: Any) -> None:
    images = (list if number % 2 else tuple)(views.mixed(number, 4, 9, 14))
    check(images, at_the_corners(4, (9, 14), (4, 6)), (4, 6), impl=impl)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_sequences_of_equals(layout: str, impl: Any) -> None:
    images = [views.laid_out(made(2, 3, 5, 6, seed=i), layout) for i in range(5)]
    check(images, at_the_corners(2, (5, 6), (4, 3)), (4, 3), impl=impl)
    # one image twice
    check([images[0], images[1], images[0]], at_the_corners(2, (5, 6), (4, 3)), (4, 3), impl=impl)


def test_fp64_among_others() -> None:
    images = [made(3, 2, 9, 14), made(3, 1, 9, 14, dtype=torch.float64), made(3, 3, 9, 14, dtype=torch.bfloat16)]
    check(images, at_the_corners(3, (9, 14), (4, 6)), (4, 6))


@every_impl
def test_gradient_goes_only_where_it_is_asked_for(impl: Any) -> None:
    operator = applied(at_the_corners(3, (7, 9), (4, 6)), (4, 6), impl=impl)
    views.gradient_goes_only_where_it_is_asked_for(operator, (3, 7, 9))


# degenerate sizes


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "uint8"])
def test_no_images(dtype: torch.dtype, impl: Any) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for layout in ("contiguous", "channels-last"):
        images = views.laid_out(made(0, 3, 6, 9, dtype=dtype), layout).requires_grad_(dtype != torch.uint8)
        found = mask_fill(images, none, none, 3, 4, impl=impl)
        assert found.shape == (0, 3, 6, 9) and found.dtype == views.result_dtype(dtype)
        if images.requires_grad:
            found.sum().backward()
            assert images.grad is not None and images.grad.shape == images.shape
    assert [x.shape for x in mask_fill([images, images], none, none, 3, 4, impl=impl)] == [(0, 3, 6, 9)] * 2


# what is not finite


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("size", [6, 160], ids=["few", "many"])
@pytest.mark.parametrize("within", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_stays_in_its_own_image_and_channel(
    value: float, within: bool, size: int, layout: str, impl: Any
) -> None:
    images, corners_B2 = made(3, 2, size, size), torch.tensor([[0, 0], [1, 2], [3, 3]])
    operator, hole = applied(corners_B2, (3, 3), impl=impl), inside(1, 2, (3, 3))
    expected = operator(views.laid_out(images, layout))
    images[1, 0, 2 if within else size - 1, 3] = value
    found = operator(views.laid_out(images, layout))
    assert torch.equal(found[1, 1], expected[1, 1]) and torch.equal(found[::2], expected[::2])
    filling = found[1, 0][hole]
    assert filling.isnan().all() if math.isnan(value) else (filling == value).all()
    kept = torch.ones(size, size, dtype=torch.bool, device=DEVICE)
    kept[hole] = False
    assert found[1, 0][kept].isfinite().sum() == kept.sum() - int(not within)


@every_impl
def test_gradients_that_are_not_finite_stay_where_they_are(impl: Any) -> None:
    images, operator = made(3, 2, 6, 6).requires_grad_(), applied(torch.tensor([[1, 2]] * 3), (3, 3), impl=impl)
    result = operator(images)
    (expected,) = torch.autograd.grad(result, images, torch.ones_like(result), retain_graph=True)
    to_result = torch.ones_like(result)
    # outside the hole a gradient is passed on, and inside it is shared by all of the channel
    to_result[0, 1, 5, 5], to_result[1, 0, 2, 3] = float("nan"), float("nan")
    (found,) = torch.autograd.grad(result, images, to_result)
    assert found[0, 1, 5, 5].isnan() and found[0, 1].isnan().sum() == 1
    assert found[1, 0].isnan().all()
    assert torch.equal(found[0, 0], expected[0, 0]) and torch.equal(found[1, 1], expected[1, 1])
    assert torch.equal(found[2], expected[2])
