"""scripts/grid_patterns.py: what it takes out of images, and what it says of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Generator

from fastle.method.model import Autoencoder
from scripts import grid_patterns
from tests.training.runs import config, go


def test_patterns_of_4_and_2_pixels_are_taken_out_and_nothing_else() -> None:
    lines = torch.arange(16) * math.tau / 16
    rest = 0.5 + 0.1 * (2 * lines).cos()[:, None] + 0.1 * (6 * lines).sin()
    for period in (2, 4):
        pattern = 0.1 * (lines * 16 / period).cos()
        for striped in (rest + pattern, rest + pattern[:, None]):
            made = grid_patterns.without_patterns(striped.expand(1, 3, 16, 16))
            torch.testing.assert_close(made, rest.expand(1, 3, 16, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_has_a_row_for_each_view(tmp_path: Path, masked: bool) -> None:
    go(tmp_path / "run", config(steps=2, masked=masked))
    grid_patterns.main([str(tmp_path / "run"), "--json", str(tmp_path / "report.json")])
    rows = {row["view"]: row for row in json.loads((tmp_path / "report.json").read_bytes())["rows"]}
    assert list(rows)[:3] == ["whole", "moved by 1", "moved by 2"] and rows["crop 0.875"]["step"] == 2
    assert all(row["with"] > 0 and row["without"] > 0 for row in rows.values())


def test_a_perfect_reconstruction_is_better_with_its_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(steps=2)
    model = Autoencoder(made.model)
    monkeypatch.setattr(Autoencoder, "forward", lambda self, images: images)
    x = torch.rand(8, made.model.channels, *made.model.sides, generator=Generator().manual_seed(0))
    for figures in grid_patterns.view_figures(model, made.objective, x).values():
        assert figures["with"] == pytest.approx(0, abs=1e-9) and figures["without"] > 1e-4
