"""kernels.mask_fill against the reference and the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels import reference
from fastle.kernels.mask_fill import mask_fill, rectangle
from tests import oracle


def made(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def corners(batch: int, size: tuple[int, int], box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four extreme corners first, then random ones."""
    generator = Generator().manual_seed(1)
    bottom, right = size[0] - box[0], size[1] - box[1]
    top = torch.randint(bottom + 1, (batch,), generator=generator)
    left = torch.randint(right + 1, (batch,), generator=generator)
    for b, (y, x) in enumerate([(0, 0), (0, right), (bottom, 0), (bottom, right)][:batch]):
        top[b], left[b] = y, x
    return top, left


# batch, channels, height, width, then the rectangle's height and width
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (5, 3, 8, 8, 5, 5),
    (5, 1, 7, 11, 1, 1),
    (6, 5, 13, 6, 4, 6),
    (4, 2, 6, 9, 6, 2),
    (3, 3, 5, 7, 5, 7),
    (4, 2, 6, 5, 0, 3),
]


@pytest.mark.parametrize(
    ("b", "c", "h", "w", "bh", "bw"),
    SHAPES,
    ids=[f"B{b}-C{c}-{h}x{w}-box{bh}x{bw}" for b, c, h, w, bh, bw in SHAPES],
)
def test_equals_the_formula(b: int, c: int, h: int, w: int, bh: int, bw: int) -> None:
    images, (top, left) = made(b, c, h, w), corners(b, (h, w), (bh, bw))
    untouched = images.clone()
    expected = oracle.fill_rectangle(images, top, left, bh, bw)
    for ours in (mask_fill, reference.mask_fill):
        found = ours(images, top, left, bh, bw)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert torch.equal(images, untouched)
    inside = rectangle(top, left, bh, bw, (h, w))
    assert inside.shape == (b, 1, h, w) and inside.dtype == torch.bool
    assert (inside.sum((1, 2, 3)) == bh * bw).all()


def test_what_lies_outside_the_image_is_ignored() -> None:
    images = made(5, 2, 6, 8)
    top, left = torch.tensor([-2, 4, -1, 6, -9]), torch.tensor([-1, 6, 5, 0, 0])
    expected = oracle.fill_rectangle(images, top, left, 3, 4)
    torch.testing.assert_close(mask_fill(images, top, left, 3, 4), expected, rtol=1e-13, atol=0)
    inside = rectangle(top, left, 3, 4, (6, 8)).sum((1, 2, 3))
    assert inside.tolist() == [1 * 3, 2 * 2, 2 * 3, 0, 0]


def test_whole_image_becomes_its_mean() -> None:
    images = made(2, 3, 5, 7)
    zero = torch.zeros(2, dtype=torch.int64)
    found = mask_fill(images, zero, zero, 5, 7)
    torch.testing.assert_close(found, images.mean((2, 3), keepdim=True).expand_as(images), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_dtypes(dtype: torch.dtype) -> None:
    images, (top, left) = made(4, 3, 32, 32, dtype=dtype), corners(4, (32, 32), (19, 19))
    found = mask_fill(images, top, left, 19, 19)
    assert found.dtype == dtype
    expected = oracle.fill_rectangle(images.double(), top, left, 19, 19)
    # accumulated in fp32 whatever the images are: only the mean itself is rounded
    assert float((found.double() - expected).abs().max()) <= 1e-6 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("box", [(1, 1), (2, 3), (4, 5)], ids=["pixel", "part", "whole"])
def test_gradient(box: tuple[int, int]) -> None:
    images, (top, left) = made(4, 2, 4, 5).requires_grad_(), corners(4, (4, 5), box)
    assert torch.autograd.gradcheck(lambda x: mask_fill(x, top, left, *box), images)
    weight = torch.randn(images.shape, generator=Generator().manual_seed(3), dtype=torch.float64)
    (ours,) = torch.autograd.grad((mask_fill(images, top, left, *box) * weight).sum(), images)
    (wanted,) = torch.autograd.grad((oracle.fill_rectangle(images, top, left, *box) * weight).sum(), images)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


def test_nan_stays_in_its_own_image_and_channel() -> None:
    images, (top, left) = made(3, 2, 6, 6), corners(3, (6, 6), (3, 3))
    expected = mask_fill(images, top, left, 3, 3)
    images[1, 0, 5, 0] = float("nan")
    found = mask_fill(images, top, left, 3, 3)
    hole = rectangle(top, left, 3, 3, (6, 6))[1, 0]
    assert found[1, 0][hole].isnan().all()
    assert torch.equal(found[1, 1], expected[1, 1]) and torch.equal(found[::2], expected[::2])


def test_channels_last_images() -> None:
    images, (top, left) = made(4, 3, 8, 10), corners(4, (8, 10), (3, 3))
    found = mask_fill(images.to(memory_format=torch.channels_last), top, left, 3, 3)
    torch.testing.assert_close(found, mask_fill(images, top, left, 3, 3))
