"""Files that cannot be used: all of them are named at once or skipped, and one that goes bad later is named too."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastle.config import ConfigError, DataConfig, RunConfig
from fastle.data import Identity, open_images, open_training
from fastle.data.cache import cache_folder
from fastle.data.decode import BadFiles
from fastle.errors import DataError
from fastle.presets import make_config
from tests.data import pictures
from tests.data.caches import CACHES, config, everything, loading
from tests.data.pictures import (
    BY_PILLOW,
    GOOD,
    HEIC,
    NOT_AN_IMAGE,
    UNSUPPORTED,
    encoded,
    picture,
    write_bad,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("cache_home")
# of crops; images of 20x20 are too small
SIZE = 24


@pytest.fixture
def folder(tmp_path: Path) -> tuple[DataConfig, dict[str, str]]:
    """200 good files and nine bad ones, in train/ and valid/, and the faults of the bad ones."""
    root = tmp_path / "photographs"
    write_pictures(root / "train", 150)
    write_pictures(root / "valid", 50, first=150)
    write_pictures(root / "test", 5, first=200)
    # a folder is no image, whatever its name
    (root / "train" / "x.jpg").mkdir()
    faults = {f"train/{name}": fault for name, fault in write_bad(root / "train", SIZE).items()}
    for name in ("bad-empty.jpg", "bad-gif.gif", "bad-truncated.jpg"):
        faults[f"valid/{name}"] = faults.pop(f"train/{name}")
        (root / "train" / name).rename(root / "valid" / name)
    (root / "valid" / "bad-page.jpeg").write_bytes(b"<html>no</html>")
    return config(root, size=SIZE), faults | {"valid/bad-page.jpeg": "is an HTML page"}


@pytest.mark.parametrize(("cache", "decoder"), [("none", "torchvision"), ("none", "dali"), ("disk", "dali")])
def test_every_bad_file_of_both_splits_is_listed(
    cache: str, decoder: str, folder: tuple[DataConfig, dict[str, str]]
) -> None:
    data, faults = folder
    with pytest.raises(BadFiles) as error:
        open_training(data, loading(decoder, cache))
    message = str(error.value)
    for name, fault in faults.items():
        assert re.search(rf"{re.escape(name)} [^\n]*{re.escape(fault)}", message), name
    # a count, a line for each, and the way out
    assert message.count("\n") == len(faults) + 1 and "--bad-images skip" in message
    assert not re.search(r"Traceback|\.cpp", message)
    assert list(cache_folder().rglob("*.partial")) == []


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
def test_skipped_files_are_left_out_and_counted(decoder: str, folder: tuple[DataConfig, dict[str, str]]) -> None:
    data, faults = replace(folder[0], bad_images="skip"), folder[1]
    first: list[torch.Tensor] = []
    identities: set[Identity] = set()
    for cache in CACHES:
        # the second time, the cache lists them
        for _ in range(2):
            messages: list[str] = []
            train, valid, identity = open_training(data, loading(decoder, cache, messages))
            assert len(train) + len(valid) == 200 and identity.count == 150
            identities.add(identity)
            said = "\n".join(messages)
            assert f"skipped {len(faults)} images" in said and "\n  and 4 more" in said
            batches = [everything(train), everything(valid)]
            first = first or batches
            assert all(map(torch.equal, batches, first))
        assert ("reused" in said) == (cache != "none")
    assert len(identities) == 1


def test_a_split_lists_only_its_own_bad_files(folder: tuple[DataConfig, dict[str, str]]) -> None:
    data, faults = folder
    for cache in ("none", "disk"):
        with pytest.raises(BadFiles) as error:
            open_images(data, "train", loading("auto", cache))
        assert len(error.value.faults) == sum(name.startswith("train/") for name in faults)
        assert len(open_images(data, "test", loading("auto", cache))) == 5


def test_a_cache_without_the_bad_files_does_not_hide_them(folder: tuple[DataConfig, dict[str, str]]) -> None:
    data, faults = folder
    open_training(replace(data, bad_images="skip"), loading("torchvision", "disk"))
    with pytest.raises(BadFiles) as error:
        open_training(data, loading("torchvision", "disk"))
    assert len(error.value.faults) == len(faults)


def test_unsupported_formats_are_bad_files(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 5)
    for extension, encode in UNSUPPORTED.items():
        (tmp_path / "train" / f"photo.{extension}").write_bytes(encode(picture(0, 30, 30)))
        (tmp_path / "train" / f"other.{extension.upper()}").write_bytes(encode(picture(0, 30, 30)))
    (tmp_path / "train" / "notes.txt").write_text("no image, and not called one")
    # a wrong extension does no harm
    (tmp_path / "train" / "webp.gif").write_bytes(encoded(picture(0, 30, 30), "WEBP"))
    data = config(tmp_path, size=SIZE)
    with pytest.raises(BadFiles) as error:
        open_images(data, "train", loading("auto", "none"))
    assert len(re.findall(NOT_AN_IMAGE, str(error.value))) == len(error.value.faults) == 2 * len(UNSUPPORTED)
    assert len(open_images(replace(data, bad_images="skip"), "train", loading("auto", "none"))) == 6


def test_a_split_of_bad_files_alone_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 5)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "empty.jpg").touch()
    for cache in ("none", "disk"):
        with pytest.raises(DataError, match="test: every image is unusable"):
            open_images(config(tmp_path, bad_images="skip"), "test", loading("auto", cache))


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
def test_a_file_that_goes_bad_after_the_check_is_named_by_its_batch(decoder: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 20)
    paths = sorted((tmp_path / "train").iterdir())
    images = open_images(config(tmp_path, size=SIZE), "train", loading(decoder, "none"))
    expected = everything(images)
    paths[3].write_bytes(pictures.damaged_png(picture(3, 29, 36)))
    paths[7].unlink()
    paths[9].write_bytes(b"<html>the network share is gone</html>")
    with pytest.raises(BadFiles) as error:
        images.batch(range(2, 12))
    faults = {1: f"{paths[3]} does not decode", 5: f"{paths[7]} cannot be read", 7: f"{paths[9]} is an HTML page"}
    assert error.value.faults.keys() == faults.keys()
    assert all(error.value.faults[position].startswith(fault) for position, fault in faults.items())
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


@pytest.mark.parametrize(("cache", "decoder"), [("none", "torchvision"), ("none", "dali"), ("disk", "dali")])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, cache: str, decoder: str) -> None:
    root = tmp_path / "photographs"
    write_pictures(root / "train", 3)
    write_pictures(root / "valid", 1)
    write_pictures(root / "test", 1)
    os.mkfifo(root / "train" / "fifo.jpg")
    (root / "train" / "zeros.png").symlink_to("/dev/zero")
    (root / "train" / "nowhere.png").symlink_to("/nowhere")
    with (root / "train" / "huge.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(BadFiles) as error:
        open_training(config(root, size=SIZE), loading(decoder, cache))
    message = str(error.value)
    assert re.search(r"fifo.jpg cannot be read: it is not a regular file", message)
    assert re.search(r"zeros.png cannot be read: it is not a regular file", message)
    assert re.search(r"huge.jpg cannot be read: it has [0-9,]+ bytes, where 800,000,000 are the most", message)
    assert "nowhere.png cannot be read: No such file" in message and len(error.value.faults) == 4


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_heic_without_its_package_is_never_skipped(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 3)
    (tmp_path / "train" / "a.heic").write_bytes(HEIC)
    with pytest.raises(DataError) as error:
        open_training(config(tmp_path, bad_images="skip"), loading("auto", cache))
    line = f'{tmp_path / "train" / "a.heic"} is a HEIC, which needs pillow-heif: pip install "fastle[heic]"'
    assert str(error.value) == line and list(cache_folder().rglob("*.safetensors")) == []


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_it_is_said_once_how_many_images_pillow_decodes(cache: str, decoder: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 3)
    for name, kind in (("train/a.tif", "tiff"), ("train/b.tiff", "tiff"), ("valid/c.webp", "webp-animated")):
        (tmp_path / name).write_bytes(BY_PILLOW[kind](picture(0, 30, 30)))
    (tmp_path / "train" / "deep.png").write_bytes(GOOD["png-16"](picture(0, 30, 30)))
    messages: list[str] = []
    train, valid, _ = open_training(config(tmp_path), loading(decoder, cache, messages))
    assert (len(train), len(valid)) == (6, 4)
    assert [message for message in messages if "Pillow" in message or "8 bits" in message] == [
        "decoder: Pillow for 2 TIFF, 1 WebP, which DALI and torchvision cannot decode; it is slower",
        "decoder: of 1 images with more than 8 bits, the upper 8 are kept; a run with --bits 16 keeps all",
    ]
