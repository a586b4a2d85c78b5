"""scripts/photographs.py: figures and a picture of photographs larger than the model's own images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastle.config import ConfigError, ModelConfig
from fastle.method.model import Autoencoder
from scripts import photographs


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


def saved(folder: Path, latent: int | None = None) -> str:
    torch.manual_seed(0)
    Autoencoder(ModelConfig(size=32, channels=3, hidden=4, map_channels=4, latent=latent)).save_pretrained(folder)
    return str(folder)


def test_figures_at_every_size_and_a_picture(photograph: Path, tmp_path: Path) -> None:
    picture, report = tmp_path / "picture.jpg", tmp_path / "figures.json"
    model = saved(tmp_path / "model")
    flags = ["--model", model, "--size", "80", "-o", str(picture), "--json", str(report)]
    photographs.main([str(photograph), str(photograph), *flags])
    rows = json.loads(report.read_text())["rows"]
    assert [(row["image"], row["size"]) for row in rows] == 2 * [("photograph.png", side) for side in (32, 64, 80)]
    assert all(0 < row["psnr"] < 30 for row in rows)
    drawn = Image.open(picture)
    # two photographs beside each other, above their reconstructions
    assert drawn.size == (2 * 80 + 8, 2 * 80 + 8)
    above, below = (np.asarray(drawn.crop((0, top, 80, top + 80))).astype(float) for top in (0, 88))
    # nearly random weights make nearly grey pictures
    assert above.std() > 30 > below.std()


def test_what_cannot_be_measured_is_one_line(photograph: Path, tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "picture.jpg")]
    for flags, says in (
        (["--size", "96"], "too small for --size 96"),
        (["--size", "60"], "divisible by 8"),
        (["--model", saved(tmp_path / "pooled", latent=4), "--size", "64"], "pooled latent"),
    ):
        with pytest.raises(ConfigError, match=says):
            photographs.main([str(photograph), *flags, *output])
    with pytest.raises(ConfigError, match=r"test_photographs\.py"):
        photographs.main([__file__, *output])
    assert not (tmp_path / "picture.jpg").exists()
