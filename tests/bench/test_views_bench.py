"""The benchmark of views: its oracle and peers are right, wrong views have no times, a shape is what its text says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from bench import views_bench
from bench.common import peers
from bench.common.measure import DTYPES, relative_error
from bench.common.peers import Tensors, align_corners_regions
from bench.views_bench import ViewBatch, ViewShape, bytes_to_move, exact, main, make_batch, make_sides, pick_cases
from tests.bench.bench_cases import check_bad_input, check_refused, check_report, check_shown, run_tiny

CPU = torch.device("cpu")
SHAPES = ("crop:2x3x2x12x10:5x4:6x8", "hole:2x3x2x12x10:5", "pixels:2x3x2x8x8:0.5")
CROPS = ["fastle", "grid_sample", "grid_sample compiled", "roi_align", "roi_align compiled"]


def test_report_and_what_is_shown_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_tiny(main, tmp_path, "--shapes", *SHAPES[1:], SHAPES[0])
    check_report(report, "views", CROPS)
    assert [(row["shape"], row["pass"]) for row in report["rows"][::5]] == [(SHAPES[1], "forward"), (SHAPES[0], "both")]
    row = report["rows"][-1]
    sizes = {"operator": "crop", "views": 2, "images": [3, 2, 12, 10], "amount": [5, 4], "out": [6, 8]}
    assert (sizes | {"dtype": "fp32", "layout": "contiguous"}).items() <= row.items()
    # 2 views of 3 · 2 channels: boxes, results, gradients to both
    assert row["traffic_bytes"] == 4 * 2 * 3 * 2 * (5 * 4 + 2 * 6 * 8 + 12 * 10)
    for row in report["rows"]:
        for side in row["sides"].values():
            assert 0 <= side["value_error"] < 1e-5 and side["peak_bytes"] > 0
            assert ("gradient_error" in side) == (row["pass"] == "both") and side.get("gradient_error", 0) < 1e-5
    row["copy_gb_per_s"] = 8e-6 * row["traffic_bytes"]
    row["sides"]["fastle"]["ms"] = {"p20": 0.2, "p50": 0.25, "p80": 0.3, "repeats": 2}
    shown = check_shown(main, report, tmp_path, capsys)
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("fastle ") and " 0.2–0.3 " in line]
    assert line.split()[-1] == "50%"


def off_by_one(crops: Tensors) -> Tensors:
    return tuple(crop.roll(1, dims=-1) for crop in crops)


def wrong_gradient(crops: Tensors) -> Tensors:
    # its value is right
    return tuple(crop + 1e-3 * (crop - crop.detach()) for crop in crops)


def channel_kept(crops: Tensors) -> Tensors:
    return tuple(torch.cat((crop[:, :1], crop[:, 1:].abs() + 0.5), dim=1) for crop in crops)


@pytest.mark.parametrize(
    ("shape", "side", "change", "reason"),
    [
        (SHAPES[0], "our_crops", off_by_one, "fastle: value error"),
        (SHAPES[1], "our_holes", wrong_gradient, "fastle: gradient error 1.0e-03 is over 1e-05"),
        (SHAPES[2], "our_masks", channel_kept, "fastle: value error"),
    ],
    ids=["crop", "hole", "mask"],
)
def test_wrong_views_have_no_times(
    shape: str,
    side: str,
    change: Callable[[Tensors], Tensors],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = getattr(views_bench, side)
    monkeypatch.setattr(views_bench, side, lambda *args, **flags: change(right(*args, **flags)))
    report = run_tiny(main, tmp_path, "--shapes", shape, status=1)
    check_refused(report, reason, capsys.readouterr().out)


def a_batch(text: str, dtype: str = "fp32", layout: str = "contiguous") -> tuple[ViewShape, ViewBatch]:
    shape = ViewShape.parse(text)
    return shape, make_batch(shape, dtype, layout, torch.Generator().manual_seed(3), CPU)


def test_a_mask_of_the_wrong_count_is_wrong() -> None:
    shape, batch = a_batch("pixels:3x2x8x8:0.5")
    for ratio, right in ((0.5, True), (0.48, False), (0.53, False)):
        values = peers.eager_masks(batch.images, batch.top, batch.left, ratio=ratio)
        assert (relative_error(values, exact(shape, batch, (values,))[0]) == 0) == right


BOXES = ["crop:9x2x12x10:5x4:6x8", "crop:9x2x12x10:12x10:5", "crop:9x2x12x10:1:7x3", "crop:9x2x12x10:9x2:1x4"]


@pytest.mark.parametrize("text", BOXES)
def test_crops_are_interpolations_with_aligned_corners(text: str) -> None:
    """The oracle's and, with the regions of `align_corners_regions`, roi_align's, with their gradients."""
    shape, batch = a_batch(text)
    assert not isinstance(shape.amount, float)
    rows, columns = shape.amount
    # boxes at every border
    batch.top[:2], batch.left[:2] = torch.tensor([0, 12 - rows]), torch.tensor([10 - columns, 0])
    images = batch.images[0].detach().double().requires_grad_()
    boxes = [
        F.interpolate(image[None, :, t : t + rows, le : le + columns], shape.out, mode="bilinear", align_corners=True)
        for image, t, le in zip(images, batch.top.tolist(), batch.left.tolist(), strict=True)
    ]
    regions = align_corners_regions(batch.top.double(), batch.left.double(), shape.amount, shape.out)
    aligned = roi_align(images, regions, shape.out, sampling_ratio=1, aligned=True)
    values, gradients = exact(shape, batch, (batch.images, batch.images))
    for crops in (torch.cat(boxes), aligned):
        torch.testing.assert_close(crops.detach(), values[0], rtol=0, atol=1e-13)
        (gradient,) = torch.autograd.grad(crops, images, batch.cotangents[0].double())
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize(("dtype", "layout"), [("fp32", "contiguous"), ("bf16", "channels-last")])
def test_every_side_of_every_kind_of_image(text: str, dtype: str, layout: str) -> None:
    shape, batch = a_batch(text, dtype, layout)
    limit = 1e-5 if dtype == "fp32" else 8e-3
    for name, views in make_sides(shape).items():
        result = views_bench.forward_backward(views, batch)
        assert all(value.dtype == DTYPES[dtype] for value in (*result[0], *result[1]))
        pairs = zip(result, exact(shape, batch, result), strict=True)
        assert all(relative_error(got, wanted) < limit for got, wanted in pairs), name


def test_shapes_are_what_their_texts_say() -> None:
    shape = ViewShape.parse("crop:3x16x1x96x128:48x80:64x96")
    assert shape == ViewShape("crop", 3, (16, 1, 96, 128), (48, 80), (64, 96))
    assert ViewShape.parse("crop:16x3x96x128:19") == ViewShape("crop", 1, (16, 3, 96, 128), (19, 19), (96, 128))
    assert ViewShape.parse("pixels:16x3x32x32:0.7").amount == 0.7
    for text in (*SHAPES, str(shape)):
        assert str(ViewShape.parse(text)) == text


def test_bytes_by_hand() -> None:
    crop = ViewShape.parse("crop:3x16x3x96x128:19")
    assert bytes_to_move(crop, 4, backward=False) == 4 * 3 * 48 * (19 * 19 + 96 * 128)
    assert bytes_to_move(crop, 2, backward=True) == 2 * 3 * 48 * (19 * 19 + 3 * 96 * 128)
    for text in ("hole:16x3x96x128:19", "pixels:16x3x96x128:0.7"):
        assert bytes_to_move(ViewShape.parse(text), 4, backward=False) == 4 * 48 * 2 * 96 * 128
        assert bytes_to_move(ViewShape.parse(text), 4, backward=True) == 4 * 48 * 4 * 96 * 128


def test_what_is_measured_by_default() -> None:
    def cases(device: str, **flags: Any) -> list[tuple[Any, ...]]:
        flags = {"shapes": None, "quick": False, "dtype": None, "layout": None} | flags
        return [case.args for case in pick_cases(argparse.Namespace(**flags), torch.device(device))]  # type: ignore[attr-defined]

    first = ViewShape.parse("crop:3x128x3x128x128:19")
    picked = cases("cuda")
    # the first shape in all kinds, the others in one, each forward and forward + backward
    assert [case[0] for case in picked[:8]] == 8 * [first] and len({case[1:3] for case in picked[:8]}) == 4
    assert {case[1:3] for case in picked[8:]} == {("fp32", "contiguous")}
    assert [case[0] for case in cases("cpu", quick=True)[::2]] == views_bench.HEADLINE["cpu"]
    assert {case[2] for case in cases("cpu", layout="channels-last")} == {"channels-last"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes crop:16x3x128x128", "argument --shapes: 'crop:16x3x128x128' is no shape: give crop:BxCxHxW:SIDE, "),
        ("--shapes crop:1x3x8x6:7", "argument --shapes: 'crop:1x3x8x6:7': 7 does not fit the images; give a side, or"),
        ("--shapes hole:1x3x8x6:0.5", "argument --shapes: 'hole:1x3x8x6:0.5': 0.5 does not fit the images"),
        ("--shapes hole:1x3x8x6:2:4", "argument --shapes: 'hole:1x3x8x6:2:4': only a crop has an output size"),
        ("--shapes pixels:1x3x8x6:7", "argument --shapes: 'pixels:1x3x8x6:7': 7 is no ratio; give a number from 0"),
        ("--layout nhwc", "argument --layout: invalid choice: 'nhwc'"),
    ],
)
def test_bad_input_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bad_input(main, arguments, expected, capsys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    shapes = ["crop:3x8x3x64x64:19", "hole:8x3x64x64:30", "pixels:8x3x64x64:0.7"]
    report = run_tiny(main, tmp_path, "--dtype", dtype, "--shapes", *shapes, device="cuda")
    for row in report["rows"]:
        for name in ("fastle", "eager" if "eager" in row["sides"] else "grid_sample"):
            side = row["sides"][name]
            assert "graph_note" not in side and side["graph_ms"]["p50"] > 0 and side["peak_bytes"] > 0
