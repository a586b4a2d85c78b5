"""A run's model for others: what the card says, and what is refused before anything is written."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastle.checkpoint import latest_checkpoint
from fastle.commands.main import main
from fastle.commands.train import make_parser
from fastle.errors import FastleError
from fastle.method.model import Autoencoder
from fastle.method.pretrained import hole_ratio_of
from fastle.presets import command_of, make_config
from fastle.training.card import save_run
from tests.training.runs import config, go

FIGURES = {"psnr": 21.234, "psnr_of_mean_mse": 20.0, "ssim": 0.8765, "contrast": 0.9, "sharpness": 0.8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with an average, which has been measured."""
    run = tmp_path_factory.mktemp("card") / "run"
    go(run, config(steps=2, averages=(0.05,)))
    measured = {"checkpoint": latest_checkpoint(run).name, "step": 2, "images": 2000, "clean": FIGURES}
    for name, more in (
        ("test", {"data": "test split", "weights": "model"}),
        # of a version that did not say which weights
        ("data-faces-1", {"data": "/home/me/faces"}),
        ("test-ema-050", {"data": "test split", "weights": "ema-050", "clean": FIGURES | {"psnr": 23.0}}),
        ("data-old-1", {"data": "/home/me/old", "checkpoint": "step-00000001.safetensors"}),
    ):
        (run / f"eval-{name}.json").write_text(json.dumps(measured | more))
    return run


def test_a_masked_model_keeps_the_share_of_its_hole(tmp_path: Path) -> None:
    go(tmp_path / "run", config(steps=1, masked=True))
    save_run(tmp_path / "run", tmp_path / "toy")
    assert hole_ratio_of(tmp_path / "toy") == 0.35


def test_a_card_says_what_the_model_is_and_what_it_reaches(finished: Path, tmp_path: Path) -> None:
    remarks = save_run(finished, tmp_path / "toy", about="Discs, by me.", license_name="cc-by-4.0")
    assert remarks == [
        "left out, as they are of another checkpoint or other weights: eval-data-old-1.json, eval-test-ema-050.json"
    ]
    card = (tmp_path / "toy" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastle\nlicense: cc-by-4.0\n") and "# toy\n" in card
    for line in (
        "Discs, by me. 12,000 images to train; 16×16 pixels, grey.",
        "| 2,000 of test split | clean | 21.23 | 0.876 | 0.900 | 0.800 |",
        "| 2,000 of faces | clean | 21.23 | 0.876 | 0.900 | 0.800 |",
        "The weights: cc-by-4.0.",
        "- It learnt on grey images of 16×16 pixels, and takes any whose sides are divisible by 8.",
    ):
        assert f"{line}\n" in card
    # the configuration's size is not a preset's, and its widths are set by hand
    assert "    fastle-train shapes --size 16 --hidden 8 --map-channels 8" in card
    assert "2 steps of 4 images" in card and "/home" not in card
    assert "PSNR on the validation images: " in card
    assert torch.equal(
        Autoencoder.from_pretrained(tmp_path / "toy").decoder.head.weight,
        Autoencoder.from_pretrained(finished).decoder.head.weight,
    )


def test_an_average_has_a_card_of_its_own(finished: Path, tmp_path: Path) -> None:
    save_run(finished, tmp_path / "toy", weights="ema-050", bf16=True)
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "| 2,000 of test split | clean | 23.00 |" in card and "21.23" not in card
    assert "an average over the run, ema-050" in card and "rounded to bf16" in card
    assert "None is stated" in card and "license:" not in card
    average = Autoencoder.from_pretrained(finished, weights="ema-050").decoder.head.weight
    assert torch.equal(Autoencoder.from_pretrained(tmp_path / "toy").decoder.head.weight, average.bfloat16().float())


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"license_name": "MIT License"}, "--license MIT License: give the name"),
        ({"about": "two\nlines"}, "--about must be a line of text"),
        ({"weights": "ema-100"}, "holds no ema-100"),
    ],
)
def test_what_a_card_refuses(finished: Path, tmp_path: Path, more: dict[str, Any], fault: str) -> None:
    with pytest.raises(FastleError, match=fault):
        save_run(finished, tmp_path / "toy", **more)
    with pytest.raises(FastleError, match=r"holds config\.json of something else"):
        save_run(finished, finished)
    assert not (tmp_path / "toy").exists()


def test_the_commands_make_and_use_a_saved_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished, "run", ignore=shutil.ignore_patterns("eval-*"))
    main(["card", str(run), "-o", "toy", "--bf16"])
    out = capsys.readouterr().out
    assert "no figures of test images: `fastle eval " in out and "written to toy: look at toy/README.md" in out
    Image.new("L", (20, 24)).save("a.png")
    main(["reconstruct", "toy", "a.png", "-o", "b.png", "--device", "cpu"])
    assert Path("b.png").exists()


@pytest.mark.parametrize(
    ("dataset", "overrides", "command"),
    [
        ("shapes", {}, "fastle-train shapes"),
        ("shapes", {"recipe": "post", "steps": 9}, "fastle-train shapes --recipe post --steps 9"),
        ("folder", {"data": "/a b", "size": 32, "steps": 2000, "lr": 3e-3},
         "fastle-train folder --data DIR --size 32 --steps 2000 --lr 0.003"),
        ("shapes", {"clip": 0}, "fastle-train shapes --clip 0"),
        ("celeba", {"data": "/x", "latent": 512, "masked": True},
         "fastle-train celeba --data DIR --latent 512 --masked"),
        ("cifar10", {"data": "/x", "objective": "pixel", "averages": (0.05, 0.1)}, None),
        ("cifar10", {"data": "/x", "blur_views": ()}, "fastle-train cifar10 --data DIR --blur-views"),
        ("cifar10", {"data": "/x", "blur_views": (3,), "lr": 0.1}, None),
        ("cifar10", {"data": "/x", "judge_depth": "all"}, "fastle-train cifar10 --data DIR --judge-depth all"),
        ("cifar10", {"data": "/x", "judge_depth": "all", "blur_views": (3,)},
         "fastle-train cifar10 --data DIR --judge-depth all --blur-views 3"),
        ("celeba", {"data": "/x", "crop_ratio": 0.15, "sigreg_weight": 0.03}, None),
        ("folder", {"data": "/x", "full_view": False, "schedule": "cosine", "warmup": 0.0}, None),
        ("shapes", {"transform": "patch-mask", "mask_ratio": 0.5, "recipe": "post", "judge": "ema"}, None),
    ],
)  # fmt: skip
def test_the_command_of_a_configuration_gives_it(dataset: Any, overrides: dict[str, Any], command: str | None) -> None:
    made = make_config(dataset, **overrides)
    text = command_of(made)
    assert text is not None and (command is None or text == command)
    flags = vars(make_parser().parse_args(shlex.split(text)[1:]))
    given = {name: value for name, value in flags.items() if value is not None} | {
        name: value for name, value in overrides.items() if name == "data"
    }
    assert make_config(**given) == made


def test_a_configuration_for_which_there_are_no_flags() -> None:
    made = make_config("shapes", masked=True)
    assert command_of(replace(made, model=replace(made.model, latent=None))) is None
