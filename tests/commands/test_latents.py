"""fastle encode, interpolate and sample, as a user meets them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import fastle.commands.encode
from fastle.config import DataConfig
from fastle.data import decode_files
from tests.commands.trained import SIZE, Command, command, save_image, save_model
from tests.training.saved import CONFIG, save, train_two_steps

__all__ = ["command"]
NAMES = ["a.png", "b/1.png", "b/2.png", "c.png", "d.png"]


def read(path: Path) -> tuple[Tensor, list[str]]:
    """The latents of a file, and their names, by the format's own library."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        shape = json.loads(table.schema.metadata[b"latent_shape"])
        return torch.tensor(table["latent"].to_pylist()).view(-1, *shape), table["name"].to_pylist()
    names = json.loads(path.with_name(f"{path.name}.names.json").read_text())
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path)), names
    return safetensors.torch.load_file(path)["latents"], names


@pytest.mark.parametrize("latent", [None, 6])
@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".parquet"])
def test_latents_are_those_of_the_images_in_order(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, latent: int | None
) -> None:
    # several batches, and a last one that is not full
    monkeypatch.setattr(fastle.commands.encode, "BATCH", 2)
    model = save_model(tmp_path / "model", latent)
    files = [save_image(tmp_path / "images" / name, seed) for seed, name in enumerate(NAMES)]
    output = Path("out") / f"z{ending}"
    status, out, err = command("encode", "model", "images", "-o", output, "--device", "cpu")
    assert (status, err) == (0, "") and f"written to {output}" in out and "sorted by the paths" in out
    latents, names = read(output)
    images = decode_files(DataConfig(dataset="folder", size=SIZE, channels=3), files)
    assert names == NAMES
    torch.testing.assert_close(latents, model.encode(images).detach())
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_one_image_of_a_run_and_of_its_checkpoint(command: Command, tmp_path: Path) -> None:
    trainer = train_two_steps()
    checkpoint = save(tmp_path / "run", trainer)
    save_image(tmp_path / "a.png", 0)
    for name in ("run", checkpoint):
        assert command("encode", name, "a.png", "-o", "z.npy", "--device", "cpu")[0] == 0
        images = decode_files(replace(CONFIG.data, dataset="folder"), [tmp_path / "a.png"])
        torch.testing.assert_close(torch.from_numpy(np.load("z.npy")), trainer.model.eval().encode(images).detach())
    assert json.loads(Path("z.npy.names.json").read_text()) == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ("model images -o z.pt", "-o z.pt: give it a name that ends in .safetensors or .npy or .parquet"),
        ("model nothing -o z.npy", "nothing: no such file or folder"),
        ("nothing images -o z.npy", "no run, checkpoint or saved model nothing is here"),
        ("model/model.safetensors images -o z.npy", "is no checkpoint of a run"),
        ("model images -o z.npy --weights ema-050", "holds no ema-050"),
    ],
)
def test_what_encode_refuses(command: Command, tmp_path: Path, arguments: str, fault: str) -> None:
    save_model(tmp_path / "model")
    save_image(tmp_path / "images" / "a.png", 0)
    status, _, err = command("encode", *arguments.split(), "--device", "cpu")
    assert status == 1 and fault in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*z.*"))


def test_an_encoding_that_fails_leaves_what_was_there(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    for seed, name in enumerate(NAMES):
        save_image(tmp_path / "images" / name, seed)
    assert command("encode", "model", "images", "-o", "z.npy", "--device", "cpu")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*z.npy*")}
    save_image(tmp_path / "images" / "e.png", 9)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastle.data.latents.os.fsync", full)
    status, _, err = command("encode", "model", "images", "-o", "z.npy", "--device", "cpu")
    assert status == 1 and "cannot write z.npy: No space left on device; make room" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if "z.npy" in path.name} == before


def test_interpolation_begins_and_ends_at_the_images(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", latent=6)
    ends = [save_image(tmp_path / name, seed) for seed, name in enumerate(("a.png", "b.png"))]
    shown: list[tuple[str, Tensor]] = []
    monkeypatch.setattr("fastle.commands.interpolate.save_grid", lambda path, rows: shown.extend(rows))
    assert command("interpolate", "model", *ends, "-o", "way.png", "--steps", "3", "--device", "cpu")[0] == 0
    images = decode_files(DataConfig(dataset="folder", size=SIZE, channels=3), ends) / 255
    z = model.encode(images)
    rows = dict(shown)
    torch.testing.assert_close(rows["latents"], model.decode(torch.stack((z[0], z.mean(0), z[1]))).detach())
    torch.testing.assert_close(rows["pixels"], torch.stack((images[0], images.mean(0), images[1])))

    status, _, err = command("interpolate", "model", *ends, "-o", "way.png", "--steps", "1", "--device", "cpu")
    assert status == 1 and "--steps must be at least 2 and at most 100, not 1" in err
    status, _, err = command("interpolate", "model", *ends, "-o", "a.png", "--device", "cpu")
    assert status == 1 and "is one of the images" in err


def test_samples_repeat_with_their_seed_and_say_what_they_are(command: Command, tmp_path: Path) -> None:
    save_model(tmp_path / "pooled", latent=6)
    save_model(tmp_path / "spatial")
    pictures = {}
    for name, seed in (("pooled", 0), ("pooled", 1), ("spatial", 0)):
        status, out, _ = command("sample", name, "--count", "10", "--seed", str(seed), "-o", "s.png", "--device", "cpu")
        assert status == 0 and ("the latent is spatial" in out) == (name == "spatial")
        assert "a saved model does not say how it was trained" in out
        pictures[name, seed] = Path("s.png").read_bytes()
    command("sample", "pooled", "--count", "10", "-o", "s.png", "--device", "cpu")
    assert Path("s.png").read_bytes() == pictures["pooled", 0] != pictures["pooled", 1]
    # two rows, eight tiles wide
    width, height = Image.open("s.png").size
    assert height == 4 + 2 * (96 + 4) and width > 8 * 96


def test_a_run_without_sigreg_has_nothing_to_sample_from(command: Command, tmp_path: Path) -> None:
    trainer = train_two_steps()
    trainer.config = replace(CONFIG, objective=replace(CONFIG.objective, sigreg_weight=0.0))
    save(tmp_path / "run", trainer)
    status, _, err = command("sample", "run", "-o", "s.png", "--device", "cpu")
    assert status == 1 and "run was trained without SIGReg" in err and not Path("s.png").exists()
