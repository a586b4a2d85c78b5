"""The programs in examples/ run, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastle.training.loop
from examples import own_dataset, sigreg_in_lejepa
from fastle.training.run import RunDirectory


def test_own_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    result = own_dataset.main(tmp_path, steps=1, batch_size=4, hidden=8, map_channels=8, slices=8, device="cpu")
    assert result.metrics[-1]["step"] == 1 and "step 1: " in capsys.readouterr().out


def test_sigreg_in_lejepa() -> None:
    losses = sigreg_in_lejepa.main(steps=30, batch_size=32)
    assert losses[-1] < 0.8 * losses[0]
