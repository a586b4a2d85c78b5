"""kernels.crop_resize, every implementation, against interpolation matrices in float64.

A weight is a quotient of integers there, and a result is R_y · box · R_xᵀ, one sample after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import fastle.kernels.crop_resize as form
from fastle.kernels.crop_resize import crop_resize
from tests.kernels import views
from tests.kernels.views import DEVICE, every_bad_image, every_float, every_impl, every_layout, made, needs_gpu

Out = int | tuple[int, int] | None


@cache
def weights(size: int, out: int) -> Tensor:
    """(out, size): row i reads the box at i·(size − 1)/(out − 1)."""
    rows = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        whole, rest = divmod(i * (size - 1), max(out - 1, 1))
        rows[i, whole] = 1 - rest / max(out - 1, 1)
        if rest:
            rows[i, whole + 1] = rest / (out - 1)
    return rows


def inside(box: Tensor) -> tuple[slice, slice, slice]:
    """Of one image (C, H, W)."""
    top, left, height, width = box.tolist()
    return slice(None), slice(top, top + height), slice(left, left + width)


def output_size(images: Tensor, out: Out) -> tuple[int, int]:
    if out is None:
        return images.shape[2], images.shape[3]
    return (out, out) if isinstance(out, int) else out


def resized(images: Tensor, boxes_B4: Tensor, out: Out = None) -> Tensor:
    oh, ow = output_size(images, out)
    results = images.new_zeros(*images.shape[:2], oh, ow)
    for b, box in enumerate(boxes_B4):
        crop = images[b][inside(box)]
        results[b] = weights(crop.shape[1], oh) @ crop @ weights(crop.shape[2], ow).T
    return results


def spread(gradient: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `resized`."""
    results = gradient.new_zeros(*gradient.shape[:2], *size)
    for b, box in enumerate(boxes_B4):
        height, width = (int(x) for x in box[2:])
        into_y, into_x = weights(height, gradient.shape[2]), weights(width, gradient.shape[3])
        results[b][inside(box)] = into_y.T @ gradient[b] @ into_x
    return results


def at_the_corners(batch: int, size: tuple[int, int], box: tuple[int, int]) -> Tensor:
    """(B, 4): boxes of one size, at the four corners first and then anywhere."""
    generator = Generator().manual_seed(1)
    bottom, right = size[0] - box[0], size[1] - box[1]
    boxes_B4 = torch.empty(batch, 4, dtype=torch.int64)
    boxes_B4[:, 0] = torch.randint(bottom + 1, (batch,), generator=generator)
    boxes_B4[:, 1] = torch.randint(right + 1, (batch,), generator=generator)
    boxes_B4[:, 2], boxes_B4[:, 3] = box
    for b, corner in enumerate([(bottom, right), (0, 0), (bottom, 0), (0, right)][:batch]):
        boxes_B4[b, :2] = torch.tensor(corner)
    return boxes_B4


def of_all_sizes(batch: int, size: tuple[int, int]) -> Tensor:
    """(B, 4): one pixel, the whole image, then boxes of any size."""
    generator = Generator().manual_seed(2)
    sides = torch.stack([torch.randint(1, n + 1, (batch,), generator=generator) for n in size], 1)
    for b, box in enumerate([(1, 1), size][:batch]):
        sides[b] = torch.tensor(box)
    corners = [
        torch.randint(n - int(side) + 1, (1,), generator=generator)
        for row in sides
        for n, side in zip(size, row, strict=True)
    ]
    return torch.cat([torch.cat(corners).view(batch, 2), sides], 1)


def applied(boxes_B4: Tensor, tensors: str = "", **options: Any) -> Callable[[Any], Any]:
    """crop_resize with these boxes; `tensors` says of which sides ("h", "w") each sample has its own."""
    top, left, *sizes = boxes_B4.T.contiguous().to(DEVICE)
    height, width = (sizes[i] if "hw"[i] in tensors else int(boxes_B4[0, 2 + i]) for i in range(2))
    return lambda images: crop_resize(images, top, left, height, width, **options)


def check(images: Tensor | Sequence[Tensor], boxes_B4: Tensor, tensors: str = "", **options: Any) -> None:
    size = images.shape if isinstance(images, Tensor) else images[0].shape
    views.check(
        applied(boxes_B4, tensors, **options),
        images,
        lambda x: resized(x, boxes_B4, options.get("out_size")),
        lambda gradient: spread(gradient, boxes_B4, (size[2], size[3])),
        options.get("impl", "auto"),
    )


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


