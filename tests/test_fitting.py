"""Training from Python: the same bits as the command's, images of every kind, hooks, and what is refused."""

from __future__ import annotations

import json
import signal
import time
import zipfile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import fastle.commands.train
import fastle.training.loop
from fastle import FastleError, Result, fit
from fastle.checkpoint import latest_checkpoint
from fastle.data.given import GivenImages
from fastle.presets import make_config
from fastle.training.run import RunDirectory
from tests.data.pictures import write_pictures
from tests.training.runs import assert_same, weights

TINY: dict[str, Any] = {"steps": 2, "batch_size": 4, "slices": 8, "hidden": 8, "map_channels": 8}
PIXELS = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)


def train(data: Any = PIXELS, **more: Any) -> Result:
    settings: dict[str, Any] = {"size": 16, "device": "cpu", "run": "run"} | TINY | more
    return fit(data=data, **{name: value for name, value in settings.items() if value is not None})


def test_a_call_and_a_command_give_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    fastle.commands.train.main(["shapes", *flags, "--device", "cpu"])
    capsys.readouterr()
    result = fit("shapes", run="called", device="cpu", **TINY)
    assert_same(weights(Path("runs/shapes")), weights(Path("called")))
    assert Path("runs/shapes/config.json").read_bytes() == Path("called/config.json").read_bytes()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("device: cpu") and "step" not in printed.err
    # what is returned is what was saved, also by a call that has nothing left to do
    again = fit("shapes", run=tmp_path / "called", device=torch.device("cpu:0"), **TINY)
    for made in (result, again):
        assert not made.model.training and made.run.resolve() == tmp_path / "called"
        assert [row["step"] for row in made.metrics] == [1, 2] and made.metrics[-1]["valid_psnr"] > 0
        saved = {
            name.removeprefix("model."): value for name, value in weights(made.run).items() if name[:6] == "model."
        }
        assert_same(made.model.state_dict(), saved)


def test_a_packed_folder_is_trained_on_as_the_folder_is(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 30)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in (tmp_path / "images").iterdir():
            packed.write(path, f"images/{path.name}")
    # the second call goes on where the first one stopped, in the second epoch
    for steps in (9, 16):
        train(tmp_path / "images.zip", run="packed", steps=steps, cache="none", schedule="constant")
    train(tmp_path / "images", run="whole", steps=16, cache="none", schedule="constant")
    assert_same(weights(Path("whole")), weights(Path("packed")))


def test_a_configuration_in_place_of_settings() -> None:
    config = make_config("shapes", **TINY)
    fit(config, device="cpu")
    fit("shapes", run="called", device="cpu", **TINY)
    assert_same(weights(Path("runs/shapes")), weights(Path("called")))


class Pairs(Dataset[tuple[Any, int]]):
    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index % 10


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_images_of_every_kind_are_the_same_images() -> None:
    train(run="tensor", size=None)
    for kind, data in (
        ("array", PIXELS.numpy()),
        ("floats", PIXELS.double() / 255),
        ("pairs", Pairs(list(PIXELS.float() / 255))),
        ("pictures", Pairs([pil(image) for image in PIXELS])),
        ("mappings", [{"image": pil(image), "label": 3} for image in PIXELS]),
    ):
        train(data, run=kind)
        assert_same(weights(Path("tensor")), weights(Path(kind)))
    assert json.loads(Path("tensor/config.json").read_text())["data"]["root"] is None


@pytest.mark.parametrize(
    ("item", "channels", "expected"),
    [
        (torch.full((24, 20), 0.9987), 3, (3, 255.0)),
        (torch.full((3, 20, 16), 200, dtype=torch.uint8), 1, (1, 199.5)),
        (Image.new("P", (16, 40), 0), 3, (3, 0.0)),
        (np.full((1, 16, 16), 255, dtype=np.uint8), 1, (1, 255.0)),
    ],
)
def test_images_are_brought_to_size_and_channels(item: Any, channels: int, expected: tuple[int, float]) -> None:
    (image,) = GivenImages([item], np.arange(1), size=16, channels=channels).batch([0])
    assert image.dtype == torch.uint8 and tuple(image.shape) == (expected[0], 16, 16)
    assert abs(float(image.float().mean()) - expected[1]) <= 0.5


def test_floats_are_not_rounded_where_16_bits_are_asked_for() -> None:
    dark = PIXELS.float() / 255 / 600
    train(dark, run="floats", bits=16)
    result = train(Pairs(list(dark)), run="pairs", bits=16)
    assert_same(weights(Path("floats")), weights(Path("pairs")))
    assert json.loads(Path("floats/config.json").read_text())["data"]["bits"] == 16
    # in 8 bits, all of them are black
    figures = [
        fastle.evaluate(result.model, images, bits=bits) for images, bits in ((dark, 16), (dark, 8), (0 * dark, 8))
    ]
    assert figures[0] != figures[1] == figures[2]
    # a model knows its bits, also where it was saved
    result.model.save_pretrained("saved")
    names = (Path("floats"), max(Path("floats/checkpoints").glob("*.safetensors")), Path("saved"))
    for model in (result.model, *map(fastle.Autoencoder.from_pretrained, names)):
        assert fastle.evaluate(model, dark) == fastle.evaluate(model, dark, bits=16) != fastle.evaluate(model, 0 * dark)


