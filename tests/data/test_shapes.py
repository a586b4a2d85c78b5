"""Shapes: how many, always the same, wholly inside, and of three kinds in many sizes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastle.data.shapes import make_shapes
from fastle.folders import SPLITS


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    images = make_shapes("train", 28)
    return images.batch(range(len(images)))


def test_shapes_are_always_the_same() -> None:
    """Results are compared across machines and versions, so the images must not change by accident."""
    images = make_shapes("test", 28).batch(range(2000)).contiguous().numpy()
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "0558a0c0610304cf"


def test_shape_dtype_and_grey_values(train: torch.Tensor) -> None:
    assert train.shape == (12_000, 1, 28, 28)
    assert train.dtype == torch.uint8
    brightest = train.amax((1, 2, 3)).double() / 255
    # 0.3 to 1, uniformly
    assert brightest.min() >= 0.3
    assert brightest.max() == 1
    assert abs(brightest.mean() - 0.65) < 0.01
    assert abs(brightest.std() - 0.7 / 12**0.5) < 0.01


@pytest.mark.parametrize("size", [8, 33])
def test_every_shape_is_wholly_inside_the_image(size: int) -> None:
    images = make_shapes("valid", size).batch(range(1000))
    assert images.shape == (1000, 1, size, size)
    for border in (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]):
        assert border.max() == 0
    assert images.amax((1, 2, 3)).min() > 0


def test_discs_rings_and_rectangles_come_equally_often_in_many_sizes(train: torch.Tensor) -> None:
    """A disc covers π/4 of its bounding box, a rectangle all of it; a ring has a dark centre."""
    lit = train[:, 0].numpy() / train.amax((1, 2, 3)).numpy()[:, None, None]
    rows, columns = (lit > 0.5).any(2), (lit > 0.5).any(1)
    box = rows.sum(1) * columns.sum(1)
    cover = lit.sum((1, 2)) / box
    top, left = rows.argmax(1), columns.argmax(1)
    middle = lit[np.arange(len(lit)), top + rows.sum(1) // 2, left + columns.sum(1) // 2]
    ring = middle < 0.5
    rectangle = ~ring & (cover > 0.88)
    for kind in (ring, rectangle, ~ring & ~rectangle):
        assert abs(kind.mean() - 1 / 3) < 0.03
        assert len(set(box[kind].tolist())) > 10


def test_splits_share_no_image() -> None:
    splits = [make_shapes(split, 28) for split in SPLITS]
    assert [len(split) for split in splits] == [12_000, 1_000, 2_000]
    images = torch.cat([split.batch(range(1000)) for split in splits])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_another_size_shows_the_same_shapes() -> None:
    small, large = (make_shapes("valid", size).batch(range(50)).double() for size in (32, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    # the black pixel at the border is a pixel at any size, so places differ by up to one
    assert torch.nn.functional.l1_loss(small, shrunk) < 8
