"""The bench of the loaders: its images are CelebA's size, wrong pixels have no times, its figures are right."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.loader_sides import (
    BATCH,
    FastleLoader,
    Loader,
    PilLoader,
    copy_celeba,
    disk_files,
    make_celeba,
    names,
    open_side,
    training_files,
)
from bench.measure import Effort, Row
from PIL import Image
from torch import Tensor

from bench import harness, loader_bench, loader_sides, loader_step
from bench.loader_bench import comparison, difference, rates, refusal
from fastle.data import Images
from fastle.data.images import ArrayImages
from fastle.errors import DataError

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--quick", "--images", "256")
SIDES = ["pil-0", "pil-2", "torchvision", "dali", "cache-disk", "cache-host"]


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Two rounds a row, one step a round, a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "QUICK", Effort(seconds=0, rounds=2))
        patch.setattr(loader_step, "STEPS", {"cpu": 1, "cuda": 1})
        patch.setattr(loader_step, "WARM_STEPS", 1)
        patch.setattr(loader_step, "CPU_BATCH", 2)
        yield


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "celeba"
    make_celeba(root, 2 * BATCH)
    return root


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    before = os.environ.get("XDG_CACHE_HOME")
    assert loader_bench.main([*TINY, "--json", str(path)]) == 0
    assert os.environ.get("XDG_CACHE_HOME") == before
    return path


def test_report(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["benchmark"] == "loader" and report["command"][0] == "loader_bench.py"
    loading, step = report["rows"]
    for row in (loading, step):
        assert row["refused"] is None and row["images"] == 256 and row["source"] == "made here"
        assert row["versions"]["torchvision"] and row["versions"]["pillow"] and row["cores"] >= 1
    assert (loading["part"], loading["batch"], loading["images_per_call"]) == ("loading", 128, 256)
    assert 7500 < loading["mean_bytes"] < 8500
    assert list(loading["sides"]) == SIDES
    measured = {name: side for name, side in loading["sides"].items() if side["status"] == "measured"}
    # DALI has no wheels for some machines
    assert set(SIDES) - measured.keys() <= {"dali"}
    for name, side in measured.items():
        assert side["difference"] == 0 and side["cpu_ms_per_image"] > 0 and side["open_s"] >= 0
        assert side["images_per_s"]["p50"] == pytest.approx(256e3 / side["ms"]["p50"])
        assert side["ms"]["repeats"] == 2
        base, best = (measured[peer]["images_per_s"]["p50"] for peer in ("pil-0", loading["best_peer"]))
        assert loading["ratios"][name] == pytest.approx(side["images_per_s"]["p50"] / base)
        assert loading["best_ratios"][name] == pytest.approx(side["images_per_s"]["p50"] / best)
    assert (
        loading["best_peer"] in ("pil-0", "pil-2") and min(loading["best_ratios"][p] for p in ("pil-0", "pil-2")) <= 1
    )
    assert any("cache" in line for line in measured["cache-disk"]["said"])

    assert list(step["sides"]) == ["fixed batch", *(name for name in measured if not name.startswith("pil"))]
    assert (step["part"], step["mode"], step["precision"], step["batch"]) == ("step", "eager", "fp32", 2)
    assert "hidden 16 (not the preset's)" in step["shape"]
    assert step["sides"]["fixed batch"]["wait_share"] == step["sides"]["fixed batch"]["over_fixed"] == 0
    for side in step["sides"].values():
        assert side["ms"]["p50"] > 0 and 0 <= side["wait_share"] < 1 and side["over_fixed"] > -1


def test_table_and_plot_are_made_from_the_report(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = report_file.with_name("plot.png")
    assert loader_bench.main(["--from", str(report_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("loading 256 files of 7.8 KB (made here), 128x128 crops") for line in lines)
    assert any(
        line.startswith("a training step: CelebA at hidden 16 (not the preset's), batch 2, eager") for line in lines
    )
    assert sum(line.startswith("torchvision ") and "–" in line for line in lines) == 2


def test_widest_table_and_gaps(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU's sides and figures, sides that cannot be had, no PIL, and refused rows."""
    report = json.loads(report_file.read_text())
    loading, step = report["rows"]
    wide = loading["sides"]["torchvision"] | {"images_per_s": {"p20": 123456.7, "p50": 234567.8, "p80": 345678.9}}
    wide |= {"cpu_ms_per_image": 0.0123, "open_s": 123.4, "difference": 255}
    sides = dict.fromkeys(loader_sides.NAMES, wide) | {"dali": {"status": "cannot be had", "note": "cannot be had: no"}}
    gpu = loading | {"sides": sides, "ratios": dict.fromkeys(sides, 1234.5), "best_ratios": {}}
    fed = step["sides"]["torchvision"] | {"ms": {"p20": 1234.5, "p50": 2345.6, "p80": 3456.7, "repeats": 9}}
    step |= {"sides": step["sides"] | dict.fromkeys(loader_sides.OURS, fed)}
    refused = [row | {"refused": "cache-host differs", "sides": {}} for row in (loading, step)]
    report["rows"] = [gpu, step, *refused]
    path, picture = report_file.with_name("gpu.json"), report_file.with_name("gpu.png")
    path.write_text(json.dumps(report))
    assert loader_bench.main(["--from", str(path), "--plot", str(picture)]) == 1
    shown = capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert "dali cannot be had: no" in shown
    assert "loading: REFUSED, cache-host differs: no times" in shown and "step: REFUSED, cache-host differs" in shown
    table = [line for line in shown.splitlines() if line.strip().startswith(loader_sides.NAMES) and "–" in line]
    assert len(table) > len(loader_sides.NAMES) and max(map(len, table)) <= 120


