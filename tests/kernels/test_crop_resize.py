"""kernels.crop_resize against the reference and the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels import reference
from fastle.kernels.crop_resize import crop_resize, interpolation_matrix
from tests import oracle


def made(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def corners(batch: int, height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """The four extreme corners first, then random ones."""
    generator = Generator().manual_seed(1)
    top = torch.randint(height - side + 1, (batch,), generator=generator)
    left = torch.randint(width - side + 1, (batch,), generator=generator)
    extreme = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side)]
    for b, (y, x) in enumerate(extreme[:batch]):
        top[b], left[b] = y, x
    return top, left


# batch, channels, height, width, side
SHAPES = [
    (1, 1, 1, 1, 1),
    (4, 3, 8, 8, 3),
    (5, 1, 9, 7, 1),
    (5, 2, 6, 11, 2),
    (6, 5, 13, 6, 5),
    (4, 3, 7, 7, 7),
    (4, 2, 5, 9, 5),
    (2, 1, 1, 6, 1),
    (4, 1, 28, 28, 19),
]


@pytest.mark.parametrize(
    ("b", "c", "h", "w", "side"), SHAPES, ids=[f"B{b}-C{c}-{h}x{w}-side{side}" for b, c, h, w, side in SHAPES]
)
def test_equals_the_formula(b: int, c: int, h: int, w: int, side: int) -> None:
    images, (top, left) = made(b, c, h, w), corners(b, h, w, side)
    expected = oracle.resize_crops(images, top, left, side)
    for ours in (crop_resize, reference.crop_resize):
        found = ours(images, top, left, side)
        assert found.shape == images.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=["square", "ragged"])
def test_corners_are_aligned(size: tuple[int, int]) -> None:
    images = made(4, 3, *size)
    side = 4
    top, left = corners(4, *size, side)
    found = crop_resize(images, top, left, side)
    for b in range(4):
        y, x = int(top[b]), int(left[b])
        torch.testing.assert_close(found[b, :, 0, 0], images[b, :, y, x])
        torch.testing.assert_close(found[b, :, -1, -1], images[b, :, y + side - 1, x + side - 1])
        torch.testing.assert_close(found[b, :, 0, -1], images[b, :, y, x + side - 1])


def test_whole_image_is_itself() -> None:
    images = made(3, 2, 12, 12)
    zero = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(crop_resize(images, zero, zero, 12), images, rtol=1e-13, atol=1e-13)


def test_one_pixel_fills_the_image() -> None:
    images = made(4, 3, 6, 9)
    top, left = corners(4, 6, 9, 1)
    found = crop_resize(images, top, left, 1)
    for b in range(4):
        assert torch.equal(found[b], images[b, :, top[b], left[b], None, None].expand(3, 6, 9))


@pytest.mark.parametrize(("side", "out"), [(1, 1), (1, 7), (2, 7), (19, 128), (7, 7), (5, 3), (9, 32)])
def test_interpolation_weights_sum_to_one(side: int, out: int) -> None:
    weights = interpolation_matrix(side, out, torch.zeros(1, dtype=torch.float32))
    assert weights.shape == (out, side) and weights.dtype == torch.float32
    assert float(weights.min()) >= 0 and ((weights > 0).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(out), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    images, (top, left) = made(4, 3, 32, 32, dtype=dtype), corners(4, 32, 32, 9)
    expected = oracle.resize_crops(images.double(), top, left, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = crop_resize(images, top, left, 9)
    assert found.dtype == dtype
    # one rounding of a value of at most 1 on the way out, and fp32's along the way
    rounding = 2e-6 + torch.finfo(dtype).eps / 2
    assert float((found.double() - expected).abs().max()) <= rounding


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_corners_of_any_integer_type(dtype: torch.dtype) -> None:
    images, (top, left) = made(4, 3, 8, 8), corners(4, 8, 8, 3)
    found = crop_resize(images, top.to(dtype), left.to(dtype), 3)
    torch.testing.assert_close(found, crop_resize(images, top, left, 3))


def test_channels_last_images() -> None:
    images, (top, left) = made(4, 3, 8, 10), corners(4, 8, 10, 3)
    found = crop_resize(images.to(memory_format=torch.channels_last), top, left, 3)
    torch.testing.assert_close(found, crop_resize(images, top, left, 3))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_gradient(side: int) -> None:
    images, (top, left) = made(4, 2, 5, 7).requires_grad_(), corners(4, 5, 7, side)
    assert torch.autograd.gradcheck(lambda x: crop_resize(x, top, left, side), images)
    weight = torch.randn(images.shape, generator=Generator().manual_seed(3), dtype=torch.float64)
    (ours,) = torch.autograd.grad((crop_resize(images, top, left, side) * weight).sum(), images)
    (wanted,) = torch.autograd.grad((oracle.resize_crops(images, top, left, side) * weight).sum(), images)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)
    # nothing outside the box is seen
    outside = torch.ones_like(images, dtype=torch.bool)
    for b in range(4):
        outside[b, :, top[b] : top[b] + side, left[b] : left[b] + side] = False
    assert not ours[outside].any()


@pytest.mark.parametrize("side", [1, 3, 6])
def test_nan_outside_the_box_is_not_read(side: int) -> None:
    images, (top, left) = made(4, 2, 6, 9), corners(4, 6, 9, side)
    expected = crop_resize(images, top, left, side)
    fenced = torch.full_like(images, float("nan"))
    for b in range(4):
        rows, columns = slice(int(top[b]), int(top[b]) + side), slice(int(left[b]), int(left[b]) + side)
        fenced[b, :, rows, columns] = images[b, :, rows, columns]
    assert torch.equal(crop_resize(fenced, top, left, side), expected)


def test_nan_stays_in_its_own_image_and_channel() -> None:
    images, (top, left) = made(3, 2, 6, 6), corners(3, 6, 6, 4)
    expected = crop_resize(images, top, left, 4)
    images[1, 0] = float("nan")
    found = crop_resize(images, top, left, 4)
    assert found[1, 0].isnan().all()
    assert torch.equal(found[1, 1], expected[1, 1]) and torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("side", [-1, 0, 6, 9])
def test_side_out_of_range(side: int) -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"side {side}"):
        crop_resize(made(2, 1, 5, 8), zero, zero, side)
