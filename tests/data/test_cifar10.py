"""CIFAR-10: its splits, damaged files, and downloads."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fastle.data import cifar10
from fastle.data.cifar10 import download_cifar10, open_cifar10
from fastle.errors import DataError
from fastle.folders import Split

PLANES = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official layout with 10 images a file: 50 to train, of which 5 validate, and 10 to test."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    contents: list[dict[str, object]] = [
        {"data": part.reshape(10, -1), "labels": [0] * 10} for part in np.split(PLANES, 6)
    ]
    md5 = []
    for name, content in zip(names, [*contents, {"label_names": ["cat"]}], strict=True):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        md5.append(hashlib.md5(data).hexdigest())
    files = [list(pair) for pair in zip(names, md5, strict=True)]
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5[-1]})
    monkeypatch.setattr(cifar10, "TRAIN", 45)
    return tmp_path / "data"


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"], ids=["above", "itself"])
def test_each_split_holds_its_part(official: Path, inside: str) -> None:
    parts: dict[Split, slice] = {"train": slice(0, 45), "valid": slice(45, 50), "test": slice(50, 60)}
    for split, part in parts.items():
        images = open_cifar10(official / inside, split)
        batch = images.batch(range(len(images)))
        assert batch.dtype == torch.uint8 and torch.equal(batch, torch.from_numpy(PLANES[part]))


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as error:
        open_cifar10(root, "train")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_fifo_is_not_waited_for(official: Path) -> None:
    file = official / "cifar-10-batches-py" / "data_batch_2"
    file.unlink()
    os.mkfifo(file)
    assert "data_batch_2 is not a regular file" in refusal(official)


def test_a_missing_folder_is_named_with_a_hint(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "--download" in message


def test_a_damaged_or_missing_file_is_refused(official: Path) -> None:
    batch = official / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert "damaged (md5)" in refusal(official)
    batch.unlink()
    assert "--download" in refusal(official)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"], ids=["above", "itself"])
def test_a_download_goes_where_it_is_looked_for(
    official: Path, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an archive that is there already is extracted, not fetched
    archive = tmp_path / "new" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(official / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    root = tmp_path / "new" / inside
    download_cifar10(root)
    assert len(open_cifar10(root, "test")) == 10
    archive.unlink()
    # nothing to do: neither the archive nor the network is needed
    download_cifar10(root)


def test_a_failed_download_says_what_to_do_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(DataError) as error:
        download_cifar10(tmp_path / "new")
    message = str(error.value)
    assert "\n" not in message
    assert CIFAR10.url in message
    assert str(tmp_path / "new") in message
