"""The transformations and the input hole: what is drawn, and what it makes of an image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import (
    CropResizeConfig,
    DetailConfig,
    IdentityConfig,
    MaskConfig,
    MaskKind,
    NoiseConfig,
    TransformConfig,
)
from fastle.kernels.crop_resize import crop_resize
from fastle.method.transforms import (
    Boxes,
    CropResize,
    Shape,
    Transform,
    ViewDraw,
    box_blur,
    box_size,
    cut_hole,
    draw_boxes,
    hole_mask,
    hole_side,
    make_transform,
    sobel_magnitude,
    to_grey,
)
from tests import oracle

# every transformation, and crop-resize with its other settings
TRANSFORMS: dict[str, TransformConfig] = {
    "crop-resize": CropResizeConfig(0.45),
    "pixel-mask": MaskConfig("pixel", 0.7),
    "patch-mask": MaskConfig("patch", 0.7),
    "channel-mask": MaskConfig("channel", 0.3),
    "noise": NoiseConfig(0.2),
    "identity": IdentityConfig(),
    "detail": DetailConfig(),
    "crops": CropResizeConfig(0.45, crops=2),
    "varying-crop": CropResizeConfig(0.2, 1.0),
    "varying-crops": CropResizeConfig(0.2, 0.9, 3),
    "blur-views": CropResizeConfig(0.45, crops=2, blur_views=(1, 3, 7)),
}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def mask_of(transform: Transform, shape: Shape, seed: int = 0) -> Tensor:
    """(B, C, H, W) bool, True where kept, as the view of white images shows it."""
    ((view,),) = transform.views([torch.ones(shape)], transform.draw(shape, seeded(seed)))
    assert ((view == 0) | (view == 1)).all()
    return view == 1


def flat(drawn: ViewDraw) -> Tensor:
    if isinstance(drawn, tuple):
        return torch.cat([flat(boxes) for boxes in drawn])
    if isinstance(drawn, Boxes):
        return torch.cat((drawn.top, drawn.left, *([] if drawn.side is None else [drawn.side[None]])))
    return torch.zeros(()) if drawn is None else drawn


def assert_distributed(counts: Tensor, weights: Tensor) -> None:
    """Counts of independent draws are what `weights` lets expect, by their χ², and every value is drawn."""
    assert int(counts.min()) > 0, "a value is never drawn"
    expected = counts.sum() * weights.double() / weights.double().sum()
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert chi_squared <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(8, 8, 3), (6, 9, 2), (9, 6, 6), (5, 5, 5), (4, 7, 1)],
    ids=str,
)
def test_corners_are_uniform_over_all_positions(height: int, width: int, side: int) -> None:
    batch, box = 20_000, box_size(side, (1, 1, height, width))
    boxes = draw_boxes((batch, 3, height, width), side, seeded(1))
    rows, columns = height - box[0] + 1, width - box[1] + 1
    assert boxes.top.shape == boxes.left.shape == (batch,)
    assert boxes.top.dtype == boxes.left.dtype == torch.int64
    counts = torch.bincount(boxes.top * columns + boxes.left, minlength=rows * columns)
    assert len(counts) == rows * columns and int(boxes.left.max()) < columns
    assert_distributed(counts, torch.ones(rows * columns))


@pytest.mark.parametrize(
    ("side", "size", "box"),
    [(19, (128, 128), (19, 19)), (14, (96, 128), (14, 19)), (14, (128, 96), (19, 14)), (1, (8, 24), (1, 3)),
     (96, (96, 128), (96, 128)), (5, (10, 21), (5, 11))],
)  # fmt: skip
def test_boxes_have_the_proportions_of_the_images(side: int, size: tuple[int, int], box: tuple[int, int]) -> None:
    shape = (2, 3, *size)
    assert box_size(side, shape) == box
    assert tuple(map(int, box_size(torch.tensor(side), shape))) == box


def test_default_draws_are_what_they_were() -> None:
    # a run that was begun by an earlier version goes on with its numbers
    crop, shape, generator = make_transform(CropResizeConfig(0.15)), (4, 3, 128, 128), seeded(2)
    view, hole = crop.draw(shape, generator), draw_boxes(shape, hole_side(0.35, shape), generator)
    assert isinstance(view, Boxes)
    assert (view.top.tolist(), view.left.tolist()) == ([58, 107, 71, 54], [88, 79, 32, 75])
    assert (hole.top.tolist(), hole.left.tolist()) == ([25, 14, 4, 45], [44, 41, 10, 25])
    assert view.side is None and hole.side is None


@pytest.mark.parametrize(
    ("ratio", "ratio_max", "extent", "sides"),
    [(0.1, 1.0, 32, (3, 32)), (0.15, 0.5, 128, (19, 64)), (0.05, 1.0, 24, (1, 24)), (0.3, 0.31, 32, (9, 9))],
    ids=["whole", "half", "pixel", "one-side"],
)
def test_sides_are_log_uniform_with_both_ends(
    ratio: float, ratio_max: float, extent: int, sides: tuple[int, int]
) -> None:
    crop, generator = CropResize(ratio, ratio_max), seeded(20)
    drawn = []
    for _ in range(10_000):
        boxes = crop.draw((1, 1, extent + 7, extent), generator)
        assert isinstance(boxes, Boxes) and boxes.side is not None
        drawn.append(boxes.side)
    assert drawn[0].shape == () and drawn[0].dtype == torch.int64
    least, most = sides
    counts = torch.bincount(torch.stack(drawn))
    assert len(counts) == most + 1 and not counts[:least].any()
    whole = torch.arange(least, most + 1).double()
    assert_distributed(counts[least:], ((whole + 1) / whole).log())


@pytest.mark.parametrize("size", [(6, 9), (9, 6), (5, 5)], ids=str)
def test_corners_of_every_drawn_side_are_uniform_over_all_positions(size: tuple[int, int]) -> None:
    crop, generator, found = CropResize(0.2, 1.0), seeded(21), dict[int, list[Boxes]]()
    for _ in range(80):
        boxes = crop.draw((2000, 1, *size), generator)
        assert isinstance(boxes, Boxes) and boxes.side is not None
        assert boxes.top.shape == boxes.left.shape == (2000,)
        assert boxes.top.dtype == boxes.left.dtype == torch.int64
        found.setdefault(int(boxes.side), []).append(boxes)
    assert sorted(found) == list(range(1, min(size) + 1))
    for side, several in found.items():
        top, left = torch.cat([boxes.top for boxes in several]), torch.cat([boxes.left for boxes in several])
        rows, columns = (extent - n + 1 for extent, n in zip(size, box_size(side, (1, 1, *size)), strict=True))
        assert int(top.min()) == int(left.min()) == 0
        assert int(top.max()) == rows - 1 and int(left.max()) == columns - 1
        assert_distributed(torch.bincount(top * columns + left, minlength=rows * columns), torch.ones(rows * columns))


def test_every_crop_has_its_own_boxes_and_side() -> None:
    shape = (50, 3, 32, 32)
    fixed = CropResize(0.3, crops=3).draw(shape, seeded(22))
    assert isinstance(fixed, tuple) and len(fixed) == 3 and all(boxes.side is None for boxes in fixed)
    assert torch.equal(flat(fixed[0]), flat(CropResize(0.3).draw(shape, seeded(22))))
    varying = CropResize(0.1, 1.0, crops=3).draw(shape, seeded(23))
    assert isinstance(varying, tuple)
    assert len({int(boxes.side) for boxes in varying if boxes.side is not None}) > 1
    for crops in (fixed, varying):
        assert not torch.equal(crops[0].top, crops[1].top) and not torch.equal(crops[1].left, crops[2].left)


@pytest.mark.parametrize("name", ["crops", "varying-crop", "varying-crops"])
def test_crops_are_those_of_each_image_by_itself(name: str) -> None:
    made, shape = make_transform(TRANSFORMS[name]), (5, 3, 16, 20)
    assert isinstance(made, CropResize)
    x, xhat = (torch.rand(shape, generator=seeded(seed)) for seed in (25, 26))
    for seed in range(8):
        drawn = made.draw(shape, seeded(seed))
        views = made.views([x, xhat], drawn)
        assert [len(crops) for crops in views] == [made.crops, made.crops]
        for image, crops in zip((x, xhat), views, strict=True):
            for view, boxes in zip(crops, drawn if isinstance(drawn, tuple) else (drawn,), strict=True):
                box = box_size(made.side(shape) if boxes.side is None else int(boxes.side), shape)
                for b in range(shape[0]):
                    alone = crop_resize(image[b : b + 1], boxes.top[b : b + 1], boxes.left[b : b + 1], *box)
                    torch.testing.assert_close(view[b : b + 1], alone, rtol=1e-6, atol=1e-6)


def test_crop_of_the_greatest_side_is_the_whole_image() -> None:
    crop, images = CropResize(0.1, 1.0), torch.rand(3, 3, 16, 16, generator=seeded(27))
    whole = Boxes(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.tensor(16))
    ((view,),) = crop.views([images], whole)
    torch.testing.assert_close(view, images, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "size", "side"),
    [
        (0.15, (128, 128), 19),
        (0.3, (32, 32), 9),
        (0.05, (32, 32), 1),
        (1.0, (32, 32), 32),
        (0.5, (10, 21), 5),
        (1.0, (16, 24), 16),
    ],
    ids=["celeba", "cifar10", "cifar10-least", "whole", "ragged", "whole-oblong"],
)
def test_crop_side(ratio: float, size: tuple[int, int], side: int) -> None:
    crop = make_transform(CropResizeConfig(ratio))
    assert isinstance(crop, CropResize)
    assert crop.side((2, 3, *size)) == side
    boxes = crop.draw((500, 3, *size), seeded(0))
    assert isinstance(boxes, Boxes) and boxes.side is None
    height, width = box_size(side, (2, 3, *size))
    assert int(boxes.top.max()) == size[0] - height and int(boxes.left.max()) == size[1] - width
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
    assert (inside.sum((1, 2, 3)) == math.prod(box_size(hole_side(0.35, shape), shape))).all()
    assert torch.equal(holed[~inside.expand_as(holed)], images[~inside.expand_as(holed)])
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(holed[inside.expand_as(holed)], means[inside.expand_as(holed)])
    torch.testing.assert_close(holed, oracle.cut_hole(images, boxes, 0.35), rtol=1e-14, atol=0)


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize(("kind", "patch"), [("pixel", 1), ("patch", 4)], ids=["pixel", "patch"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "ragged"])
def test_masks_cover_an_exact_share(kind: MaskKind, patch: int, ratio: float, size: tuple[int, int]) -> None:
    keep = mask_of(make_transform(MaskConfig(kind, ratio)), (7, 3, *size))
    assert torch.equal(keep, keep[:, :1].expand_as(keep))
    keep = keep[:, :1]
    whole = size[0] * size[1] // patch**2
    assert ((~keep).sum((1, 2, 3)) == int(ratio * whole) * patch**2).all()
    # a patch is masked whole or not at all
    tiles = keep.view(7, size[0] // patch, patch, size[1] // patch, patch).float().mean((2, 4))
    assert ((tiles == 0) | (tiles == 1)).all()


@pytest.mark.parametrize("kind", ["pixel", "patch"])
def test_every_pixel_is_masked_equally_often(kind: MaskKind) -> None:
    batch = 4000
    keep = mask_of(make_transform(MaskConfig(kind, 0.5)), (batch, 1, 8, 8)).float()
    share = keep.mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(batch)
    assert not torch.equal(keep[0], keep[1])


def test_channel_mask_is_bernoulli_by_channel() -> None:
    batch = 20_000
    keep = mask_of(make_transform(MaskConfig("channel", 0.3)), (batch, 3, 8, 8))
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
    noise = make_transform(NoiseConfig(0.2))
    drawn = noise.draw((8, 3, 64, 64), seeded(4))
    assert isinstance(drawn, Tensor)
    spread = 0.2 / math.sqrt(drawn.numel())
    assert abs(float(drawn.mean())) < 5 * spread and abs(float(drawn.std()) - 0.2) < 5 * spread
    images = torch.ones(8, 3, 64, 64)
    ((view,),) = noise.views([images], drawn)
    assert torch.equal(view, images + drawn) and float(view.max()) > 1.5


@pytest.mark.parametrize("name", TRANSFORMS)
def test_draws_are_determined_by_the_generator(name: str) -> None:
    made = make_transform(TRANSFORMS[name])
    shape = (16, 3, 16, 16)
    generator = seeded(5)
    first, second = flat(made.draw(shape, generator)), flat(made.draw(shape, generator))
    assert torch.equal(first, flat(made.draw(shape, seeded(5))))
    random = name not in ("identity", "detail")
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
@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_equal_the_oracle(name: str, size: tuple[int, int], channels: int) -> None:
    config = TRANSFORMS[name]
    made = make_transform(config)
    images = torch.rand(4, channels, *size, generator=seeded(7), dtype=torch.float64)
    untouched = images.clone()
    draws = made.draw((4, channels, *size), seeded(8))
    (views,) = made.views([images], draws)
    expected = oracle.views(config, images, draws)
    assert made.full_view == (name == "detail")
    assert len(views) == len(expected) == {"detail": 5, "blur-views": 5}.get(name, getattr(config, "crops", 1))
    for view, wanted in zip(views, expected, strict=True):
        assert view.shape == images.shape and view.dtype == images.dtype
        torch.testing.assert_close(view, wanted, rtol=1e-11, atol=1e-12)
    assert torch.equal(images, untouched)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_draw_for_every_view_of_a_sample(name: str) -> None:
    # a pure function of image and draw: a batch of two copies gives the same view twice
    made = make_transform(TRANSFORMS[name])
    images = torch.rand(3, 3, 16, 16, generator=seeded(9))
    draws = made.draw((3, 3, 16, 16), seeded(10))
    for one, two in zip(*made.views([images, images.clone()], draws), strict=True):
        assert torch.equal(one, two)


def test_detail_views_lie_in_the_unit_range_and_fill_it() -> None:
    images = torch.rand(5, 3, 16, 16, generator=seeded(11))
    ((blur, colour, edges, texture, contrast),) = make_transform(DetailConfig()).views([images], None)
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
    (views,) = make_transform(DetailConfig()).views([images], None)
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
        make_transform(MaskConfig("patch", 0.7)).draw((2, 3, 16, 18), seeded(0))
