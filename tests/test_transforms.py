"""The transformations and the input hole: what is drawn, and what it makes of an image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import ObjectiveConfig, TransformName
from fastle.transforms import (
    Boxes,
    CropResize,
    Shape,
    Transform,
    ViewDraw,
    box_blur,
    cut_hole,
    draw_boxes,
    hole_mask,
    hole_side,
    make_transform,
    sobel_magnitude,
    to_grey,
)
from tests import oracle

FIELDS: dict[TransformName, dict[str, float]] = {
    "crop-resize": {"crop_ratio": 0.45},
    "pixel-mask": {"mask_ratio": 0.7},
    "patch-mask": {"mask_ratio": 0.7},
    "channel-mask": {"mask_ratio": 0.3},
    "noise": {"noise_std": 0.2},
    "identity": {},
    "detail": {},
}


def row(transform: TransformName, **fields: float) -> ObjectiveConfig:
    return ObjectiveConfig(
        name="self-teaching", judge="step-frozen", transform=transform, sigreg_weight=0.03, slices=8,
        **(fields or FIELDS[transform]),
    )  # fmt: skip


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def mask_of(transform: Transform, shape: Shape, seed: int = 0) -> Tensor:
    """(B, C, H, W) bool, True where kept, as the view of white images shows it."""
    ((view,),) = transform.views([torch.ones(shape)], transform.draw(shape, seeded(seed)))
    assert ((view == 0) | (view == 1)).all()
    return view == 1


def flat(drawn: ViewDraw) -> Tensor:
    if isinstance(drawn, Boxes):
        return torch.stack((drawn.top, drawn.left))
    return torch.zeros(()) if drawn is None else drawn


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(8, 8, 3), (6, 9, 2), (9, 6, 6), (5, 5, 5), (4, 7, 1)],
    ids=str,
)
def test_corners_are_uniform_over_all_positions(height: int, width: int, side: int) -> None:
    batch = 20_000
    boxes = draw_boxes((batch, 3, height, width), side, seeded(1))
    rows, columns = height - side + 1, width - side + 1
    assert boxes.top.shape == boxes.left.shape == (batch,)
    assert boxes.top.dtype == boxes.left.dtype == torch.int64
    counts = torch.bincount(boxes.top * columns + boxes.left, minlength=rows * columns).double()
    assert len(counts) == rows * columns and int(boxes.left.max()) < columns
    assert int(counts.min()) > 0, "a position is never drawn"
    expected = batch / (rows * columns)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = rows * columns - 1
    assert chi_squared <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("ratio", "size", "side"),
    [(0.15, (128, 128), 19), (0.3, (32, 32), 9), (0.05, (32, 32), 1), (1.0, (32, 32), 32), (0.5, (10, 21), 5)],
    ids=["celeba", "cifar10", "cifar10-least", "whole", "ragged"],
)
def test_crop_side(ratio: float, size: tuple[int, int], side: int) -> None:
    crop = make_transform(row("crop-resize", crop_ratio=ratio))
    assert isinstance(crop, CropResize)
    assert crop.side((2, 3, *size)) == side
    boxes = crop.draw((500, 3, *size), seeded(0))
    assert int(boxes.top.max()) == size[0] - side and int(boxes.left.max()) <= size[1] - side
    assert int(boxes.top.min()) == int(boxes.left.min()) == 0


@pytest.mark.parametrize(
    ("ratio", "size", "side"),
    [(0.35, (128, 128), 76), (0.35, (32, 32), 19), (0.5, (128, 128), 91), (0.25, (10, 30), 5)],
    ids=["celeba", "cifar10", "half", "ragged"],
)
def test_hole_side(ratio: float, size: tuple[int, int], side: int) -> None:
    assert hole_side(ratio, (2, 3, *size)) == side == round(math.sqrt(ratio) * min(size))


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["square", "ragged"])
def test_hole_is_filled_with_the_mean_of_each_image_and_channel(size: tuple[int, int]) -> None:
    shape = (6, 3, *size)
    images = torch.rand(shape, generator=seeded(2), dtype=torch.float64)
    boxes = draw_boxes(shape, hole_side(0.35, shape), seeded(3))
    inside = hole_mask(shape, boxes, 0.35)
    holed = cut_hole(images, boxes, 0.35)
    assert inside.shape == (6, 1, *size) and inside.dtype == torch.bool
    assert (inside.sum((1, 2, 3)) == hole_side(0.35, shape) ** 2).all()
    assert torch.equal(holed[~inside.expand_as(holed)], images[~inside.expand_as(holed)])
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(holed[inside.expand_as(holed)], means[inside.expand_as(holed)])
    torch.testing.assert_close(holed, oracle.cut_hole(images, boxes, 0.35), rtol=1e-14, atol=0)


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize(("transform", "patch"), [("pixel-mask", 1), ("patch-mask", 4)], ids=["pixel", "patch"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "ragged"])
def test_masks_cover_an_exact_share(transform: TransformName, patch: int, ratio: float, size: tuple[int, int]) -> None:
    keep = mask_of(make_transform(row(transform, mask_ratio=ratio)), (7, 3, *size))
    assert torch.equal(keep, keep[:, :1].expand_as(keep))
    keep = keep[:, :1]
    whole = size[0] * size[1] // patch**2
    assert ((~keep).sum((1, 2, 3)) == int(ratio * whole) * patch**2).all()
    # a patch is masked whole or not at all
    tiles = keep.view(7, size[0] // patch, patch, size[1] // patch, patch).float().mean((2, 4))
    assert ((tiles == 0) | (tiles == 1)).all()


@pytest.mark.parametrize("transform", ["pixel-mask", "patch-mask"])
def test_every_pixel_is_masked_equally_often(transform: TransformName) -> None:
    batch = 4000
    keep = mask_of(make_transform(row(transform, mask_ratio=0.5)), (batch, 1, 8, 8)).float()
    share = keep.mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(batch)
    assert not torch.equal(keep[0], keep[1])


def test_channel_mask_is_bernoulli_by_channel() -> None:
    batch = 20_000
    keep = mask_of(make_transform(row("channel-mask", mask_ratio=0.3)), (batch, 3, 8, 8))
    assert torch.equal(keep, keep[:, :, :1, :1].expand_as(keep))
    keep = keep[:, :, :1, :1]
    flat_keep = keep.flatten(1).double()
    assert float((flat_keep.mean(0) - 0.7).abs().max()) < 5 * math.sqrt(0.21 / batch)
    # independent: all eight patterns, at their product probability
    pattern = (flat_keep * torch.tensor([1.0, 2.0, 4.0])).sum(1).long()
    kept = torch.tensor([bin(p).count("1") for p in range(8)]).double()
    expected = 0.7**kept * 0.3 ** (3 - kept)
    share = torch.bincount(pattern, minlength=8) / batch
    assert float(((share - expected).abs() / (expected * (1 - expected) / batch).sqrt()).max()) < 5


def test_noise_has_the_standard_deviation_asked_for_and_is_not_clamped() -> None:
    noise = make_transform(row("noise", noise_std=0.2))
    drawn = noise.draw((8, 3, 64, 64), seeded(4))
    assert isinstance(drawn, Tensor)
    spread = 0.2 / math.sqrt(drawn.numel())
    assert abs(float(drawn.mean())) < 5 * spread and abs(float(drawn.std()) - 0.2) < 5 * spread
    images = torch.ones(8, 3, 64, 64)
    ((view,),) = noise.views([images], drawn)
    assert torch.equal(view, images + drawn) and float(view.max()) > 1.5


@pytest.mark.parametrize("transform", list(FIELDS))
def test_draws_are_determined_by_the_generator(transform: TransformName) -> None:
    made = make_transform(row(transform))
    shape = (16, 3, 16, 16)
    generator = seeded(5)
    first, second = flat(made.draw(shape, generator)), flat(made.draw(shape, generator))
    assert torch.equal(first, flat(made.draw(shape, seeded(5))))
    random = transform not in ("identity", "detail")
    assert torch.equal(first, second) != random
    assert torch.equal(first, flat(made.draw(shape, seeded(6)))) != random
    # nothing comes from the global generator
    torch.manual_seed(0)
    flat(made.draw(shape, seeded(5)))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=["square", "ragged"])
@pytest.mark.parametrize("transform", list(FIELDS))
def test_views_equal_the_oracle(transform: TransformName, size: tuple[int, int], channels: int) -> None:
    config = row(transform)
    made = make_transform(config)
    images = torch.rand(4, channels, *size, generator=seeded(7), dtype=torch.float64)
    untouched = images.clone()
    draws = made.draw((4, channels, *size), seeded(8))
    (views,) = made.views([images], draws)
    expected = oracle.views(config, images, draws)
    assert made.full_view == (transform == "detail")
    assert len(views) == len(expected) == (5 if transform == "detail" else 1)
    for view, wanted in zip(views, expected, strict=True):
        assert view.shape == images.shape and view.dtype == images.dtype
        torch.testing.assert_close(view, wanted, rtol=1e-11, atol=1e-12)
    assert torch.equal(images, untouched)


@pytest.mark.parametrize("transform", list(FIELDS))
def test_one_draw_for_every_view_of_a_sample(transform: TransformName) -> None:
    # a pure function of image and draw: a batch of two copies gives the same view twice
    made = make_transform(row(transform))
    images = torch.rand(3, 3, 16, 16, generator=seeded(9))
    draws = made.draw((3, 3, 16, 16), seeded(10))
    for one, two in zip(*made.views([images, images.clone()], draws), strict=True):
        assert torch.equal(one, two)


def test_detail_views_lie_in_the_unit_range_and_fill_it() -> None:
    images = torch.rand(5, 3, 16, 16, generator=seeded(11))
    ((blur, colour, edges, texture, contrast),) = make_transform(row("detail")).views([images], None)
    for view in (blur, colour, edges, texture, contrast):
        assert float(view.min()) >= 0 and float(view.max()) <= 1
    # the maximum is each image's own
    for view in (edges, texture, contrast):
        torch.testing.assert_close(view.amax((1, 2, 3)), torch.ones(5))
    assert torch.equal(contrast.amin((1, 2, 3)), torch.zeros(5))
    for view in (edges, contrast):
        assert torch.equal(view[:, 0], view[:, 1])


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0], ids=["black", "grey", "white"])
def test_detail_of_a_flat_image_is_finite_with_its_gradient(value: float) -> None:
    images = torch.full((2, 3, 16, 16), value, requires_grad=True)
    (views,) = make_transform(row("detail")).views([images], None)
    (gradient,) = torch.autograd.grad(torch.stack([view.sum() for view in views]).sum(), images)
    assert all(view.isfinite().all() for view in views)
    assert gradient.isfinite().all()


def test_grey_blur_and_edges_by_hand() -> None:
    colours = torch.eye(3)[:, :, None, None]
    torch.testing.assert_close(to_grey(colours).flatten(), torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(to_grey(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)).flatten(), torch.tensor([1.5]))
    # a corner sees 3x3 of the 5x5 square, an edge 3x5
    spot = torch.zeros(1, 1, 8, 8)
    spot[0, 0, 0, 0] = 1
    blurred = box_blur(spot, 5)
    torch.testing.assert_close(blurred[0, 0, 0, :4], torch.tensor([1 / 9, 1 / 12, 1 / 15, 0.0]))
    # a ramp of slope 1 has gradient 8 inside and half of it at the repeated border
    ramp = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    torch.testing.assert_close(sobel_magnitude(ramp)[0, 0, 3], torch.tensor([4.0, 8, 8, 8, 8, 4]))
    torch.testing.assert_close(sobel_magnitude(ramp.mT)[0, 0, :, 3], torch.tensor([4.0, 8, 8, 8, 8, 4]))


def test_patches_must_tile_the_image() -> None:
    with pytest.raises(ValueError, match="do not tile"):
        make_transform(row("patch-mask")).draw((2, 3, 16, 18), seeded(0))
