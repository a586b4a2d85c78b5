"""Images that are not square, through every command that makes or uses a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastle.commands.train
import fastle.training.loop
from fastle import Autoencoder
from fastle.commands.settings import read_settings, settings_text
from fastle.config import ConfigError, RunConfig
from fastle.data.cache import cache_folder
from fastle.presets import command_of, make_config
from fastle.training.report import grids, read_grid
from tests.commands.trained import Command, command
from tests.data.pictures import write_pictures

__all__ = ["command"]

TINY = (
    "--steps", "2", "--batch-size", "4", "--slices", "8", "--hidden", "8", "--map-channels", "8", "--device", "cpu",
)  # fmt: skip


@pytest.mark.parametrize("masked", [True, False], ids=["pooled", "spatial"])
def test_a_run_of_images_that_are_not_square(
    masked: bool,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / "images" / split, 6, width=60, height=50)
    kind = ("--masked", "--latent", "8") if masked else ("--crop-ratio-max", "0.9")
    fastle.commands.train.main(["folder", "--data", "images", "--size", "16x24", "--run", "run", *kind, *TINY])
    if not masked:
        assert len(list(cache_folder().glob("folder-train-16x24-*.safetensors"))) == 1

    rows = read_grid(grids(Path("run"))[-1], (16, 24))
    assert len(rows) == (4 if masked else 2) and rows["input"].shape[1:] == (3, 16, 24)
    assert command("eval", "run")[0] == 0
    assert json.loads(Path("run/eval-test.json").read_text())["clean"]["ssim"] > -1
    assert command("reconstruct", "run", *Path("images/test").iterdir(), "-o", "some.png")[0] == 0
    assert command("encode", "run", "images/test", "-o", "z.npy")[0] == 0
    assert np.load("z.npy").shape == ((6, 8) if masked else (6, 8, 2, 3))
    assert command("export", "run", "--torch-export", "model.pt2")[0] == 0
    assert command("card", "run", "-o", "card")[0] == 0
    assert "16×24 pixels (height × width)" in Path("card/README.md").read_text()
    model = Autoencoder.from_pretrained("card")
    assert model(torch.zeros(2, 3, 16, 24)).shape == (2, 3, 16, 24)
    demo = pytest.importorskip("fastle.web.demo")
    if masked:
        with pytest.raises(ConfigError, match="takes images of 16x24 px only"):
            demo.open_demo("card", torch.device("cpu"))
    else:
        assert demo.open_demo("run", torch.device("cpu"))[0].size == 16


def test_a_size_that_is_not_square_everywhere_it_is_written(tmp_path: Path) -> None:
    config = make_config("folder", data="photographs", size=(96, 128))
    assert config.model.latent_shape == (32, 12, 16) and config.model.compression == 6
    assert make_config("folder", data="photographs", size=[96, 128]) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert command_of(config) == "fastle-train folder --data DIR --size 96x128"
    (tmp_path / "run.toml").write_text(settings_text(config))
    assert 'size = "96x128"' in (tmp_path / "run.toml").read_text()
    assert make_config(**read_settings(tmp_path / "run.toml", {})) == config
    # a square has one form, that of before
    square = make_config("folder", data="photographs", size=(64, 64))
    assert square == make_config("folder", data="photographs", size=64) and square.to_dict()["data"]["size"] == 64
    # the shorter side decides which preset it is
    assert make_config("folder", size=(32, 128)).model.hidden == 64


@pytest.mark.parametrize("text", ["96×128", "96x", "x128", "96x128x3", "96X128", "9 6", "1_6", ""])
def test_a_size_that_cannot_be_read_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        fastle.commands.train.main(["folder", "--size", text, "--dry-run"])
    assert left.value.code == (
        f"fastle-train: error: --size must be a whole number, or HEIGHTxWIDTH such as 96x128, not {text}"
    )
