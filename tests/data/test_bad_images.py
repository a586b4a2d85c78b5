"""Files that cannot be used: all named at once, or left out; and a run that meets one later, or goes on elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import fastle.commands.train
import fastle.training.loop
from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.config import ConfigError, DataConfig, RunConfig
from fastle.data import Images, Loading, open_images, open_training
from fastle.data.cache import cache_folder
from fastle.data.dali import why_no_dali
from fastle.data.decode import BadFiles
from fastle.data.order import batch_indices
from fastle.errors import DataError
from fastle.presets import make_config
from fastle.training.report import read_metrics
from fastle.training.run import RunDirectory
from tests.data import pictures
from tests.data.pictures import FOREIGN, NOT_AN_IMAGE, bomb, encoded, half, picture, write_bad, write_pictures
from tests.training.killing import Killed, kill_after

ROOT = Path(__file__).parents[2]
# of folders: 20x20 is too small for it, and what `write_pictures` writes is made smaller
SIZE = 24
CACHES = ("none", "disk", "host", "auto")
DECODERS = ("torchvision", "dali")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- splits with bad files among their own


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """200 good files and nine bad ones, in train/ and valid/; the bad ones with their faults."""
    root = tmp_path / "photographs"
    write_pictures(root / "train", 150)
    write_pictures(root / "valid", 50, first=150)
    write_pictures(root / "test", 5, first=200)
    (root / "train" / "x.jpg").mkdir()
    faults = {f"train/{name}": fault for name, fault in write_bad(root / "train", SIZE).items()}
    # some of them are found in the other split
    for name in ("bad-empty.jpg", "bad-gif.gif", "bad-truncated.jpg"):
        faults[f"valid/{name}"] = faults.pop(f"train/{name}")
        (root / "train" / name).rename(root / "valid" / name)
    (root / "valid" / "bad-page.jpeg").write_bytes(b"<html>no</html>")
    return root, faults | {"valid/bad-page.jpeg": "is an HTML page"}


@pytest.fixture
def celeba(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The issue's folder as CelebA, where images are cropped: 200 good files and nine bad ones."""
    image, root = picture(0, 70, 66), tmp_path / "photographs"
    folder = pictures.write_celeba(root, [(f"{i:06}.jpg", encoded(image, "JPEG")) for i in range(209)], valid=60)
    faults: dict[str, str] = {}
    bad = {
        "truncated": half(encoded(image, "JPEG")),
        "is empty": b"",
        "is an HTML page": b"<html>no</html>",
        f"is a GIF, {NOT_AN_IMAGE}": encoded(image, "GIF"),
        "is 20x20, smaller than the 64x64 asked for": encoded(picture(0, 20, 20), "JPEG"),
        "is 12000x12000, more than 100 megapixels": bomb(),
        "is 70x63, smaller than the 64x64 asked for": encoded(picture(0, 70, 63), "PNG"),
    }
    for number, (fault, data) in enumerate(bad.items()):
        name = f"{31 * number:06}.jpg"
        (folder / name).write_bytes(data)
        faults[name] = fault
    # unreadable in two ways
    for name in ("000005.jpg", "000205.jpg"):
        (folder / name).unlink()
    (folder / "000005.jpg").symlink_to(folder / "gone.jpg")
    (folder / "000205.jpg").mkdir()
    return root, faults | {
        "000005.jpg": "cannot be read: No such file or directory",
        "000205.jpg": "cannot be read: Is a directory",
    }


Source = tuple[str, int, Path, dict[str, str]]


@pytest.fixture(params=["folder", "celeba"])
def source(request: pytest.FixtureRequest) -> Source:
    root, faults = request.getfixturevalue(request.param)
    return request.param, SIZE if request.param == "folder" else 64, root, faults


def loading(decoder: str, cache: str, said: list[str]) -> Loading:
    if decoder == "dali":
        pictures.dali_or_skip()
    return Loading(decoder=decoder, cache=cache, say=lambda text: said.append(str(text)))  # type: ignore[arg-type]


