"""scripts/judge_depths.py: its figures, where they are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import JudgeDepth, ModelConfig
from fastle.method.model import Autoencoder, Encoder, Features
from scripts import judge_depths
from tests.training.runs import config, go


class Matrix(Encoder):
    """An encoder whose only stage, as a judge, is a matrix, of which the metric is known."""

    matrix: Tensor

    def features(self, batches: Sequence[Tensor], depth: JudgeDepth = "code") -> list[Features]:
        if depth == "all":
            return [((images.flatten(1) @ self.matrix)[:, None],) for images in batches]
        return super().features(batches, depth)


def judged_by(matrix: Tensor) -> Autoencoder:
    model = Autoencoder(ModelConfig(size=8, channels=1, hidden=4, map_channels=4, latent=None))
    model.encoder = Matrix(model.config)
    model.encoder.matrix = matrix
    return model.eval()


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=Generator().manual_seed(0))


def test_pixels_themselves_are_flat_and_pull_as_the_squared_error() -> None:
    figures = judge_depths.stage_figures(judged_by(3 * torch.eye(64)), images())
    assert figures["stem"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert figures["stem"]["flatness"] == pytest.approx(1, abs=0.05)
    kinds = ("slow brightness", "fine brightness")
    assert [figures["stem"]["weights"][kind] for kind in kinds] == pytest.approx([1, 1], rel=1e-3)


def test_a_stage_that_sees_the_mean_alone() -> None:
    # fine noise has a mean near 0
    weights = judge_depths.stage_figures(judged_by(torch.full((64, 4), 1 / 64)), images())["stem"]["weights"]
    assert weights["slow brightness"] > 1.99 and weights["fine brightness"] < 0.01


def test_a_stage_that_sees_a_quarter_of_the_pixels() -> None:
    matrix = torch.eye(64)[:, :16]
    figures = judge_depths.stage_figures(judged_by(matrix), images())
    assert figures["stem"]["flatness"] == pytest.approx(0.25, abs=0.05)
    # a quarter of the squared error's square, on average
    assert figures["stem"]["cosine"] == pytest.approx(0.5, abs=0.1)


def test_each_run_has_a_row_for_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {"short": 1, "long": 2}
    for name, steps in lengths.items():
        go(tmp_path / name, config(steps=steps))
    judge_depths.main([*(str(tmp_path / name) for name in lengths), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert [(row["run"], row["step"], row["stage"]) for row in report["rows"]] == [
        (name, steps, stage) for name, steps in lengths.items() for stage in ("stem", "block 1", "block 2")
    ]
    assert all(-1 <= row["cosine"] <= 1 and 0 < row["flatness"] <= 1 for row in report["rows"])
    assert len(capsys.readouterr().out.splitlines()) == 7
