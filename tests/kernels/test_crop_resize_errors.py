"""What kernels.crop_resize does not take, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.crop_resize import crop_resize
from tests.kernels import views
from tests.kernels.crop_resize_cases import Out
from tests.kernels.views import DEVICE, every_bad_image, every_impl, made


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