def test_made_images_are_like_celebas(celeba: Path) -> None:
    files = disk_files(celeba)
    encoded = [file.read() for file in files]
    assert len(files) == len(set(encoded)) == 256
    assert 7500 < sum(map(len, encoded)) / 256 < 8500
    with Image.open(io.BytesIO(encoded[0])) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (178, 218), "RGB")
    assert [Path(file.name).name for file in files[:2]] == ["000001.jpg", "000002.jpg"]
    assert sorted(file.name for file in training_files(celeba)) == [file.name for file in files]


def test_the_users_files_are_copied_as_they_are(celeba: Path, tmp_path: Path) -> None:
    assert copy_celeba(celeba, tmp_path / "some", 4) == 4
    originals = [file.read() for file in disk_files(celeba)]
    assert [file.read() for file in disk_files(tmp_path / "some")] == originals[::64]
    assert copy_celeba(celeba, tmp_path / "all", 9999) == 256


@pytest.mark.parametrize("name", ["pil-0", "pil-2"])
def test_pil_loads_what_fastle_loads_in_the_same_order(name: str, celeba: Path) -> None:
    workers = loader_sides.PEERS[name]
    peer: Loader = PilLoader(disk_files(celeba), workers, CPU)
    ours = FastleLoader(open_side("torchvision", celeba, CPU, str), CPU)
    # the second epoch too
    for start in (0, 2):
        assert difference(peer.batches(start, start + 2), list(ours.batches(start, start + 2))) == 0
    # those of the process itself are counted elsewhere
    assert (peer.workers_seconds() > 0) == (workers > 0)


def test_difference_by_hand() -> None:
    wanted = [torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[7, 7]], dtype=torch.uint8)]
    assert difference(iter(wanted), wanted) == 0
    # as bytes, 0 − 255 would be 1
    assert difference([wanted[0].flip(1), wanted[1]], wanted) == 255
    assert difference([wanted[0], wanted[1] + 3], wanted) == 3
    with pytest.raises(ValueError, match="longer"):
        difference(wanted[:1], wanted)
    for wrong in (wanted[0][0], wanted[0].float()):
        with pytest.raises(ValueError, match=r"not torch\.uint8"):
            difference([wrong, wanted[1]], wanted)


def test_rates_and_ratios_by_hand() -> None:
    assert rates({"p20": 100.0, "p50": 200.0, "p80": 400.0, "repeats": 5}, 1000) == {
        "p20": 2500.0, "p50": 5000.0, "p80": 10000.0,
    }  # fmt: skip

    def sides(**medians: float) -> dict[str, Row]:
        found: dict[str, Row] = {name.replace("_", "-"): {"images_per_s": {"p50": m}} for name, m in medians.items()}
        return found | {"dali-gpu": {"status": "failed"}}

    found = comparison(sides(pil_0=100.0, pil_2=200.0, dali=600.0))
    assert found["ratios"] == {"pil-0": 1, "pil-2": 2, "dali": 6}
    assert (found["best_peer"], found["best_ratios"]) == ("pil-2", {"pil-0": 0.5, "pil-2": 1, "dali": 3})
    without = comparison(sides(pil_2=200.0, dali=600.0))
    assert without["ratios"] == {} and without["best_ratios"] == {"pil-2": 1, "dali": 3}
    assert comparison(sides(dali=600.0)) | {"baseline": ""} == {
        "baseline": "", "best_peer": None, "ratios": {}, "best_ratios": {},
    }  # fmt: skip


