"""scripts/fidelity.py: a classifier learns the classes, and its figures are right where they are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from fastle.config import RunConfig
from fastle.presets import make_config
from scripts import fidelity
from scripts.fidelity import frechet_distance
from tests.training.runs import go


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes: bright above, and bright below."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, rows in (("above", slice(0, 8)), ("below", slice(8, 16))):
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 128, (16, 16, 1), dtype=np.uint8).repeat(3, 2)
                pixels[rows] += 127
                Image.fromarray(pixels).save(tmp_path / "photographs" / split / name / f"{i}.png")
    return tmp_path / "photographs"


def tiny(photographs: Path) -> RunConfig:
    return make_config("folder", data=photographs, size=16, steps=1, batch_size=8, hidden=8, map_channels=8)


def test_a_run_has_its_figures(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "BATCH", 8)
    # a photograph whose class is wrong
    (photographs / "test" / "above" / "0.png").replace(photographs / "test" / "below" / "wrong.png")
    go(tmp_path / "run", tiny(photographs))
    flags = [str(tmp_path / "run"), "--data", str(photographs), "--classifier", str(tmp_path / "classifier")]
    fidelity.main([*flags, "--json", str(tmp_path / "report.json")])
    images, run = json.loads((tmp_path / "report.json").read_bytes())["rows"]
    assert images["agreement"] == 1 and 0.8 < images["accuracy"] < 1 and images["frechet"] < 1e-6
    # an untrained decoder paints everything alike
    assert run["agreement"] <= 0.7 and run["frechet"] > 0.1
    capsys.readouterr()
    fidelity.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert not any("epoch" in line for line in lines) and float(lines[2].split()[-3]) == run["agreement"]


def test_a_file_that_holds_no_classifier(photographs: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", tiny(photographs))
    (tmp_path / "c").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="holds no such classifier: give another file"):
        fidelity.main([str(tmp_path / "run"), "--data", str(photographs), "--classifier", str(tmp_path / "c")])


def normal(scale: float, shift: float) -> Tensor:
    x = torch.randn(500, 3, dtype=torch.float64, generator=Generator().manual_seed(0))
    # of mean zero and unit covariance, to the last digit
    x -= x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T * scale + shift


@pytest.mark.parametrize(("scale", "shift", "distance"), [(1, 0, 0), (1, 2, 12), (3, 0, 12), (2, 1, 6)])
def test_distance_of_known_distributions(scale: float, shift: float, distance: float) -> None:
    # |μ - μ'|² is three times the shift's square, and each of three directions adds (σ - σ')²
    assert frechet_distance(normal(1, 0), normal(scale, shift)) == pytest.approx(distance, abs=1e-9)


def test_a_class_without_training_photographs(photographs: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", tiny(photographs))
    (photographs / "test" / "above").rename(photographs / "test" / "beside")
    with pytest.raises(SystemExit, match="no training photograph is in a folder 'beside'"):
        fidelity.main([str(tmp_path / "run"), "--data", str(photographs), "--classifier", str(tmp_path / "c")])
    # it was noticed before a classifier was trained
    assert not (tmp_path / "c").exists()


def test_mirrored_and_shifted_images_keep_their_pixels() -> None:
    images = torch.arange(2 * 16 * 16, dtype=torch.uint8).reshape(2, 1, 16, 16)
    for seed in range(4):
        x = fidelity.augmented(images, Generator().manual_seed(seed))
        assert x.shape == images.shape and set(x.unique().tolist()) <= set((images / 255).unique().tolist())