# how torch takes it


def test_gradcheck() -> None:
    # the operator is linear: what its gradient's gradient is, is no question
    images = [made(2, c, 5, 7, seed=c, dtype=torch.float64).requires_grad_() for c in (1, 2)]
    for boxes_B4, tensors in ((at_the_corners(2, (5, 7), (3, 4)), ""), (of_all_sizes(2, (5, 7)), "hw")):
        for out in (None, (4, 1), (2, 9)):
            operator = applied(boxes_B4, tensors, out_size=out, impl="torch")
            assert torch.autograd.gradcheck(operator, images[1])
            assert torch.autograd.gradcheck(lambda *x: operator(x), images)  # noqa: B023


def test_gradgradcheck() -> None:
    images = made(2, 2, 5, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(applied(at_the_corners(2, (5, 7), (3, 4)), impl="torch"), images)
    assert torch.autograd.gradgradcheck(applied(of_all_sizes(2, (5, 7)), "hw", out_size=(4, 9)), images)


@every_impl
@pytest.mark.parametrize(
    ("layout", "tensors"),
    [("contiguous", ""), ("contiguous", "h"), ("channels-last", "hw")],
    ids=["integers", "heights", "channels-last"],
)
def test_opcheck(layout: str, tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (4, 5), (3, 2)), tensors, out_size=(3, 6), impl=impl)
    views.passes_opcheck("crop_resize", operator, [views.laid_out(made(2, 2, 4, 5), layout)])


@every_impl
def test_opcheck_of_sequences(impl: Any) -> None:
    operator = applied(at_the_corners(1, (4, 5), (3, 2)), impl=impl)
    views.passes_opcheck("crop_resize", lambda *x: operator(x), views.mixed(4, 1, 4, 5))


@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_the_same_bits_twice(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (21, 13), (17, 9)), tensors, impl=impl)
    views.same_bits_twice(lambda *x: operator(x), views.mixed(2, 2, 21, 13))


@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_full_graph_compile(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (6, 5), (5, 4)), tensors, out_size=(4, 7), impl=impl)

    def doubled(images: Tensor) -> Tensor:
        return operator(2 * images) + 1

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator(images))

    views.compiled_equals_eager(doubled, [made(2, 2, 6, 5)])
    views.compiled_equals_eager(operator, [views.laid_out(made(2, 2, 6, 5), "channels-last")])
    views.compiled_equals_eager(several, views.mixed(3, 2, 6, 5))


def test_full_graph_compile_by_inductor() -> None:
    operator = applied(at_the_corners(3, (8, 9), (5, 4)), out_size=(6, 11))

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator([2 * x for x in images]))

    views.compiled_equals_eager(several, [made(3, 2, 8, 9), made(3, 1, 8, 9, seed=1)], backend="inductor")


def test_compiles_for_all_batches_at_once() -> None:
    corners = torch.zeros(9, dtype=torch.int64, device=DEVICE)

    def cropped(images: Tensor) -> Tensor:
        return crop_resize(images, corners[: images.shape[0]], corners[: images.shape[0]], 3, 4)

    views.compiled_equals_eager(cropped, *([made(b, 2, 8, 9)] for b in (3, 5, 9)), dynamic=True)


def test_auto_takes_what_suits_the_device() -> None:
    boxes = at_the_corners(3, (33, 20), (17, 19)).to(DEVICE)
    views.auto_takes_what_suits(
        lambda x, **o: crop_resize(x, boxes[:, 0], boxes[:, 1], 17, 19, **o), made(3, 3, 33, 20)
    )


# errors


@every_impl
@pytest.mark.parametrize(
    ("height", "width", "says"),
    [
        (0, None, r"\b0\b"), (-1, None, "-1"), (6, None, r"\b6\b"), (11, None, r"\b11\b"),
        (3, 0, r"\b0\b"), (3, -2, "-2"), (3, 9, r"\b9\b"), (5, 77, r"\b77\b"), (6, 8, r"\b6\b"),
    ],
)  # fmt: skip
def test_sizes_out_of_range(height: int, width: int | None, says: str, impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=says) as raised:
        crop_resize(made(2, 1, 5, 8), zero, zero, height, width, impl=impl)
    assert "crop_resize" in str(raised.value)