def test_cpu_time_is_that_of_the_process_and_its_workers() -> None:
    class Busy:
        taken = 5.0

        def batches(self, start: int, stop: int) -> Iterator[Tensor]:
            assert (start, stop) == (6, 9)
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            self.taken += 2
            yield torch.zeros(1)

        def workers_seconds(self) -> float:
            return self.taken

    cpu: list[float] = []
    assert loader_bench._load(Busy(), CPU, 3, cpu, 2) >= 50
    assert cpu == [pytest.approx(2.05, abs=0.04)]


def test_only_what_has_to_be_exact_is_refused() -> None:
    right: Row = {"status": "measured", "difference": 0}
    wrong: Row = {"status": "measured", "difference": 9}
    lost: Row = {"status": "failed", "note": "failed: no"}
    assert refusal({"dali": right, "dali-gpu": wrong, "pil-0": wrong, "cache-device": lost}) is None
    assert refusal({"dali": wrong, "cache-host": right}) == "dali differs from torchvision's decoder by up to 9"
    assert refusal({"dali": lost}) == "dali failed: no"


def changed(name: str, root: Path, device: torch.device, say: Any) -> Images:
    """`open_side`, with one pixel of one image off by one in the cache."""
    images = open_side(name, root, device, say)
    if name != "cache-host":
        return images
    every = images.batch(range(len(images))).clone()
    every[17, 1, 64, 64] ^= 1
    return ArrayImages(every)


def test_one_wrong_bit_has_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_bench, "open_side", changed)
    path = tmp_path / "report.json"
    assert loader_bench.main([*TINY, "--sides", "torchvision", "cache-host", "--json", str(path)]) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert row["refused"] == "cache-host differs from torchvision's decoder by up to 1"
        assert not {"ms", "images_per_s"} & {key for side in row["sides"].values() for key in side}
        assert "ratios" not in row
    assert "step: REFUSED, cache-host differs" in capsys.readouterr().out


def test_what_cannot_be_had_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(name: str, root: Path, device: torch.device, say: Any) -> Images:
        if name == "dali":
            raise DataError("--decoder dali cannot be had: no wheels")
        if name == "cache-disk":
            raise RuntimeError("out of luck\nsecond line")
        return open_side(name, root, device, say)

    monkeypatch.setattr(loader_bench, "open_side", some)
    path = tmp_path / "report.json"
    sides = ("torchvision", "dali", "cache-disk")
    assert loader_bench.main([*TINY, "--sides", *sides, "--json", str(path)]) == 0
    loading, step = json.loads(path.read_text())["rows"]
    assert [side["status"] for side in loading["sides"].values()] == ["measured", "cannot be had", "failed"]
    assert loading["ratios"] == {} and list(step["sides"]) == ["fixed batch", "torchvision"]
    shown = capsys.readouterr().out
    assert "dali cannot be had: --decoder dali cannot be had: no wheels" in shown
    assert "cache-disk failed: RuntimeError: out of luck" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--images 5", "--images 5 is less than a batch: give 128 or more"),
        ("--data {tmp}/gone", "--data: no CelebA at {tmp}/gone"),
        ("--data {few}", "--data {few} has 3 training images, less than a batch of 128"),
        (
            "--device cpu --sides dali cache-device",
            "--sides cache-device: not on cpu; give some of pil-0, pil-2, torch",
        ),
        ("--sides pil", "argument --sides: invalid choice: 'pil'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    make_celeba(few, 3)
    with pytest.raises(SystemExit) as stop:
        loader_bench.main(arguments.format(tmp=tmp_path, few=few).split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loader_bench.py: error: {expected.format(tmp=tmp_path, few=few)}")


def test_sides_of_devices() -> None:
    assert names(CPU) == SIDES
    assert names(torch.device("cuda")) == list(loader_sides.NAMES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_step, "GPU_LATENT", 16)
    path = tmp_path / "report.json"
    assert loader_bench.main(["--device", "cuda", "--quick", "--images", "256", "--json", str(path)]) == 0
    loading, step = json.loads(path.read_text())["rows"]
    assert list(loading["sides"]) == list(loader_sides.NAMES)
    assert all(loading["sides"][name]["difference"] == 0 for name in (*SIDES, "cache-device"))
    assert all(side["ms"]["p50"] > 0 for side in step["sides"].values())
