"""scripts/precision.py, with a few images and steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.precision import main


def test_each_seed_trains_in_both_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for index in range(8):
            Image.new("RGB", (32, 32), (20 * index, 90, 200)).save(tmp_path / split / f"{index}.jpg")
    command = ["--data", str(tmp_path), "--steps", "2", "--batch-size", "4", "--hidden", "4", "--seeds", "1"]
    assert main([*command, "--images", "4", "--json", str(tmp_path / "precision.json")]) == 0
    rows = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert [(row["seed"], row["precision"]) for row in rows] == [(0, "fp32"), (0, "bf16")]
    assert all(0 < row["psnr"] < 60 for row in rows) and "the mean of 1 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds 8 JPEG files, and 12 are needed"):
        main([*command, "--images", "12"])
