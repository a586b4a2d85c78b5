"""What fastle-train does at the end of a training."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastle.training.loop
from fastle.commands.train import FLAGS
from fastle.commands.train_run import run
from tests.training.runs import config


def test_a_page_that_cannot_be_written_does_not_fail_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    flags = dict.fromkeys(FLAGS) | {"device": "cpu"}
    run(config(steps=2), tmp_path, flags)
    page = tmp_path / "report.html"
    assert page.is_file() and f"report: {page}" in capsys.readouterr().out.replace("\n", "")

    page.unlink()
    page.mkdir()
    run(config(steps=2), tmp_path, flags)
    out = capsys.readouterr().out
    assert "complete without its report.html" in out and f"fastle report {tmp_path} -o OUT.html" in out
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