def config_of(source: Source, **more: Any) -> DataConfig:
    return DataConfig(dataset=source[0], root=str(source[2]), size=source[1], channels=3, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cache", CACHES)
def test_every_bad_file_of_both_splits_is_listed_with_its_fault(cache: str, decoder: str, source: Source) -> None:
    faults = source[3]
    with pytest.raises(BadFiles) as error:
        open_training(config_of(source), loading(decoder, cache, []))
    message = str(error.value)
    for name, fault in faults.items():
        assert re.search(rf"{re.escape(name)} [^\n]*{re.escape(fault)}", message), name
    assert message.count("smaller than the") == sum("smaller than the" in fault for fault in faults.values()) >= 1
    assert any("is 20x20, smaller than the" in fault for fault in faults.values())
    # the good ones are not in it, and neither is how the package came to know
    assert not re.search(r"/0\d+\.png|x\.jpg/|Traceback|\.cpp", message)
    assert "--bad-images skip" in message
    # what was begun is not left lying about
    left = [path.name for path in cache_folder().rglob("*.partial")] if cache_folder().exists() else []
    assert left == []


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_one_split_lists_its_own(cache: str, folder: tuple[Path, dict[str, str]]) -> None:
    root, faults = folder
    with pytest.raises(BadFiles) as error:
        open_images(config_of(("folder", SIZE, root, faults)), "train", loading("auto", cache, []))
    assert all((name.removeprefix("train/") in str(error.value)) == name.startswith("train/") for name in faults)
    assert len(open_images(config_of(("folder", SIZE, root, faults)), "test", loading("auto", cache, []))) == 5


def everything(images: Images) -> Tensor:
    return images.batch(range(len(images)))


def tells(said: list[str], count: int) -> bool:
    return any(re.search("left out|skip", line) and re.search(rf"\b{count}\b", line) for line in said)


def test_skip_leaves_them_out_and_says_how_many(source: Source, tmp_path: Path, monkeypatch: Any) -> None:
    faults, data = source[3], config_of(source, bad_images="skip")
    first: list[Tensor] = []
    # in both splits together, or in each
    counts = (6, 3) if source[0] == "celeba" else (5, 4)
    for decoder in DECODERS:
        for cache in CACHES:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{decoder}-{cache}"))
            # the second opening takes what the first has left
            for again in (False, True):
                said: list[str] = []
                train, valid = open_training(data, loading(decoder, cache, said))
                assert len(train) + len(valid) == 200
                assert tells(said, len(faults)) or all(tells(said, count) for count in counts), said
                assert ("reused" in "".join(said)) == (again and cache != "none")
                batches = [everything(train), everything(valid)]
                first = first or batches
                assert all(map(torch.equal, batches, first))


def test_a_cache_of_the_good_ones_is_not_one_of_all(folder: tuple[Path, dict[str, str]]) -> None:
    source: Source = ("folder", SIZE, *folder)
    open_training(config_of(source, bad_images="skip"), loading("torchvision", "disk", []))
    for _ in range(2):
        with pytest.raises(BadFiles) as error:
            open_training(config_of(source), loading("torchvision", "disk", []))
        assert all(name.split("/")[1] in str(error.value) for name in folder[1])
    said: list[str] = []
    train, valid = open_training(config_of(source, bad_images="skip"), loading("torchvision", "disk", said))
    assert len(train) + len(valid) == 200


def test_a_bad_file_that_is_mended_is_taken(folder: tuple[Path, dict[str, str]]) -> None:
    root, faults = folder
    data = config_of(("folder", SIZE, root, faults), bad_images="skip")
    for cache in ("disk", "none"):
        before = len(open_images(data, "train", loading("auto", cache, [])))
        (root / "train" / "bad-page.jpg").unlink(missing_ok=True)
        (root / "train" / f"mended-{cache}.jpg").write_bytes(encoded(picture(1, SIZE, SIZE), "JPEG"))
        assert len(open_images(data, "train", loading("auto", cache, []))) == before + 1
        (root / "train" / "bad-bomb.png").write_bytes(encoded(picture(1, SIZE, SIZE), "PNG"))
        assert len(open_images(data, "train", loading("auto", cache, []))) == before + (2 if cache == "disk" else 1)


def test_foreign_kinds_are_bad_and_not_passed_over(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 5)
    for ending, encode in FOREIGN.items():
        (tmp_path / "train" / f"photo.{ending}").write_bytes(encode(picture(0, 30, 30)))
        (tmp_path / "train" / f"other.{ending.upper()}").write_bytes(encode(picture(0, 30, 30)))
    (tmp_path / "train" / "photo.tiff").write_bytes(FOREIGN["tif"](picture(0, 30, 30)))
    (tmp_path / "train" / "notes.txt").write_text("no image, and not said to be one")
    # a wrong ending does no harm
    (tmp_path / "train" / "webp.gif").write_bytes(encoded(picture(0, 30, 30), "WEBP"))
    source: Source = ("folder", SIZE, tmp_path, {})
    for cache in ("none", "disk"):
        with pytest.raises(BadFiles) as error:
            open_images(config_of(source), "train", loading("auto", cache, []))
        assert len(re.findall(NOT_AN_IMAGE, str(error.value))) == 2 * len(FOREIGN) + 1
        assert "notes.txt" not in str(error.value) and "webp.gif" not in str(error.value)
        assert len(open_images(config_of(source, bad_images="skip"), "train", loading("auto", cache, []))) == 6


def test_a_split_of_bad_files_alone_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 5)
    write_pictures(tmp_path / "valid", 5)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "empty.jpg").touch()
    data = config_of(("folder", SIZE, tmp_path, {}), bad_images="skip")
    for cache in ("none", "disk"):
        with pytest.raises(DataError):
            open_images(data, "test", loading("auto", cache, []))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_goes_bad_after_the_check_is_named_by_its_batch(decoder: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        paths = write_pictures(tmp_path / split, 20)
    paths = sorted((tmp_path / "train").iterdir())
    source: Source = ("folder", SIZE, tmp_path, {})
    images = open_images(config_of(source), "train", loading(decoder, "none", []))
    expected = everything(images)
    paths[3].write_bytes(pictures.damaged_png(picture(3, 29, 36)))
    paths[7].unlink()
    paths[9].write_bytes(b"<html>the network share is gone</html>")
    with pytest.raises(BadFiles) as error:
        images.batch(range(2, 12))
    assert sorted(error.value.faults) == [1, 5, 7]
    message = str(error.value)
    assert re.search(rf"{paths[3]} does not decode", message)
    assert re.search(rf"{paths[7]} cannot be read: No such file or directory", message)
    assert re.search(rf"{paths[9]} is an HTML page", message)
    # the others are as good as before
    assert torch.equal(images.batch([2, 4, 19]), expected[[2, 4, 19]])


def test_the_rule_for_bad_images_is_a_part_of_the_configuration() -> None:
    plain, skip = make_config("folder"), make_config("folder", bad_images="skip")
    assert plain.data.bad_images == "error" and skip.data.bad_images == "skip"
    assert RunConfig.from_dict(skip.to_dict()) == skip
    # a run from before there was a choice
    values = plain.to_dict()
    del values["data"]["bad_images"]
    assert RunConfig.from_dict(values) == plain
    with pytest.raises(ConfigError, match="--bad-images must be one of error, skip, not maybe"):
        replace(plain.data, bad_images="maybe")  # type: ignore[arg-type]


# ---- runs


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command(argument…): fastle-train's exit status, stdout and stderr, of a tiny model without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)
    monkeypatch.setattr(RunDirectory, "draw", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "300")

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


TINY = ("--size", str(SIZE), "--batch-size", "4", "--slices", "8", "--device", "cpu")


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = (load_checkpoint(latest_checkpoint(run)).tensors for run in (left, right))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_lists_them_or_leaves_them_out(
    command: Command, folder: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, faults = folder
    run = ("folder", "--data", root, "--steps", "4", "--run", tmp_path / "run")
    for more in ((), ("--cache", "none"), ("--cache", "disk", "--bad-images", "error")):
        status, _, err = command(*run, *more)
        assert status == 1 and all(name.split("/")[1] in err and fault in err for name, fault in faults.items())
        # nothing is trained, and nothing is in the way of the next attempt
        assert not (tmp_path / "run").exists()
    status, out, _ = command(*run, "--bad-images", "skip")
    assert status == 0 and "150 training images, 50 to validate" in out
    assert re.search(r"left out|skip", out)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["bad_images"] == "skip"
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 4
    # the rule is a part of the run, the cache and the decoder are not
    for path in (path for name in faults for path in [root / name]):
        path.unlink()
    status, _, err = command(*run, "--steps", "6")
    assert status == 1 and "another configuration" in err and "data.bad_images skip → error" in err
    status, out, _ = command(*run, "--steps", "6", "--bad-images", "skip", "--cache", "none")
    assert status == 0 and "resumed from" in out


def test_a_run_goes_on_with_another_cache_and_decoder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / "photographs" / split, 22)
    dali = "torchvision" if why_no_dali() else "dali"
    # epochs of five steps
    run = ("folder", "--data", tmp_path / "photographs", "--steps", "20")
    whole, killed = ("--run", tmp_path / "whole"), ("--run", tmp_path / "killed")
    status, out, _ = command(*run, *whole, "--cache", "none", "--decoder", "torchvision")
    assert status == 0 and "cache: none" in out
    ways = [("disk", "torchvision", 7), ("none", dali, 4), ("host", "torchvision", 5), ("auto", "auto", None)]
    for cache, decoder, steps in ways:
        if steps is None:
            assert command(*run, *killed, "--cache", cache, "--decoder", decoder)[0] == 0
            continue
        kill_after(steps, monkeypatch)
        with pytest.raises(Killed):
            command(*run, *killed, "--cache", cache, "--decoder", decoder)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    for key in ("step", "total", "valid_psnr"):
        assert [row[key] for row in one] == [row[key] for row in other]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_that_only_decoding_finds_ends_a_streaming_run_with_its_steps_saved(
    decoder: str, command: Command, tmp_path: Path
) -> None:
    if decoder == "dali":
        pictures.dali_or_skip()
    root = tmp_path / "photographs"
    for split in ("train", "valid", "test"):
        write_pictures(root / split, 44)
    train = sorted((root / "train").iterdir())
    options = {"batch_size": 4, "seed": 0, "rank": 0, "world_size": 1}
    # whole at both ends: the check of a stream passes it
    bad = train[int(batch_indices(44, step=7, **options)[2])]
    kept = bad.read_bytes()
    bad.write_bytes(pictures.damaged_png(Image.open(bad)))
    run = ("folder", "--data", root, "--steps", "11", "--decoder", decoder)
    status, _, err = command(*run, "--cache", "none", "--run", tmp_path / "run")
    assert status == 1 and re.search(rf"{bad} does not decode", err)
    assert latest_checkpoint(tmp_path / "run").name == "step-00000007.safetensors"
    # a cache finds it before the first step
    status, _, err = command(*run, "--cache", "disk", "--run", tmp_path / "cached")
    assert status == 1 and re.search(rf"{bad} does not decode", err) and not (tmp_path / "cached").exists()
    # mended, the run goes on as if nothing had been
    bad.write_bytes(kept)
    assert command(*run, "--cache", "none", "--run", tmp_path / "run")[0] == 0
    assert command(*run, "--cache", "disk", "--run", tmp_path / "cached")[0] == 0
    assert_same_weights(tmp_path / "run", tmp_path / "cached")


def test_choices_that_cannot_be_had_say_why(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("disk", "none"):
        status, _, err = command("shapes", "--steps", "1", "--cache", cache, "--run", tmp_path / "run")
        assert status == 1 and f"--cache {cache}" in err and "memory" in err and err.count("\n") == 1
    write_pictures(tmp_path / "photographs", 20)
    run = ("folder", "--data", tmp_path / "photographs", "--steps", "1", "--run", tmp_path / "run")
    # an import of it fails
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = why_no_dali()
    assert reason
    for decoder in ("dali", "dali-gpu"):
        status, _, err = command(*run, "--decoder", decoder)
        assert status == 1 and f"--decoder {decoder}" in err and reason in err and err.count("\n") == 1
    status, out, _ = command(*run, "--decoder", "auto", "--cache", "none")
    # said once, with the reason, though two splits are opened
    assert status == 0 and out.count(reason) == 1 and "torchvision" in out


def test_the_command_itself(tmp_path: Path, folder: tuple[Path, dict[str, str]]) -> None:
    """In a process of its own, as a user starts it: a folder with bad files is refused in one message."""
    root, faults = folder
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [
        sys.executable,
        "-c",
        "from fastle.commands.train import main; main()",
        "folder",
        "--data",
        str(root),
        *TINY,
    ]
    more = ["--steps", "2", "--cache", "host", "--decoder", "auto", "--bad-images", "error", "--run", "run"]
    ran = subprocess.run(
        [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert all(name.split("/")[1] in ran.stderr and fault in ran.stderr for name, fault in faults.items())
    assert not (tmp_path / "run").exists()
