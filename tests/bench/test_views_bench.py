"""The bench of views: its oracle and peers are right, wrong views have no times, and a shape is what its text says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench.measure import Effort, Result, Row
from bench.views_sides import Images, align_corners_regions, make_sides
from torchvision.ops import roi_align

from bench import harness, measure, views_bench, views_sides
from bench.views_bench import Batch, Shape, Task, bytes_to_move, exact, make_batch, pick_tasks

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--quick", "--shapes")
SHAPES = ("crop:2x3x2x12x10:5x4:6x8", "crop:3x2x12x12:5", "hole:2x3x2x12x10:5", "pixels:2x3x2x8x8:0.5")
PEERS = ["grid_sample", "roi_align", "kornia"]


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Two rounds a row, no compiler, a small copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "QUICK", Effort(seconds=0, rounds=2))
        patch.setattr(views_sides, "compiled", lambda views: views)
        patch.setattr(measure, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**16})
        measure.copy_bandwidth.cache_clear()
        yield
    measure.copy_bandwidth.cache_clear()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a shape of each kind, without kornia."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kornia", None)
        assert views_bench.main([*TINY, *SHAPES, "--json", str(path)]) == 0
    return path


def test_report(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["benchmark"] == "views"
    assert [(row["shape"], row["pass"]) for row in report["rows"]] == [
        (shape, passes) for shape in SHAPES for passes in ("forward", "both")
    ]
    row = report["rows"][1]
    sizes = {"operator": "crop", "views": 2, "images": [3, 2, 12, 10], "amount": [5, 4], "out": [6, 8]}
    assert (sizes | {"dtype": "fp32", "layout": "contiguous", "gates": [1e-6, 1e-5]}).items() <= row.items()
    assert list(row["sides"]) == ["fastle", *(name for peer in PEERS for name in (peer, f"{peer} compiled"))]
    # 2 views of 3 · 2 channels: boxes, results, gradients to both
    assert row["traffic_bytes"] == 4 * 2 * 3 * 2 * (5 * 4 + 2 * 6 * 8 + 12 * 10)
    milliseconds = row["sides"]["fastle"]["ms"]["p50"]
    assert row["gb_per_s"] == pytest.approx(row["traffic_bytes"] / milliseconds / 1e6)
    assert row["floor_fractions"]["copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
    assert row["floors_ms"]["copy"] == pytest.approx(row["traffic_bytes"] / row["copy_gb_per_s"] / 1e6)
    for row in report["rows"]:
        assert row["refused"] is None and len(row["gates"]) == (1 if row["pass"] == "forward" else 2)
        for name, side in row["sides"].items():
            if name.startswith("kornia"):
                assert side == {"status": "not installed", "note": "kornia is not installed"}
                continue
            assert side["status"] == "measured" and 0 <= side["value_error"] < 1e-5
            assert ("gradient_error" in side) == (row["pass"] == "both")
            assert side.get("gradient_error", 0) < 1e-5 and side["peak_bytes"] > 0 and side["ms"]["repeats"] == 2


def test_table_and_plot_are_made_from_the_report(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = report_file.with_name("plot.png")
    assert views_bench.main(["--from", str(report_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    shown = capsys.readouterr().out
    assert shown.count("kornia is not installed: no figures of kornia, kornia compiled") == 1
    lines = [line.strip() for line in shown.splitlines()]
    # a crop has so many peers that memory has its own table
    assert [sum(line.startswith(shape) for line in lines) for shape in SHAPES] == [4, 4, 2, 2]
    assert "GB/s" in shown and "copy" in shown and max(map(len, shown.splitlines())) <= 120


def test_widest_table_and_gaps(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU's figures, kornia's among them, and one row that is refused."""
    report = json.loads(report_file.read_text())
    report["environment"] |= {"device_type": "cuda", "peaks_known": False}
    report["rows"] = report["rows"][:4]
    for row in report["rows"]:
        row["shape"] = f"crop:3x{128 if row['views'] == 2 else 512}x3x128x128:19 bf16 NHWC"
        ours = row["sides"]["fastle"] | {"ms": {"p20": 0.0123, "p50": 0.0234, "p80": 0.0345, "repeats": 9}}
        for name in row["sides"]:
            row["sides"][name] = ours | {"graph_ms": ours["ms"]}
            for ratios in ("ratios", "memory_ratios", "graph_ratios"):
                row[ratios][name] = 0.6789
    report["rows"][3]["refused"] = "value is not finite"
    for side in report["rows"][3]["sides"].values():
        for key in ("ms", "graph_ms", "peak_bytes"):
            del side[key]
    path, picture = report_file.with_name("gpu.json"), report_file.with_name("gpu.png")
    path.write_text(json.dumps(report))
    assert views_bench.main(["--from", str(path), "--plot", str(picture)]) == 1
    assert picture.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "…" not in shown and "in CUDA graphs" in shown
    assert "crop:3x512x3x128x128:19 bf16 NHWC both: REFUSED, value is not finite: no times" in shown


