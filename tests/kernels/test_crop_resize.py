"""kernels.crop_resize, every implementation, against interpolation matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastle.kernels.crop_resize import crop_resize
from tests.kernels import views
from tests.kernels.crop_resize_cases import Out, applied, at_the_corners, check, inside, of_all_sizes
from tests.kernels.views import DEVICE, every_float, every_impl, every_layout, made

# values and gradients

# batch, channels, height, width, the box's height and width, the output
SMALL: list[tuple[int, int, int, int, int, int, Out]] = [
    (1, 1, 1, 1, 1, 1, None),
    (4, 3, 6, 9, 1, 1, None),
    (4, 3, 6, 9, 1, 4, None),
    (4, 1, 6, 9, 3, 1, None),
    (5, 2, 6, 11, 2, 2, None),
    (6, 5, 13, 6, 5, 5, None),
    (2, 3, 7, 7, 7, 7, None),
    (2, 3, 9, 20, 9, 20, 33),
    (2, 1, 1, 6, 1, 5, None),
    (4, 3, 8, 10, 3, 4, 1),
    (4, 3, 8, 10, 5, 6, (1, 7)),
    (4, 3, 8, 10, 5, 6, (5, 1)),
    (4, 3, 8, 10, 5, 6, (5, 6)),
    (4, 2, 20, 31, 17, 29, (5, 3)),
    (2, 3, 40, 24, 37, 3, (3, 37)),
]
# the last three for what fp32 coordinates of their own would cost: 1e-5 at side 200, 1e-4 at 2000
LARGE: list[tuple[int, int, int, int, int, int, Out]] = [
    (4, 3, 128, 128, 19, 19, None),
    (2, 3, 70, 67, 33, 51, (130, 129)),
    (2, 1, 100, 300, 90, 280, (17, 65)),
    (2, 1, 256, 256, 200, 200, None),
    (2, 1, 256, 300, 256, 300, (253, 511)),
    (1, 1, 2048, 8, 2000, 5, (2039, 7)),
]
# under the interpreter, a large box in one direction at a time
INTERPRETED: list[tuple[int, int, int, int, int, int, Out]] = [
    (1, 1, 256, 6, 200, 5, None),
    (1, 1, 6, 256, 5, 200, None),
    (1, 2, 40, 37, 33, 35, (20, 67)),
    (1, 1, 600, 2, 590, 2, (577, 2)),
    (1, 1, 2, 600, 2, 590, (2, 577)),
]


def name(case: tuple[int, int, int, int, int, int, Out]) -> str:
    b, c, h, w, bh, bw, out = case
    size = "" if out is None else f"-to{out}" if isinstance(out, int) else f"-to{out[0]}x{out[1]}"
    return f"B{b}-C{c}-{h}x{w}-box{bh}x{bw}{size}"


GRID = [
    *(pytest.param("torch", *case, id=f"torch-{name(case)}") for case in SMALL + LARGE),
    *(
        pytest.param("triton", *case, id=f"triton-{name(case)}", marks=views.needs_triton)
        for case in SMALL + (LARGE if DEVICE.type == "cuda" else INTERPRETED)
    ),
]


@pytest.mark.parametrize(("impl", "b", "c", "h", "w", "bh", "bw", "out"), GRID)
def test_fp32_equals_the_formula(impl: Any, b: int, c: int, h: int, w: int, bh: int, bw: int, out: Out) -> None:
    check(made(b, c, h, w), at_the_corners(b, (h, w), (bh, bw)), out_size=out, impl=impl)


@pytest.mark.parametrize(("b", "c", "h", "w", "bh", "bw", "out"), SMALL + LARGE, ids=map(name, SMALL + LARGE))
def test_fp64_equals_the_formula(b: int, c: int, h: int, w: int, bh: int, bw: int, out: Out) -> None:
    images = made(b, c, h, w, dtype=torch.float64)
    check(images, at_the_corners(b, (h, w), (bh, bw)), out_size=out)
    check(images, at_the_corners(b, (h, w), (bh, bw)), "hw", out_size=out, impl="torch")


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_channels_last_of_every_number_of_channels(layout: str, impl: Any) -> None:
    for c in (1, 3, 5):
        images = views.laid_out(made(2, c, 5, 11), layout)
        check(images, at_the_corners(2, (5, 11), (4, 9)), out_size=(23, 6), impl=impl)


@every_impl
@pytest.mark.parametrize("tensors", ["h", "w", "hw"])
@pytest.mark.parametrize("out", [None, (4, 13)], ids=["as-it-was", "4x13"])
def test_each_sample_has_a_size_of_its_own(out: Out, tensors: str, impl: Any) -> None:
    options: dict[str, Any] = {"out_size": out, "impl": impl}
    boxes_B4 = of_all_sizes(5, (6, 9))
    for letter, i in (("h", 2), ("w", 3)):
        if letter not in tensors:
            boxes_B4[:, i] = 4
            boxes_B4[:, i - 2] %= 3
    check(views.laid_out(made(5, 2, 6, 9), "channels-last" if out else "contiguous"), boxes_B4, tensors, **options)


def test_large_boxes_of_sizes_of_their_own() -> None:
    boxes_B4 = of_all_sizes(5, (200, 256))
    check(made(5, 3, 200, 256), boxes_B4, "hw")
    check(made(5, 1, 200, 256), boxes_B4, "hw", out_size=(301, 40))


@every_impl
def test_height_alone_is_a_square(impl: Any) -> None:
    images, boxes = made(4, 3, 8, 10), at_the_corners(4, (8, 10), (3, 3)).to(DEVICE)
    top, left, side, _ = boxes.unbind(1)
    expected = crop_resize(images, top, left, 3, 3, impl=impl)
    assert torch.equal(crop_resize(images, top, left, 3, impl=impl), expected)
    torch.testing.assert_close(crop_resize(images, top, left, side, impl=impl), expected, rtol=0, atol=1e-6)


@every_impl
@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=["square", "ragged"])
def test_corners_are_aligned(size: tuple[int, int], impl: Any) -> None:
    images, boxes_B4 = made(4, 3, *size), at_the_corners(4, size, (4, 5))
    found = applied(boxes_B4, impl=impl)(images)
    for b, (y, x, _, _) in enumerate(boxes_B4.tolist()):
        assert torch.equal(found[b, :, 0, 0], images[b, :, y, x])
        assert torch.equal(found[b, :, -1, -1], images[b, :, y + 3, x + 4])
        assert torch.equal(found[b, :, 0, -1], images[b, :, y, x + 4])
        assert torch.equal(found[b, :, -1, 0], images[b, :, y + 3, x])


@every_impl
def test_whole_image_is_itself(impl: Any) -> None:
    images, zero = made(3, 2, 12, 15), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert torch.equal(crop_resize(images, zero, zero, 12, 15, impl=impl), images)
    assert torch.equal(crop_resize(images, zero, zero, 5, 7, out_size=(5, 7), impl=impl), images[:, :, :5, :7])


@every_impl
def test_one_pixel_fills_the_image(impl: Any) -> None:
    images, boxes_B4 = made(4, 3, 6, 9), at_the_corners(4, (6, 9), (1, 1))
    found = applied(boxes_B4, impl=impl)(images)
    for b, (y, x, _, _) in enumerate(boxes_B4.tolist()):
        assert torch.equal(found[b], images[b, :, y, x, None, None].expand(3, 6, 9))


# dtypes and layouts


@every_impl
@every_float
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("box", [(9, 7), (13, 16)], ids=["enlarged", "reduced"])
def test_dtypes(box: tuple[int, int], layout: str, dtype: torch.dtype, impl: Any) -> None:
    images = views.laid_out(made(2, 3, 14, 17, dtype=dtype), layout)
    tensors, out = ("", None) if box[0] == 9 else ("hw", (11, 10))
    check(images, at_the_corners(2, (14, 17), box), tensors, out_size=out, impl=impl)


@every_float
def test_coordinates_are_not_of_the_images_dtype(dtype: torch.dtype) -> None:
    # bf16 knows only every second integer beyond 256, and every eighth beyond 1024
    check(made(1, 1, 1500, 20, dtype=dtype), torch.tensor([[300, 3, 1111, 9]]), out_size=(1400, 20), impl="torch")


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_bytes_are_scaled(layout: str, impl: Any) -> None:
    images = views.laid_out(made(3, 3, 24, 31, dtype=torch.uint8), layout)
    check(images, at_the_corners(3, (24, 31), (9, 7)), impl=impl)
    check(images, of_all_sizes(3, (24, 31)), "hw", out_size=(5, 40), impl=impl)
    white = torch.full_like(images, 255)
    torch.testing.assert_close(
        applied(at_the_corners(3, (24, 31), (9, 7)), impl=impl)(white), torch.ones(3, 3, 24, 31, device=DEVICE),
        rtol=0, atol=1e-6,
    )  # fmt: skip


@every_impl
@every_layout
def test_layouts(layout: str, impl: Any) -> None:
    for c, dtype in ((3, torch.float32), (1, torch.bfloat16)):
        images = views.laid_out(made(2, c, 4, 6, dtype=dtype), layout)
        check(images, at_the_corners(2, (4, 6), (3, 2)), impl=impl)


@every_impl
def test_gradients_of_any_layout(impl: Any) -> None:
    operator = applied(at_the_corners(2, (4, 6), (3, 2)), impl=impl)
    for layout in ("contiguous", "channels-last"):
        views.takes_gradients_of_any_layout(operator, views.laid_out(made(2, 2, 4, 6), layout))


@every_impl
@pytest.mark.parametrize("dtypes", [(torch.int32,) * 4, (torch.int64, torch.int32) * 2], ids=["int32", "both"])
def test_corners_of_any_integer_type(dtypes: Sequence[torch.dtype], impl: Any) -> None:
    images, boxes_B4 = made(4, 3, 8, 8), of_all_sizes(4, (8, 8))
    expected = applied(boxes_B4, "hw", impl=impl)(images)
    top, left, height, width = (x.to(DEVICE, dtype) for x, dtype in zip(boxes_B4.unbind(1), dtypes, strict=True))
    assert torch.equal(crop_resize(images, top, left, height, width, impl=impl), expected)


@every_impl
def test_corners_may_be_strided_or_expanded(impl: Any) -> None:
    images, boxes_B4, one = made(4, 3, 8, 8), of_all_sizes(4, (8, 8)), torch.tensor([3], device=DEVICE)
    columns = boxes_B4.to(DEVICE).unbind(1)
    expected = views.value_and_gradients(applied(boxes_B4, "hw", impl=impl), [images])
    found = views.value_and_gradients(lambda x: crop_resize(x, *columns, impl=impl), [images])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expected = views.value_and_gradients(applied(torch.tensor([[3, 3, 3, 5]] * 4), "h", impl=impl), [images])
    found = views.value_and_gradients(
        lambda x: crop_resize(x, one.expand(4), one.expand(4), one.expand(4), 5, impl=impl), [images]
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_impl
@every_float
def test_autocast_changes_nothing(dtype: torch.dtype, impl: Any) -> None:
    images, boxes_B4 = made(4, 3, 12, 12, dtype=dtype), at_the_corners(4, (12, 12), (5, 7))
    operator = applied(boxes_B4, impl=impl)
    plain = views.value_and_gradients(operator, [images])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = views.value_and_gradients(operator, [images])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


# sequences


@every_impl
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_sequences(number: int, impl: Any) -> None:
    images = (list if number % 2 else tuple)(views.mixed(number, 2, 7, 11))
    check(images, at_the_corners(2, (7, 11), (4, 6)), impl=impl)
    check(images, of_all_sizes(2, (7, 11)), "hw", out_size=(9, 5), impl=impl)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_sequences_of_equals(layout: str, impl: Any) -> None:
    images = [views.laid_out(made(2, 3, 5, 6, seed=i), layout) for i in range(5)]
    check(images, at_the_corners(2, (5, 6), (4, 3)), impl=impl)
    # one image twice
    check([images[0], images[1], images[0]], at_the_corners(2, (5, 6), (4, 3)), impl=impl)


def test_fp64_among_others() -> None:
    images = [made(3, 2, 9, 14), made(3, 1, 9, 14, dtype=torch.float64), made(3, 3, 9, 14, dtype=torch.bfloat16)]
    check(images, at_the_corners(3, (9, 14), (4, 6)))


@every_impl
def test_gradient_goes_only_where_it_is_asked_for(impl: Any) -> None:
    operator = applied(at_the_corners(2, (5, 6), (4, 3)), impl=impl)
    views.gradient_goes_only_where_it_is_asked_for(operator, (2, 5, 6))


@every_impl
def test_gradients_add_up(impl: Any) -> None:
    images, operator = made(3, 2, 7, 9).requires_grad_(), applied(at_the_corners(3, (7, 9), (4, 6)), impl=impl)
    (once,) = torch.autograd.grad(operator(images).sum(), images)
    (thrice,) = torch.autograd.grad(operator(images).sum() + sum(x.sum() for x in operator([images, images])), images)
    torch.testing.assert_close(thrice, 3 * once)


# degenerate sizes


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "uint8"])
def test_no_images(dtype: torch.dtype, impl: Any) -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    for layout in ("contiguous", "channels-last"):
        images = views.laid_out(made(0, 3, 6, 9, dtype=dtype), layout)
        here = none.to(DEVICE)
        for out, size in ((None, (6, 9)), (4, (4, 4)), ((5, 1), (5, 1))):
            leaf = images.clone().requires_grad_(images.is_floating_point())
            found = crop_resize(leaf, here[:, 0], here[:, 1], 3, here[:, 3], out_size=out, impl=impl)
            assert found.shape == (0, 3, *size) and found.dtype == views.result_dtype(dtype)
            if leaf.requires_grad:
                found.sum().backward()
                assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    several = crop_resize([images, images], here[:, 0], here[:, 1], 3, impl=impl)
    assert [x.shape for x in several] == [(0, 3, 6, 9)] * 2


@every_impl
def test_no_images_but_a_box_that_does_not_fit(impl: Any) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"\b7\b"):
        crop_resize(made(0, 3, 6, 9), none, none, 7, impl=impl)


# what is not read


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("box", [(1, 1), (3, 2), (6, 4)], ids=["pixel", "part", "all-rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nothing_outside_the_box_is_read(value: float, box: tuple[int, int], layout: str, impl: Any) -> None:
    images, boxes_B4 = made(4, 2, 6, 9), at_the_corners(4, (6, 9), box)
    fenced = torch.full_like(images, value)
    for b, one in enumerate(boxes_B4):
        fenced[b][inside(one)] = images[b][inside(one)]
    for tensors in ("", "hw"):
        for out in (None, (11, 2)):
            operator = applied(boxes_B4, tensors, out_size=out, impl=impl)
            assert torch.equal(operator(views.laid_out(fenced, layout)), operator(views.laid_out(images, layout)))


@every_impl
def test_no_gradient_outside_the_box(impl: Any) -> None:
    images, boxes_B4 = made(4, 2, 6, 9).requires_grad_(), at_the_corners(4, (6, 9), (3, 4))
    result = applied(boxes_B4, impl=impl)(images)
    (gradient,) = torch.autograd.grad(result, images, torch.ones_like(result))
    outside = torch.ones_like(images, dtype=torch.bool)
    for b, box in enumerate(boxes_B4):
        outside[b][inside(box)] = False
    assert not gradient[outside].any()


@every_impl
def test_nan_stays_in_its_own_image_and_channel(impl: Any) -> None:
    images, operator = made(3, 2, 6, 6), applied(at_the_corners(3, (6, 6), (4, 4)), impl=impl)
    for layout in ("contiguous", "channels-last"):
        expected = operator(views.laid_out(images, layout))
        spoilt = images.clone()
        spoilt[1, 0] = float("nan")
        found = operator(views.laid_out(spoilt, layout))
        assert found[1, 0].isnan().all()
        assert torch.equal(found[1, 1], expected[1, 1]) and torch.equal(found[::2], expected[::2])