@every_impl
@pytest.mark.parametrize(("out", "says"), [(0, r"\b0\b"), (-3, "-3"), ((4, 0), r"\b0\b"), ((-1, 4), "-1")])
def test_outputs_out_of_range(out: Out, says: str, impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=says):
        crop_resize(made(2, 1, 5, 8), zero, zero, 3, out_size=out, impl=impl)


@every_impl
@every_bad_image
def test_images_that_it_does_not_take(bad: Callable[[], Any], says: str, impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=says):
        crop_resize(bad(), zero, zero, 3, impl=impl)


@every_impl
@pytest.mark.parametrize("argument", ["top", "left", "height", "width"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:3], r"\(3,\)|\b3\b"),
        (lambda x: x[:, None], r"4\D+1"),
        (lambda x: x[0], r"\(\)|\[\]|scalar|shape"),
        (lambda x: x.float(), "float32"),
        (lambda x: x > 0, "bool"),
        (lambda x: x.to("meta"), "meta"),
    ],
    ids=["too-few", "two-axes", "no-axis", "float", "bool", "other-device"],
)
def test_boxes_that_are_no_boxes(change: Callable[[Tensor], Tensor], says: str, argument: str, impl: Any) -> None:
    boxes = dict(
        zip(("top", "left", "height", "width"), torch.ones(4, 4, dtype=torch.int64, device=DEVICE), strict=True)
    )
    boxes[argument] = change(boxes[argument])
    with pytest.raises(ValueError, match=says) as raised:
        crop_resize(made(4, 1, 5, 8), **boxes, impl=impl)
    assert argument in str(raised.value)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(-1, 4, 3, 3), (4, -1, 3, 3), (10, 4, 3, 3), (4, 15, 3, 3), (9, 4, 4, 3), (4, 13, 3, 5), (2**31, 0, 1, 1)],
)
def test_boxes_that_leave_the_image(top: int, left: int, height: int, width: int, layout: str, impl: Any) -> None:
    images, boxes_B4 = (
        views.laid_out(made(5, 1, 12, 17), layout).cpu(),
        torch.tensor([[4, 4, height, width]]).repeat(5, 1),
    )
    # the first one is named, and not the last
    boxes_B4[2, :2] = torch.tensor((top, left))
    boxes_B4[4, :2] = -7
    if impl == "triton" and DEVICE.type == "cuda":
        pytest.skip("on a GPU the kernel itself asserts")
    message = (
        f"crop_resize: the box of sample 2 (top {top}, left {left}, height {height}, width {width})"
        " leaves the 12x17 image"
    )
    tops, lefts, heights, widths = boxes_B4.unbind(1)
    for sizes in ((height, width), (heights, widths), (heights, width)):
        for given in (images, [images, images]):
            with pytest.raises(ValueError) as raised:  # noqa: PT011
                crop_resize(given, tops, lefts, *sizes, impl=impl)
            assert str(raised.value) == message


@every_impl
@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (-2, 3), (13, 3), (3, 18)])
def test_sizes_of_a_sample_out_of_range(height: int, width: int, impl: Any) -> None:
    if impl == "triton" and DEVICE.type == "cuda":
        pytest.skip("on a GPU the kernel itself asserts")
    zero = torch.zeros(3, dtype=torch.int64)
    heights, widths = torch.tensor([3, 3, height]), torch.tensor([3, 3, width])
    with pytest.raises(ValueError, match=rf"sample 2 \(top 0, left 0, height {height}, width {width}\)"):
        crop_resize(made(3, 1, 12, 17).cpu(), zero, zero, heights, widths, impl=impl)


