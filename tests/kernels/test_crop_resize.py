"""kernels.crop_resize, every implementation, against interpolation matrices in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastle.kernels.crop_resize as module
from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.impl import MISSING_TRITON
from tests.kernels import views
from tests.kernels.crop_resize_cases import Out, applied, at_the_corners, check, inside, of_all_sizes
from tests.kernels.views import DEVICE, every_impl, laid_out, made, needs_gpu

Case = tuple[int, int, int, int, int, int, Out]
# batch, channels, height, width, the box's height and width, the output
SMALL: list[Case] = [
    (1, 1, 1, 1, 1, 1, None),
    (2, 1, 6, 9, 1, 4, None),
    (2, 1, 6, 9, 3, 1, (7, 2)),
    (2, 1, 8, 10, 5, 6, (1, 7)),
    (2, 1, 8, 10, 5, 6, (5, 1)),
    (2, 5, 13, 6, 9, 5, None),
    (4, 2, 20, 31, 17, 29, (5, 3)),
]
# more than one tile in each direction, and for what rounded coordinates would cost: 1e-5 at side 200, 1e-4 at 2000
LARGE: list[Case] = [(2, 3, 70, 67, 33, 51, (130, 129)), (1, 1, 2048, 8, 2000, 5, (2039, 7))]
# the interpreter is slow: one large direction at a time
INTERPRETED: list[Case] = [(1, 1, 40, 37, 33, 35, (20, 67)), (1, 1, 6, 256, 5, 200, None), (1, 1, 600, 2, 590, 2, None)]
GRID = [
    *(("torch", *case) for case in SMALL + LARGE),
    *(("triton", *case) for case in SMALL + (LARGE if DEVICE.type == "cuda" else INTERPRETED)),
]


def case_id(case: tuple[Any, ...]) -> str:
    impl, b, c, h, w, bh, bw, out = case
    return f"{impl}-B{b}-C{c}-{h}x{w}-box{bh}x{bw}" + ("" if out is None else f"-to{out[0]}x{out[1]}")


@pytest.mark.parametrize(("impl", "b", "c", "h", "w", "bh", "bw", "out"), GRID, ids=map(case_id, GRID))
def test_fp32_equals_the_formula(impl: Any, b: int, c: int, h: int, w: int, bh: int, bw: int, out: Out) -> None:
    if impl == "triton" and MISSING_TRITON:
        pytest.skip(MISSING_TRITON)
    boxes_B4 = at_the_corners(b, (h, w), (bh, bw))
    check(made(b, c, h, w), boxes_B4, out_size=out, impl=impl)
    if c > 1 and h * w < 2000:
        check(laid_out(made(b, c, h, w), "channels-last"), boxes_B4, out_size=out, impl=impl)


@every_impl
@pytest.mark.parametrize("tensors", ["h", "w", "hw"])
def test_each_sample_has_its_own_size(tensors: str, impl: Any) -> None:
    boxes_B4 = of_all_sizes(4, (6, 9))
    for letter, i in (("h", 2), ("w", 3)):
        if letter not in tensors:
            boxes_B4[:, i] = 4
            boxes_B4[:, i - 2] %= 3
    check(made(4, 1, 6, 9), boxes_B4, tensors, out_size=(4, 7), impl=impl)


def test_fp64_equals_the_formula() -> None:
    images = made(5, 3, 40, 50, dtype=torch.float64)
    check(images, at_the_corners(5, (40, 50), (33, 21)))
    check(images, of_all_sizes(5, (40, 50)), "hw", out_size=(61, 13))


@every_impl
def test_exact_values(impl: Any) -> None:
    images, boxes_B4 = made(4, 1, 5, 9), at_the_corners(4, (5, 9), (4, 5))
    resized, pixel = applied(boxes_B4, impl=impl)(images), torch.tensor([[4, 8, 1, 1]] * 4)
    for b, (y, x, _, _) in enumerate(boxes_B4.tolist()):
        # corners are aligned
        for row, column in ((0, 0), (-1, -1), (0, -1), (-1, 0)):
            assert torch.equal(resized[b, :, row, column], images[b, :, y + row % 4, x + column % 5])
    assert torch.equal(applied(torch.tensor([[0, 0, 5, 9]] * 4), impl=impl)(images), images)
    assert torch.equal(applied(pixel, impl=impl)(images), images[:, :, 4:, 8:].expand_as(images))
    top, left, side = boxes_B4.to(DEVICE)[:, 0], torch.zeros(4, dtype=torch.int64, device=DEVICE), 4
    expected = crop_resize(images, top, left, side, side, out_size=(6, 6), impl=impl)
    # without a width boxes are squares, and one number is the size of square results
    assert torch.equal(crop_resize(images, top, left, side, out_size=6, impl=impl), expected)


def test_coordinates_are_not_in_the_images_dtype() -> None:
    # bf16 holds only every second integer beyond 256, and every eighth beyond 1024
    images = made(1, 1, 1500, 20, dtype=torch.bfloat16)
    check(images, torch.tensor([[300, 3, 1111, 9]]), out_size=(1400, 20), impl="torch")


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_pixels_outside_the_box_do_not_matter(layout: str, impl: Any) -> None:
    images = made(2, 2, 6, 9)
    for box in ((1, 1), (3, 2)):
        boxes_B4 = at_the_corners(2, (6, 9), box)
        fenced = torch.full_like(images, float("nan"))
        for b, one in enumerate(boxes_B4):
            fenced[b][inside(one)] = images[b][inside(one)]
        for tensors, out in (("", (4, 3)), ("hw", (5, 2))):
            operator = applied(boxes_B4, tensors, out_size=out, impl=impl)
            leaf = laid_out(fenced, layout).requires_grad_()
            result = operator(leaf)
            assert torch.equal(result, operator(laid_out(images, layout)))
            (gradient,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
            assert not gradient[leaf.isnan()].any()


@every_impl
def test_nan_stays_in_its_own_image_and_channel(impl: Any) -> None:
    images, operator = made(3, 2, 6, 6), applied(at_the_corners(3, (6, 6), (4, 4)), impl=impl)
    for layout in ("contiguous", "channels-last"):
        expected, spoilt = operator(laid_out(images, layout)), images.clone()
        spoilt[1, 0] = float("nan")
        result = operator(laid_out(spoilt, layout))
        assert result[1, 0].isnan().all()
        assert torch.equal(result[1, 1], expected[1, 1]) and torch.equal(result[::2], expected[::2])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("sizes", ["numbers", "tensors"])
def test_dense_products_of_other_devices_equal_those_of_a_cpu(sizes: str, layout: str) -> None:
    images = laid_out(made(4, 3, 9, 14), layout).cpu()
    top, left = torch.tensor([0, 4, 8, 2]), torch.tensor([0, 9, 13, 1])
    boxes: tuple[Any, ...] = (top.clamp(max=5), left.clamp(max=8), None, None, 4, 6)
    if sizes == "tensors":
        boxes = (top, left, torch.tensor([9, 5, 1, 3]), torch.tensor([14, 5, 1, 7]), 0, 0)
    images[1, :, 0, 0] = torch.nan
    gradient, box_list = torch.rand(4, 3, 7, 20) - 0.5, module._box_list(*boxes)
    expected, result = module._resize(images, box_list, (7, 20)), module._resize_dense(images, *boxes, (7, 20))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert result.stride() == expected.stride()
    expected = module._resize_adjoint(gradient, box_list, (9, 14))
    torch.testing.assert_close(module._resize_dense_adjoint(gradient, *boxes, (9, 14)), expected, rtol=0, atol=1e-5)


# errors


@every_impl
def test_sizes_out_of_range_are_errors(impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for height, width, says in ((0, None, "0"), (6, None, "6"), (3, -2, "-2"), (3, 9, "9")):
        with pytest.raises(ValueError, match=rf"crop_resize: .*{says}\b"):
            crop_resize(made(2, 1, 5, 8), zero, zero, height, width, impl=impl)
    for out in (0, (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="crop_resize: out_size"):
            crop_resize(made(2, 1, 5, 8), zero, zero, 3, out_size=out, impl=impl)
    with pytest.raises(ValueError, match=r"\b7\b"):
        crop_resize(made(0, 3, 6, 9), zero[:0], zero[:0], 7, impl=impl)


@every_impl
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(-1, 4, 3, 3), (4, -1, 3, 3), (10, 4, 3, 3), (4, 13, 3, 5), (2**31, 0, 1, 1), (0, 0, 0, 3), (0, 0, 3, 18)],
)
def test_boxes_that_leave_the_image_are_errors(top: int, left: int, height: int, width: int, impl: Any) -> None:
    if impl == "triton" and DEVICE.type == "cuda":
        pytest.skip("on a GPU the kernel itself asserts")
    # the message names the first such box, and not the last
    boxes_B4 = torch.tensor([[4, 4, 3, 3], [4, 4, 3, 3], [top, left, height, width], [4, 4, 3, 3], [-7, 4, 3, 3]])
    box = f"(top {top}, left {left}, height {height}, width {width})"
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        crop_resize(made(5, 1, 12, 17).cpu(), *boxes_B4.unbind(1), impl=impl)
    assert str(raised.value) == f"crop_resize: the box of sample 2 {box} leaves the 12x17 image"


@needs_gpu
@pytest.mark.parametrize("sizes", ["integers", "tensors"])
def test_boxes_that_leave_the_image_are_asserted_on_a_gpu(sizes: str) -> None:
    script = """if True:
        import sys, torch
        from fastle.kernels.crop_resize import crop_resize
        images = torch.rand(4, 3, 32, 32, device="cuda")
        top, left = torch.tensor([0, 5, 28, 3], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        side = 5 if sys.argv[1] == "integers" else torch.full_like(top, 5)
        crop_resize(images, top.clamp(max=27), left, side, impl="triton")
        torch.cuda.synchronize()
        print("within", flush=True)
        crop_resize(images, top, left, side, impl="triton")
        torch.cuda.synchronize()
        print("beyond", flush=True)
    """
    done = views.run_alone(script, sizes, check=False)
    assert done.stdout.split() == ["within"] and done.returncode != 0
    assert "assert" in done.stderr
