"""The benchmark of the loaders: its images are CelebA's size, wrong pixels have no times, its figures are right."""

from __future__ import annotations

import importlib.util
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import loader_bench
from bench.common import loader_step
from bench.common.celeba_images import copy_celeba, disk_files, make_celeba
from bench.common.loaders import BATCH, FastleLoader, PilLoader, Workload
from bench.loader_bench import difference, main, open_side
from fastle.data import Images
from fastle.data.images import ArrayImages
from tests.bench.bench_cases import check_bad_input, check_refused, check_shown, run_tiny

CPU = torch.device("cpu")
SIDES = ["pil-0", "pil-2", "torchvision", "dali", "cache-disk", "cache-host"]


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_step, "STEPS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(loader_step, "WARM_STEPS", 1)
    monkeypatch.setattr(loader_step, "CPU_BATCH", 2)
    monkeypatch.setattr(loader_step, "GPU_LATENT", 16)


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "celeba"
    make_celeba(root, 2 * BATCH)
    return root


def test_report_and_what_is_shown_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.environ.get("XDG_CACHE_HOME")
    report = run_tiny(main, tmp_path, "--images", "256")
    assert os.environ.get("XDG_CACHE_HOME") == before
    loading, step = report["rows"]
    for row in (loading, step):
        assert row["refused"] is None and row["images"] == 256 and row["source"] == "made here"
        assert row["versions"]["torchvision"] and row["versions"]["pillow"] and row["cores"] >= 1
    assert loading["shape"] == "256 files of 7.8 KB" and loading["images_per_call"] == 256
    assert list(loading["sides"]) == SIDES
    measured = {name: side for name, side in loading["sides"].items() if side["status"] == "measured"}
    # DALI has no wheels for some machines
    assert set(SIDES) - measured.keys() <= {"dali"}
    for side in measured.values():
        assert side["pixel_error"] == 0 and side["cpu_ms_per_image"] > 0 and side["ms"]["repeats"] == 2
    assert any("cache" in line for line in measured["cache-disk"]["said"])
    assert list(step["sides"]) == ["fixed batch", *(name for name in measured if not name.startswith("pil"))]
    assert "hidden 16 (not the preset's), batch 2, eager, fp32" in step["shape"]
    assert step["sides"]["fixed batch"]["wait_share"] == step["sides"]["fixed batch"]["over_fixed"] == 0
    for side in step["sides"].values():
        assert side["ms"]["p50"] > 0 and 0 <= side["wait_share"] < 1 and side["over_fixed"] > -1
    # the figures of the table, by hand
    for name, ms in (("pil-0", 800.0), ("pil-2", 400.0), ("cache-host", 100.0)):
        loading["sides"][name]["ms"] = {"p20": ms, "p50": ms, "p80": ms, "repeats": 2}
    loading["sides"]["dali"] = {"status": "cannot be had", "note": "cannot be had: no wheels"}
    lines = check_shown(main, report, tmp_path, capsys).splitlines()
    host = next(line for line in lines if line.strip().startswith("cache-host "))
    assert host.split()[1:6] == ["100", "100–100", "2,560", "8×", "4×"]
    assert "dali cannot be had: no wheels" in lines


def test_made_images_are_like_celebas(celeba: Path) -> None:
    files = disk_files(celeba)
    encoded = [file.read() for file in files]
    assert len(files) == len(set(encoded)) == 256
    assert 7500 < sum(map(len, encoded)) / 256 < 8500
    with Image.open(io.BytesIO(encoded[0])) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (178, 218), "RGB")
    assert [Path(file.name).name for file in files[:2]] == ["000001.jpg", "000002.jpg"]


def test_the_users_files_are_copied_as_they_are(celeba: Path, tmp_path: Path) -> None:
    assert copy_celeba(celeba, tmp_path / "some", 4) == 4
    originals = [file.read() for file in disk_files(celeba)]
    assert [file.read() for file in disk_files(tmp_path / "some")] == originals[::64]
    assert copy_celeba(celeba, tmp_path / "all", 9999) == 256


@pytest.mark.parametrize("workers", [0, 2])
def test_pil_loads_what_fastle_loads_in_the_same_order(workers: int, celeba: Path) -> None:
    peer = PilLoader(disk_files(celeba), workers, CPU)
    ours = FastleLoader(open_side("torchvision", celeba, CPU, str), CPU)
    # the second epoch too
    for start in (0, 2):
        assert difference(peer.batches(start, start + 2), list(ours.batches(start, start + 2))) == 0
    # the CPU time of the process itself is counted elsewhere
    assert (peer.worker_seconds() > 0) == (workers > 0)


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


def test_cpu_time_is_that_of_the_process_and_its_workers() -> None:
    class Busy(FastleLoader):
        taken = 5.0

        def __init__(self) -> None:
            pass

        def batches(self, start: int, stop: int) -> Iterator[Tensor]:
            assert (start, stop) == (6, 9)
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            self.taken += 2
            yield torch.zeros(1)

        def worker_seconds(self) -> float:
            return self.taken

    cpu: list[float] = []
    assert loader_bench.load(Busy(), CPU, 3, cpu, 2) >= 50
    assert cpu == [pytest.approx(2.05, abs=0.04)]


def changed(name: str, root: Path, device: torch.device, say: Any) -> Images:
    """`open_side`, with one bit of one image wrong in the cache."""
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
    report = run_tiny(main, tmp_path, "--images", "256", "--sides", "torchvision", "cache-host", status=1)
    check_refused(report, "cache-host: pixel error 1.0e+00 is over 0e+00", capsys.readouterr().out)
    assert not any("ms" in side for side in report["rows"][0]["sides"].values())


def test_dali_gpu_alone_may_differ(celeba: Path) -> None:
    work = Workload(root=celeba, source="", count=256, sides=SIDES)
    exact = [name for name in loader_bench.NAMES if loader_bench._side(name, work, CPU).gates]
    assert exact == ["torchvision", "dali", "cache-disk", "cache-host", "cache-device"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--images 5", "--images 5 is less than a batch: give 128 or more"),
        ("--data {tmp}/gone", "--data: no CelebA at {tmp}/gone"),
        ("--data {tmp}/few", "--data {tmp}/few has 3 training images, less than a batch of 128"),
        ("--device cpu --sides dali cache-device", "--sides cache-device: not on cpu; give some of pil-0, pil-2, tor"),
        ("--sides pil", "argument --sides: invalid choice: 'pil'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_celeba(tmp_path / "few", 3)
    check_bad_input(main, arguments.format(tmp=tmp_path), expected.format(tmp=tmp_path), capsys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    loading, step = run_tiny(main, tmp_path, "--images", "256", device="cuda")["rows"]
    assert list(loading["sides"]) == list(loader_bench.NAMES)
    measured = {name for name, side in loading["sides"].items() if side["status"] == "measured"}
    missing = set() if importlib.util.find_spec("nvidia.dali") else {"dali", "dali-gpu"}
    assert set(loader_bench.NAMES) - measured == missing
    assert all(loading["sides"][name]["pixel_error"] == 0 for name in measured & {*SIDES, "cache-device"})
    assert all(side["ms"]["p50"] > 0 for side in step["sides"].values())
