"""What tests of commands that use a model share: a small saved model, images, and a command run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastle.commands.main
from fastle.config import ModelConfig
from fastle.method.model import Autoencoder

Command = Callable[..., tuple[int, str, str]]
SIZE = 16


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command(argument…) of fastle: exit status, stdout and stderr, run in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status, error = 0, ""
        try:
            fastle.commands.main.main([str(argument) for argument in arguments])
        except SystemExit as left:
            # sys.exit with a text prints it on stderr and leaves with 1
            status, error = (left.code, "") if isinstance(left.code, int) else (1, f"{left.code}\n")
        printed = capsys.readouterr()
        return status, printed.out, printed.err + error

    return call


def save_model(folder: Path, latent: int | None = None, channels: int = 3) -> Autoencoder:
    """Saves a small model with random weights, and statistics as if it had been trained."""
    torch.manual_seed(0)
    model = Autoencoder(ModelConfig(size=SIZE, channels=channels, hidden=4, map_channels=4, latent=latent))
    model.train()
    with torch.no_grad():
        model(torch.rand(8, channels, SIZE, SIZE))
    model.save_pretrained(folder)
    return model.eval()


def save_image(path: Path, seed: int, colour: tuple[int, int, int] | None = None) -> Path:
    """Saves an image of noise, or of noise around a colour."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256 if colour is None else 60, (20, 18, 3), generator=generator)
    if colour is not None:
        pixels += torch.tensor(colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path