class OneReader(Pairs):
    """Fails if two threads read from it at once."""

    def __init__(self, images: list[Any]) -> None:
        super().__init__(images)
        self.reading = Lock()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        assert self.reading.acquire(blocking=False)
        time.sleep(0.001)
        self.reading.release()
        return super().__getitem__(index)


def test_images_are_cut_to_a_size_that_is_not_square() -> None:
    images = GivenImages(PIXELS, np.arange(20), size=(8, 16), channels=3)
    assert torch.equal(images.batch([3, 0]), PIXELS[[3, 0], :, 4:12])
    with pytest.raises(FastleError, match="image 2 is 16 px high and 16 px wide, smaller than the 24x16 asked for"):
        GivenImages(PIXELS, np.arange(20), size=(24, 16), channels=3).batch([2])


def test_one_thread_at_a_time_reads() -> None:
    train(OneReader(list(PIXELS)), steps=6)


def test_a_run_goes_on_with_its_images_and_with_no_others() -> None:
    train(run="whole", steps=4)
    train(steps=2, schedule="constant", warmup=0.0, run="parts")
    assert len(train(steps=4, schedule="constant", warmup=0.0, run="parts").metrics) == 4
    train(steps=4, schedule="constant", warmup=0.0, run="once")
    assert_same(weights(Path("parts")), weights(Path("once")))
    with pytest.raises(FastleError, match="names have changed"):
        train(255 - PIXELS, run="whole", steps=4)


class Noisy(Pairs):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.rand(3, 16, 16), 0


def test_random_images_are_said_to_be_random(capsys: pytest.CaptureFixture[str]) -> None:
    train(Noisy(list(PIXELS)))
    assert "differ from one reading to the next" in capsys.readouterr().err
    train(Noisy(list(PIXELS)), steps=3, accept_new_data=True)


def test_images_to_validate_of_one_s_own() -> None:
    held_out, given = train(run="held-out"), train(valid=PIXELS[:4], run="given")
    # of twenty images one is held out, and then none
    assert held_out.metrics[-1]["valid_psnr"] != given.metrics[-1]["valid_psnr"]
    weight = "encoder.stem.weight"
    assert not torch.equal(held_out.model.state_dict()[weight], given.model.state_dict()[weight])


def test_hooks_are_told_of_reports_and_checkpoints() -> None:
    reports: list[tuple[int, bool]] = []
    saved: list[tuple[Path, bool]] = []
    train(
        on_report=lambda row, model: reports.append((row["step"], bool(model(PIXELS[:1]).isfinite().all()))),
        on_checkpoint=lambda path: saved.append((path, path.exists())),
    )
    names = [Path("run/checkpoints") / f"step-0000000{step}.safetensors" for step in (1, 2)]
    assert reports == [(1, True), (2, True)] and saved == [(name, True) for name in names]


def test_an_exception_of_a_hook_ends_a_run_that_can_go_on() -> None:
    def stop(row: dict[str, Any], model: object) -> None:
        raise StopIteration(f"good enough at {row['step']}")

    with pytest.raises(StopIteration, match="good enough at 1"):
        train(on_report=stop)
    assert latest_checkpoint(Path("run")).name == "step-00000001.safetensors"
    train(), train(run="once")
    assert_same(weights(Path("run")), weights(Path("once")))


def test_ctrl_c_is_the_keyboard_interrupt_of_python() -> None:
    with pytest.raises(KeyboardInterrupt, match="stopped and saved at step 2"):
        train(on_report=lambda row, model: signal.raise_signal(signal.SIGINT), steps=3)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, "there is nothing to train on"),
        ({"config": "mnist"}, "dataset must be one of shapes"),
        ({"config": "shapes", "data": PIXELS}, "shapes has images of its own"),
        ({"config": make_config("shapes"), "steps": 3}, "not both: steps"),
        ({"config": "shapes", "valid": PIXELS}, "valid has no effect"),
        ({"data": PIXELS, "cache": "disk"}, "have no effect on images given in Python"),
        ({"config": "shapes", "device": "gpu"}, "device must be one of auto, cpu, cuda, xpu, mps, not gpu"),
        ({"config": "shapes", "lr": -1.0}, "--lr must be above 0"),
        ({"data": iter(PIXELS), "size": 16}, "without a length and an index"),
        ({"data": PIXELS, "size": 32}, "image 0 is 16x16, smaller than the 32x32"),
        ({"data": PIXELS.permute(0, 2, 3, 1), "size": 16, "channels": 3}, r"has the shape \(16, 16, 3\)"),
        ({"data": PIXELS.float(), "size": 16}, "floats must be in"),
        ({"data": PIXELS.long(), "size": 16}, r"is torch\.int64"),
        ({"data": [{"img": PIXELS[0]}] * 9, "size": 16}, "is a mapping of img"),
        ({"data": [7] * 9, "size": 16}, "is a int"),
        ({"data": [Image.new("I;16", (16, 16))] * 9, "size": 16}, "has values of 16 bits: give bits=16"),
        ({"data": [Image.new("F", (16, 16))] * 9, "size": 16}, "mode F"),
        ({"data": PIXELS[:1]}, "1 images are too few"),
        ({"data": "missing"}, "no such folder"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(FastleError, match=fault) as error:
        fit(**{"device": "cpu", "run": "refused"} | arguments)
    assert "\n" not in str(error.value) and not Path("refused").exists()