def off_by_one(crops: Images) -> Images:
    return tuple(crop.roll(1, dims=-1) for crop in crops)


def wrong_gradient(crops: Images) -> Images:
    # of a right value
    return tuple(crop + 1e-3 * (crop - crop.detach()) for crop in crops)


def zeros_lost(crops: Images) -> Images:
    return tuple(crop + 0.01 for crop in crops)


def channel_kept(crops: Images) -> Images:
    return tuple(torch.cat((crop[:, :1], crop[:, 1:].abs() + 0.5), dim=1) for crop in crops)


WRONG = [
    ("crop", off_by_one, "value error"),
    ("crop", wrong_gradient, "gradient error 1.0e-03 is over 1e-05"),
    ("hole", off_by_one, "value error"),
    ("hole", wrong_gradient, "gradient error 1.0e-03 is over 1e-05"),
    ("pixels", zeros_lost, "value error"),
    ("pixels", channel_kept, "value error"),
    ("pixels", wrong_gradient, "gradient error 1.0e-03 is over 1e-05"),
]


@pytest.mark.parametrize(("operator", "change", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_wrong_views_have_no_times(
    operator: str,
    change: Callable[[Images], Images],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = {"crop": "our_crops", "hole": "our_holes", "pixels": "our_pixels"}[operator]
    right = getattr(views_sides, ours)
    monkeypatch.setattr(views_sides, ours, lambda *args, **flags: change(right(*args, **flags)))
    path = tmp_path / "report.json"
    (shape,) = (shape for shape in SHAPES[1:] if shape.startswith(operator))
    assert views_bench.main([*TINY, shape, "--json", str(path)]) == 1
    row = json.loads(path.read_text())["rows"][1]
    assert reason in row["refused"]
    assert not {"ms", "peak_bytes"} & {key for side in row["sides"].values() for key in side}
    shown = capsys.readouterr().out
    assert f"{shape} both: REFUSED, " in shown and reason in shown


def test_another_shape_is_never_right() -> None:
    one = torch.ones(1)
    assert torch.tensor(measure.relative_error([one], [one.expand(2)])).isnan()
    assert measure.relative_error([one, 2 * one], [one.double(), one.double()]) == 1


def test_a_mask_of_the_wrong_count_is_wrong() -> None:
    shape, batch = a_batch("pixels:3x2x8x8:0.5")
    for ratio, right in ((0.5, True), (0.48, False), (0.53, False)):
        values = views_sides.eager_pixels(batch.images, batch.top, batch.left, ratio=ratio)
        found = exact(shape, batch, backward=False)
        assert callable(found)
        assert (measure.relative_error(values, found((values,))[0]) == 0) == right


def a_batch(text: str, dtype: str = "fp32", layout: str = "contiguous") -> tuple[Shape, Batch]:
    shape = Shape.parse(text)
    return shape, make_batch(Task(shape, dtype, layout, backward=True), torch.Generator().manual_seed(3), CPU)


BOXES = ["crop:9x2x12x10:5x4:6x8", "crop:9x2x12x10:12x10:5", "crop:9x2x12x10:1:7x3", "crop:9x2x12x10:9x2:1x4"]


@pytest.mark.parametrize("text", BOXES)
def test_regions_put_the_samples_where_aligned_corners_are(text: str) -> None:
    shape, batch = a_batch(text)
    assert not isinstance(shape.amount, float)
    # boxes at every border
    batch.top[:2], batch.left[:2] = torch.tensor([0, 12 - shape.amount[0]]), torch.tensor([10 - shape.amount[1], 0])
    images = batch.images[0].detach().double().requires_grad_()
    regions = align_corners_regions(batch.top.double(), batch.left.double(), shape.amount, shape.out)
    value = roi_align(images, regions, shape.out, sampling_ratio=1, aligned=True)
    (gradient,) = torch.autograd.grad(value, images, batch.cotangents[0].double())
    ((expected,), (backward,)) = of(exact(shape, batch, backward=True))
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, backward, rtol=0, atol=1e-12)


def of(result: Result | Callable[[Result], Result]) -> Any:
    assert not callable(result)
    return result


@pytest.mark.parametrize("text", BOXES)
def test_oracle_of_crops_is_an_interpolation_with_aligned_corners(text: str) -> None:
    shape, batch = a_batch(text)
    assert not isinstance(shape.amount, float)
    rows, columns = shape.amount
    for sample, (image, top, left) in enumerate(
        zip(batch.images[0].detach().double(), batch.top, batch.left, strict=True)
    ):
        box = image[None, :, top : top + rows, left : left + columns]
        expected = F.interpolate(box, shape.out, mode="bilinear", align_corners=True)[0]
        ((found,),) = of(exact(shape, batch, backward=False))
        torch.testing.assert_close(found[sample], expected, rtol=0, atol=1e-13)


def test_oracle_of_holes_has_the_gradient_of_its_value() -> None:
    shape, batch = a_batch("hole:2x3x2x12x10:5")
    images = tuple(x.detach().double().requires_grad_() for x in batch.images)
    values = views_sides.eager_holes(images, batch.top, batch.left, hole=(5, 5))
    gradients = torch.autograd.grad(values, images, [g.double() for g in batch.cotangents])
    found = of(exact(shape, batch, backward=True))
    torch.testing.assert_close(list(found[0]), [value.detach() for value in values])
    torch.testing.assert_close(list(found[1]), list(gradients))


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_every_side_of_every_kind_of_image(text: str, dtype: str, layout: str) -> None:
    shape, batch = a_batch(text, dtype, layout)
    wanted = exact(shape, batch, backward=True)
    for name, views in make_sides(shape.operator, shape.amount, shape.out).items():
        if importlib.util.find_spec(views_sides.PACKAGES.get(name, "torch")) is None:
            continue
        result = views_bench._step(views, batch, backward=True)
        assert all(value.dtype == views_bench.DTYPES[dtype] for value in (*result[0], *result[1]))
        errors = measure._errors(result, wanted)
        limit = 1e-5 if dtype == "fp32" else 8e-3
        assert errors["value_error"] < limit and errors["gradient_error"] < limit, (name, errors)


def test_shapes_are_what_their_texts_say() -> None:
    shape = Shape.parse("crop:3x16x1x96x128:48x80:64x96")
    assert shape == Shape("crop", 3, (16, 1, 96, 128), (48, 80), (64, 96))
    assert Shape.parse("crop:16x3x96x128:19") == Shape("crop", 1, (16, 3, 96, 128), (19, 19), (96, 128))
    assert Shape.parse("pixels:16x3x32x32:0.7").amount == 0.7
    for text in (*SHAPES, str(shape)):
        assert str(Shape.parse(text)) == text


def test_bytes_by_hand() -> None:
    crop = Shape.parse("crop:3x16x3x96x128:19")
    assert bytes_to_move(crop, 4, backward=False) == 4 * 3 * 48 * (19 * 19 + 96 * 128)
    assert bytes_to_move(crop, 2, backward=True) == 2 * 3 * 48 * (19 * 19 + 3 * 96 * 128)
    for text in ("hole:16x3x96x128:19", "pixels:16x3x96x128:0.7"):
        assert bytes_to_move(Shape.parse(text), 4, backward=False) == 4 * 48 * 2 * 96 * 128
        assert bytes_to_move(Shape.parse(text), 4, backward=True) == 4 * 48 * 4 * 96 * 128


def test_copy_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Stopwatch, "time", lambda *_, **__: 0.5)
    assert measure.copy_bandwidth.__wrapped__(CPU) == pytest.approx(2 * 2**16 / 0.5e-3)


def test_what_is_measured_by_default() -> None:
    def tasks(device: str, **flags: Any) -> list[Task]:
        flags = {"shapes": None, "quick": False, "dtype": None, "layout": None} | flags
        return pick_tasks(argparse.Namespace(**flags), torch.device(device))

    first = Shape.parse("crop:3x128x3x128x128:19")
    found = tasks("cuda")
    # the first in all kinds, the others in one, each forward and forward + backward
    assert [t.shape for t in found[:8]] == 4 * 2 * [first] and len({(t.dtype, t.layout) for t in found[:8]}) == 4
    assert {(t.dtype, t.layout) for t in found[8:]} == {("fp32", "contiguous")}
    assert len(tasks("cuda", dtype="bf16", quick=True)) == 2 * (2 + 4)
    assert [t.shape for t in tasks("cpu", quick=True)] == [s for s in views_bench.HEADLINE["cpu"] for _ in range(2)]
    assert {t.layout for t in tasks("cpu", layout="channels-last")} == {"channels-last"}
    assert tasks("cuda", shapes=[first]) == [Task(first, "fp32", "contiguous", b) for b in (False, True)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes crop:16x3x128x128", "argument --shapes: 'crop:16x3x128x128' is no shape: give crop:BxCxHxW:SIDE, "),
        ("--shapes blur:16x3x8x8:3", "argument --shapes: 'blur:16x3x8x8:3' is no shape"),
        (
            "--shapes crop:1x3x8x6:7",
            "argument --shapes: 'crop:1x3x8x6:7': 7 does not fit the images; give a side, or rows",
        ),
        ("--shapes hole:1x3x8x6:0.5", "argument --shapes: 'hole:1x3x8x6:0.5': 0.5 does not fit the images"),
        ("--shapes hole:1x3x8x6:2:4", "argument --shapes: 'hole:1x3x8x6:2:4': only a crop has an output size"),
        ("--shapes pixels:1x3x8x6:7", "argument --shapes: 'pixels:1x3x8x6:7': 7 is no ratio; give a number from 0"),
        ("--dtype fp16", "argument --dtype: invalid choice: 'fp16'"),
        ("--layout nhwc", "argument --layout: invalid choice: 'nhwc'"),
        ("--from {tmp}/other.json", "--from {tmp}/other.json is no report of the views benchmark"),
        (
            "--from {tmp}/other.json --dtype fp32",
            "--dtype is for measuring, and --from {tmp}/other.json measures nothing",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"benchmark": "sigreg", "rows": [1]}')
    with pytest.raises(SystemExit) as stop:
        views_bench.main(arguments.format(tmp=tmp_path).split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"views_bench.py: error: {expected.format(tmp=tmp_path)}")


def test_graphs_of_several_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture's result is made of views, and a drawn mask is checked by what it shows."""
    case = views_bench.make_case(
        Task(Shape.parse("pixels:2x3x2x8x8:0.5"), "fp32", "contiguous", backward=True), argparse.Namespace(), CPU
    )
    sides: dict[str, Row] = {side.name: {"peak_bytes": 0} for side in case.sides}

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(measure, "_capture", lambda step, x: (Graph(), step(x)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    effort = Effort(seconds=0, rounds=2)
    assert measure._time_graphs(case, case.sides, sides, measure.Stopwatch(CPU), effort) is None
    assert all("graph_ms" in side for side in sides.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    shapes = ["crop:3x8x3x64x64:19", "hole:8x3x64x64:30", "pixels:8x3x64x64:0.7"]
    assert (
        views_bench.main(["--device", "cuda", "--quick", "--dtype", dtype, "--json", str(path), "--shapes", *shapes])
        == 0
    )
    rows: list[Row] = json.loads(path.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        for name in ("fastle", "eager" if "eager" in row["sides"] else "grid_sample"):
            side = row["sides"][name]
            assert "graph_note" not in side and side["graph_ms"]["p50"] > 0 and side["peak_bytes"] > 0
        assert row["floors_ms"]["copy"] > 0
