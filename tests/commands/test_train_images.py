"""fastle-train and its images: bad files, unavailable choices, and resuming with another cache and decoder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastle.commands.main
import fastle.commands.train
import fastle.training.loop
from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.config import RunConfig
from fastle.data.dali import why_no_dali
from fastle.data.order import batch_indices
from fastle.presets import make_config
from fastle.training.report import read_metrics
from fastle.training.run import RunDirectory
from tests.data import pictures
from tests.data.pictures import write_bad, write_pictures
from tests.training.killing import Killed, kill_after

Command = Callable[..., tuple[int, str, str]]
SIZE = 24
TINY = ("--size", str(SIZE), "--batch-size", "4", "--slices", "8", "--device", "cpu")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command(argument…): fastle-train's exit status, stdout and stderr, with a tiny model and without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def tiny(*arguments: Any, **more: Any) -> RunConfig:
        config = make_config(*arguments, **more)
        return replace(config, model=replace(config.model, hidden=8, map_channels=8))

    monkeypatch.setattr(fastle.commands.train, "make_config", tiny)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status, more = 0, ""
        try:
            fastle.commands.train.main([str(argument) for argument in (*arguments, *TINY)])
        except SystemExit as left:
            status, more = (left.code, "") if isinstance(left.code, int) else (1, f"{left.code}\n")
        printed = capsys.readouterr()
        return status, printed.out, printed.err + more

    return call


def write_photographs(tmp_path: Path, count: int) -> Path:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / "photographs" / split, count)
    return tmp_path / "photographs"


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = (load_checkpoint(latest_checkpoint(run)).tensors for run in (left, right))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_lists_bad_files_or_skips_them(command: Command, tmp_path: Path) -> None:
    root = write_photographs(tmp_path, 20)
    faults = write_bad(root / "train", SIZE)
    run = ("folder", "--data", root, "--steps", "4", "--run", tmp_path / "run")
    for more in ((), ("--cache", "none", "--bad-images", "error")):
        status, _, err = command(*run, *more)
        assert status == 1 and all(name in err and fault in err for name, fault in faults.items())
        # nothing is trained, and nothing is in the way of the next attempt
        assert "Traceback" not in err and not (tmp_path / "run").exists()
    status, out, _ = command(*run, "--bad-images", "skip")
    assert status == 0 and "20 training images, 20 to validate" in out and f"skipped {len(faults)} images" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["bad_images"] == "skip"
    # the rule is a part of the run's configuration; the cache and the decoder are not
    for name in faults:
        (root / "train" / name).unlink()
    status, _, err = command(*run, "--steps", "6")
    assert status == 1 and "another configuration" in err and "data.bad_images skip → error" in err
    status, out, _ = command(*run, "--steps", "6", "--bad-images", "skip", "--cache", "none")
    assert status == 0 and "resumed from" in out


def test_a_run_resumes_with_another_cache_and_decoder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photographs(tmp_path, 22)
    dali = "torchvision" if why_no_dali() else "dali"
    # epochs of five steps
    run = ("folder", "--data", root, "--steps", "20")
    whole, killed = ("--run", tmp_path / "whole"), ("--run", tmp_path / "killed")
    status, out, _ = command(*run, *whole, "--cache", "none", "--decoder", "torchvision")
    assert status == 0 and "cache: none" in out
    for cache, decoder, steps in (("disk", "torchvision", 7), ("none", dali, 4)):
        kill_after(steps, monkeypatch)
        with pytest.raises(Killed):
            command(*run, *killed, "--cache", cache, "--decoder", decoder)
    assert command(*run, *killed, "--cache", "auto", "--decoder", "auto")[0] == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    for key in ("step", "total", "valid_psnr"):
        assert [row[key] for row in one] == [row[key] for row in other]


def test_a_file_that_only_decoding_finds_costs_no_step(command: Command, tmp_path: Path) -> None:
    root = write_photographs(tmp_path, 44)
    train = sorted((root / "train").iterdir())
    bad = train[int(batch_indices(44, step=7, batch_size=4, seed=0, rank=0, world_size=1)[2])]
    kept = bad.read_bytes()
    # its ends are right, so that the check before training passes it
    bad.write_bytes(pictures.damaged_png(Image.open(bad)))
    run = ("folder", "--data", root, "--steps", "11")
    status, _, err = command(*run, "--cache", "none", "--run", tmp_path / "run")
    assert status == 1 and re.search(rf"{bad} does not decode", err)
    assert latest_checkpoint(tmp_path / "run").name == "step-00000007.safetensors"
    # building a cache decodes it before the first step
    status, _, err = command(*run, "--cache", "disk", "--run", tmp_path / "cached")
    assert status == 1 and re.search(rf"{bad} does not decode", err) and not (tmp_path / "cached").exists()
    # once it is mended, the run goes on as if nothing had happened
    bad.write_bytes(kept)
    assert command(*run, "--cache", "none", "--run", tmp_path / "run")[0] == 0
    assert command(*run, "--cache", "disk", "--run", tmp_path / "cached")[0] == 0
    assert_same_weights(tmp_path / "run", tmp_path / "cached")


def test_unavailable_choices_say_why(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("disk", "none"):
        status, _, err = command("shapes", "--steps", "1", "--cache", cache, "--run", tmp_path / "run")
        assert status == 1 and f"--cache {cache}" in err and "memory" in err and err.count("\n") == 1
    root = write_photographs(tmp_path, 20)
    run = ("folder", "--data", root, "--steps", "1", "--run", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = why_no_dali()
    assert reason and "nvidia-dali" in reason and "\n" not in reason
    for decoder in ("dali", "dali-gpu"):
        status, _, err = command(*run, "--decoder", decoder)
        assert status == 1 and f"--decoder {decoder}" in err and reason in err and err.count("\n") == 1
    status, out, _ = command(*run, "--decoder", "auto", "--cache", "none")
    # once, with the reason, though two splits are opened
    assert status == 0 and out.count(reason) == 1 and "torchvision" in out


def test_grey_images_are_trained_on_measured_and_shown(command: Command, tmp_path: Path) -> None:
    root, run = write_photographs(tmp_path, 6), tmp_path / "run"
    deep = root / "test" / "deep.tif"
    deep.write_bytes(pictures.encoded(Image.fromarray(pictures.sixteen(pictures.picture(0, 30, 30))[..., 0]), "TIFF"))
    assert command("folder", "--data", root, "--channels", "1", "--steps", "2", "--run", run)[0] == 0
    fastle.commands.main.main(["eval", str(run), "--device", "cpu"])
    figures = json.loads((run / "eval-test.json").read_text())
    # luma and chroma are of colour images
    assert figures["images"] == 7 and "psnr" in figures["clean"] and "psnr_luma" not in figures["clean"]
    picture = tmp_path / "picture.png"
    fastle.commands.main.main(["reconstruct", str(run), str(deep), "-o", str(picture), "--device", "cpu"])
    assert Image.open(picture).width > 96


def test_images_of_16_bits_are_trained_on_and_used(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all of them are black in 8 bits
    for split in ("train", "valid", "test"):
        (tmp_path / "deep" / split).mkdir(parents=True)
        for seed in range(8):
            values = np.asarray(pictures.picture(seed, 30, 30)).astype(np.uint16)
            (tmp_path / "deep" / split / f"{seed}.png").write_bytes(pictures.png(values, colour=2))
    deep, whole, killed = (tmp_path / name for name in ("deep", "whole", "killed"))
    run = ("folder", "--data", deep, "--steps", "4", "--bits", "16")
    status, out, _ = command(*run, "--run", whole, "--cache", "none")
    assert status == 0 and "of 16 images with more than 8 bits, all bits are kept" in out
    kill_after(2, monkeypatch)
    with pytest.raises(Killed):
        command(*run, "--run", killed, "--cache", "disk")
    status, _, err = command("folder", "--data", deep, "--steps", "4", "--run", killed)
    assert status == 1 and "data.bits 16 → 8" in err
    assert command(*run, "--run", killed, "--cache", "host")[0] == 0
    assert_same_weights(whole, killed)

    # whoever uses the model sees the images as it did
    main = fastle.commands.main.main
    main(["card", str(whole), "-o", str(tmp_path / "card")])
    latents = []
    for model in ("whole", "killed", "card"):
        main(["encode", model, str(deep / "test"), "-o", f"{model}.npy", "--device", "cpu"])
        latents.append(np.load(f"{model}.npy"))
    assert np.array_equal(latents[0], latents[1]) and np.allclose(latents[0], latents[2])
    assert np.ptp(latents[0], axis=0).max() > 1e-4
    main(["eval", "whole", "--device", "cpu"])
    main(["reconstruct", "card", str(deep / "test" / "0.png"), "-o", "picture.png", "--device", "cpu"])
    main(["check", "killed"])
