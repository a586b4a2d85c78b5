"""Labelled images: those of shards are those of the folder that was packed in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastle.data.labelled import open_labelled
from fastle.errors import DataError
from tests.data.caches import config, everything, loading
from tests.data.pictures import encoded, picture
from tests.data.test_shards import write_folder, write_tar, write_zip

pytestmark = pytest.mark.usefixtures("cache_home")
Files = dict[str, bytes]
FOUR: Files = {f"{number}.png": b"" for number in range(1, 5)}


def contents(*splits: str) -> Files:
    """Twelve images of two classes in each split."""
    return {
        f"{split}{name}/{number:02}.png": encoded(picture(number + len(split) + len(name), 16, 16), "PNG")
        for split in splits
        for number in range(12)
        for name in ("cat", "dog")
    }


def labelled(root: Path) -> list[Any]:
    """The names of the classes, and images and labels to train and to test."""
    train, test, names = open_labelled(config(root), root, loading("torchvision", "none"))
    return [names, *((everything(split.images), split.labels) for split in (train, test))]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert left[0] == right[0] and left[0]
    for (images, labels), (other_images, other_labels) in zip(left[1:], right[1:], strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def two_tars(root: Path, files: Files) -> Path:
    for split in ("train", "test"):
        write_tar(root / f"{split}-000.tar", {n.removeprefix(f"{split}/"): d for n, d in files.items() if split in n})
    return root


@pytest.mark.parametrize(
    ("pack", "splits"),
    [
        (lambda root, files: write_zip(root / "a.zip", files), ("",)),
        (lambda root, files: write_tar(root / "a.tar", {f"./data/{n}": d for n, d in files.items()}), ("",)),
        (lambda root, files: write_zip(root / "a.zip", files), ("train/", "test/")),
        (two_tars, ("train/", "test/")),
    ],
    ids=["zip", "tar", "zip of splits", "a tar for each split"],
)
def test_packed_classes_are_those_of_the_folder(
    pack: Callable[[Path, Files], Path], splits: tuple[str, ...], tmp_path: Path
) -> None:
    files = contents(*splits)
    folder = labelled(write_folder(tmp_path / "folder", files))
    assert [len(labels) for _, labels in folder[1:]] == ([18, 6] if splits == ("",) else [24, 24])
    assert_same(labelled(pack(tmp_path / "packed", files)), folder)


@pytest.mark.parametrize(("pack", "ending"), [(write_tar, "tar"), (write_zip, "zip")], ids=["tar", "zip"])
def test_the_classes_of_webdataset(pack: Callable[[Path, Files], Path], ending: str, tmp_path: Path) -> None:
    """As in a folder for each class; keys and names say nothing of it, and other fields are passed over."""
    files = contents("train/", "test/")
    folder = labelled(write_folder(tmp_path / "folder", files))
    for split in ("train", "test"):
        # in two shards each, whose keys are the same
        for part, wanted in enumerate(("cat", "dog")):
            shard: Files = {}
            for name, data in files.items():
                _, kind, base = name.split("/") if name.startswith(split) else ("", "", "")
                if kind == wanted:
                    key = base.removesuffix(".png")
                    shard |= {f"{key}.rgb.png": data, f"{key}.cls": f"{kind}\n".encode(), f"{key}.json": b"{}"}
            pack(tmp_path / "packed" / f"{split}-{part:06}.{ending}", shard)
    assert_same(labelled(tmp_path / "packed"), folder)
    whole = {f"set/{n % 2}-{n:03}.{end}": data for n in range(20) for end, data in (
        ("png", encoded(picture(n, 16, 16), "PNG")), ("cls", str(n % 2 * 10).encode())
    )}  # fmt: skip
    names, (_, train), (_, test) = labelled(pack(tmp_path / f"whole.{ending}", whole))
    assert names == ["0", "10"] and train.bincount().tolist() == [8, 8] and test.bincount().tolist() == [2, 2]


def test_reading_the_classes_is_shown_at_every_start(tmp_path: Path) -> None:
    files = contents("")
    for name in ("a", "b"):
        write_tar(tmp_path / "packed" / f"{name}.tar", files)
    for index_is_built in (True, False):
        shown: dict[str, list[Any]] = {}

        def track(items: Iterable[Any], description: str, total: int, shown: dict[str, list[Any]] = shown) -> list[Any]:
            shown[description] = list(items)
            assert len(shown[description]) == total
            return shown[description]

        root = tmp_path / "packed"
        open_labelled(config(root), root, replace(loading("torchvision", "none"), track=track))
        assert shown["looking for .cls"] == [0, 1] and ("indexing the shards" in shown) == index_is_built


def write_rows(path: Path, column: str, labels: list[Any], names: list[str] | None = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": None} for data in list(contents("").values())[: len(labels)]]
    table = pa.table({"image": images, column: labels})
    if names is not None:
        about = {"info": {"features": {column: {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=4)
    return path


def test_labelled_rows_of_parquet_files(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", "label", [1, 0] * 5, ["dog", "cat"])
    names, (_, train), (_, test) = labelled(tmp_path / "hub")
    # by name, not by number
    assert names == ["cat", "dog"] and train.tolist() == test.tolist() == [0, 1] * 5
    names, (_, train), (_, test) = labelled(write_rows(tmp_path / "one.parquet", "label", ["b", "a"] * 5))
    assert names == ["a", "b"] and (len(train), len(test)) == (8, 2)


@pytest.mark.parametrize(
    ("pack", "fault"),
    [
        (
            lambda root: write_tar(root / "a.tar", {"1.png": b"", "2.png": b"", "3.png": b""}),
            r"a\.tar, 1\.png: neither a \.cls beside it nor a folder tells its class",
        ),
        (
            lambda root: write_tar(root / "a.tar", FOUR | {"1.cls": b"4", "3.cls": b"4"}),
            r"a\.tar, 2\.png: no \.cls beside it names its class",
        ),
        (
            lambda root: write_tar(root / "a.tar", contents("") | {"cat/03.cls": b"4"}),
            r"a\.tar, cat/00\.png: no \.cls beside it .* because of .*/a\.tar, cat/03\.cls its folder does not",
        ),
        (
            lambda root: write_zip(root / "a.zip", FOUR | {"1.cls": b""}),
            r"a\.zip, 1\.cls names no class: it must hold a number or a name",
        ),
        (
            lambda root: write_tar(root / "a.tar", FOUR | {"1.cls": b"4" * 201}),
            r"a\.tar, 1\.cls names no class",
        ),
        (
            lambda root: write_rows(root / "a.parquet", "kind", [0, 1] * 2),
            r"no column \"label\" of classes \(image, kind",
        ),
        (lambda root: write_rows(root / "a.parquet", "label", [0, 1, -1, 0], ["x", "y"]), "row 2 has no class"),
        (lambda root: write_zip(root / "a.zip", {f"a/{i}/1.png": b"" for i in "xyz"}), "x holds one image, too few"),
    ],
    ids=["no folder", "no tag", "one tag", "empty tag", "long tag", "no column", "no class", "one image"],
)
def test_what_has_no_classes_is_one_error(pack: Callable[[Path], Path], fault: str, tmp_path: Path) -> None:
    root = pack(tmp_path)
    with pytest.raises(DataError, match=fault) as error:
        labelled(root)
    assert "\n" not in str(error.value)