@every_impl
def test_choices_that_cannot_be_had(impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    views.choices_that_cannot_be_had(lambda x, impl: crop_resize(x, zero, zero, 3, impl=impl), made(2, 1, 5, 8))


@pytest.mark.parametrize("missing", ["interpreter", "triton"])
def test_triton_that_cannot_be_had_says_why(missing: str) -> None:
    # of all the operators at once: Triton decides at its import whether it interprets, and an import takes seconds
    script = """if True:
        import sys, torch
        if sys.argv[1] == "triton":
            sys.modules["triton"] = None
        from fastle.kernels.crop_resize import crop_resize
        from fastle.kernels.mask_fill import mask_fill
        from fastle.kernels.random_mask import mask_channels, mask_patches
        images, zero = torch.ones(2, 1, 6, 8), torch.zeros(2, dtype=torch.int64)
        for call in (
            lambda **options: crop_resize(images, zero, zero, 3, **options),
            lambda **options: mask_fill(images, zero, zero, 3, 3, **options),
            lambda **options: mask_patches(images, zero, ratio=0.5, **options),
            lambda **options: mask_channels(images, zero, ratio=0.5, **options),
        ):
            for impl in ("auto", "torch"):
                assert call(impl=impl).isfinite().all()
            try:
                call(impl="triton")
            except ValueError as error:
                print(error)
    """
    said = views.run_alone(script, missing).stdout.splitlines()
    assert len(said) == 4
    for line in said:
        assert 'impl="triton" cannot be had: ' in line
        assert ("TRITON_INTERPRET" if missing == "interpreter" else "install") in line


# what only a GPU can show


@needs_gpu
@every_impl
@pytest.mark.parametrize("sizes", ["integers", "tensors"])
def test_a_box_that_leaves_the_image_on_a_gpu(sizes: str, impl: str) -> None:
    script = """if True:
        import sys, torch
        from fastle.kernels.crop_resize import crop_resize
        images = torch.rand(4, 3, 32, 32, device="cuda")
        top, left = torch.tensor([0, 5, 28, 3], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        side = 5 if sys.argv[2] == "integers" else torch.full_like(top, 5)
        crop_resize(images, top.clamp(max=27), left, side, impl=sys.argv[1])
        torch.cuda.synchronize()
        print("within", flush=True)
        crop_resize(images, top, left, side, impl=sys.argv[1])
        torch.cuda.synchronize()
        print("beyond", flush=True)
    """
    done = views.run_alone(script, impl, sizes, check=False)
    assert done.stdout.split() == ["within"] and done.returncode != 0
    assert "assert" in done.stderr


@needs_gpu
@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_cuda_graph(tensors: str, impl: Any) -> None:
    images = [made(8, 3, 128, 100, seed=i).requires_grad_() for i in range(3)]
    boxes = of_all_sizes(8, (128, 100)) if tensors else at_the_corners(8, (128, 100), (19, 30))
    others = boxes.flip(0).to(DEVICE)
    boxes = boxes.to(DEVICE)
    height, width = (boxes[:, 2], boxes[:, 3]) if tensors else (19, 30)

    def step() -> list[Tensor]:
        results = crop_resize(images, boxes[:, 0], boxes[:, 1], height, width, impl=impl)
        return [*results, *torch.autograd.grad(torch.stack([x.square().sum() for x in results]).sum(), images)]

    def change() -> None:
        boxes.copy_(others)
        for i, image in enumerate(images):
            image.data.copy_(made(8, 3, 128, 100, seed=10 + i))

    views.replays(step, change)


@needs_gpu
@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_waits_for_no_gpu(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(8, (64, 50), (19, 30)), tensors, impl=impl)
    views.waits_for_no_gpu(operator, made(8, 3, 64, 50))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("sizes", ["numbers", "tensors"])
def test_form_of_devices_without_triton_equals_that_of_a_cpu(sizes: str, layout: str) -> None:
    images = views.laid_out(made(4, 3, 9, 14), layout).cpu()
    top, left = torch.tensor([0, 4, 8, 2]), torch.tensor([0, 9, 13, 1])
    heights, widths = torch.tensor([9, 5, 1, 3]), torch.tensor([14, 5, 1, 7])
    boxes: tuple[Any, ...]
    if sizes == "numbers":
        boxes = (top.clamp(max=5), left.clamp(max=8), None, None, 4, 6)
    else:
        boxes = (top, left, heights, widths, 0, 0)
    # what no box holds is not read
    images[1, :, 0, 0] = torch.nan
    gradient = torch.rand(4, 3, 7, 20) - 0.5
    listed = form._listed(*boxes)
    expected, found = form._resize(images, listed, (7, 20)), form._resize_by_masks(images, *boxes, (7, 20))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.stride() == expected.stride()
    spread, by_masks = form._spread(gradient, listed, (9, 14)), form._spread_by_masks(gradient, *boxes, (9, 14))
    torch.testing.assert_close(by_masks, spread, rtol=0, atol=1e-5)
