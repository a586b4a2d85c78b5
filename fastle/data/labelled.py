"""Labelled images: a folder of images for each class, shards of such folders, or parquet files of labelled rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastle.config import DataConfig
from fastle.errors import DataError
from fastle.folders import find_images, find_shards

from .decode import DiskFile, ImageFile
from .images import Images
from .loading import Loading
from .open import open_files
from .shard_classes import shard_classes
from .shard_index import open_shards
from .shards import ShardFiles

HELD_OUT = 5  # one in so many images of each class is held out to test
Image = TypeVar("Image", Path, int)  # a file, or a row of an index
Files = tuple[Sequence[ImageFile], list[str]]  # and the class of each


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images and the number of each one's class, (N,) int64."""

    images: Images
    labels: Tensor


def open_labelled(config: DataConfig, root: Path, loading: Loading) -> tuple[Labelled, Labelled, list[str]]:
    """Opens labelled images to train and to test.

    Args:
        config: Height, width and channels that the images get, as those of the dataset do.
        root: Holds a folder for each class, or train/ and test/, which hold one for each class. In the first case a
            fifth of each class is held out to test, chosen by a hash of the path. Or shards, see `shard_classes`.
        loading: How images are loaded.

    Returns:
        The images to train, those to test, and the names of the classes.

    Raises:
        DataError: There are fewer than two classes, a class has too few images, test/ has a class that train/ lacks, or
            an image in a shard has no class.
        BadFiles: See `open_images`.
    """
    shown: set[str] = set()

    def say_once(text: str) -> None:
        if text not in shown:
            loading.say(text)
        shown.add(text)

    # the decoder says the same of both
    once = replace(loading, say=say_once)
    shards = find_shards(root)
    train, test = _in_shards(root, shards, loading) if shards else _in_folders(root)
    names = sorted(set(train[1]))
    return _open(config, train, names, once), _open(config, test, names, once), names


def _in_folders(root: Path) -> tuple[Files, Files]:
    if (root / "train").is_dir() and (root / "test").is_dir():
        splits = {split: _classes(root / split) for split in ("train", "test")}
    else:
        splits = {"all": _classes(root)}

    def files(split: dict[str, list[Path]]) -> Files:
        images = [(path, name) for name in sorted(split) for path in split[name]]
        return [DiskFile(str(path)) for path, _ in images], [name for _, name in images]

    train, test = _train_and_test(splits, root, lambda path: path.relative_to(root))
    return files(train), files(test)


def _in_shards(root: Path, shards: Sequence[Path], loading: Loading) -> tuple[Files, Files]:
    index = open_shards(root, shards, loading)
    splits, path_of = shard_classes(index, root, loading)

    def files(split: dict[str, list[int]]) -> Files:
        images = sorted((row, name) for name, rows in split.items() for row in rows)
        return ShardFiles(index, np.array([row for row, _ in images]), "labelled"), [name for _, name in images]

    train, test = _train_and_test(splits, root, path_of)
    return files(train), files(test)


def _classes(root: Path) -> dict[str, list[Path]]:
    """The images of each class, by the name of its folder."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: give the folder that holds one for each class")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: [folder / path for path in find_images(folder)] for folder in folders}


def _train_and_test(
    splits: dict[str, dict[str, list[Image]]], root: Path, path_of: Callable[[Image], str | Path]
) -> tuple[dict[str, list[Image]], dict[str, list[Image]]]:
    """The images to train and to test, by class.

    Args:
        splits: Images by class of "train" and "test", or of "all", of which a part is held out.
        root: For messages.
        path_of: The path of an image below `root`.
    """
    if "all" not in splits:
        train, test = splits["train"], splits["test"]
        if unknown := sorted(test.keys() - train.keys()):
            raise DataError(f"{root / 'test' / unknown[0]} is a class that {root / 'train'} lacks: name both the same")
    else:
        train, test = {}, {}
        for name, images in splits["all"].items():
            if len(images) < 2:
                raise DataError(f"{root / name} holds one image, too few to train and to test: add images")
            hashed = sorted(images, key=lambda image: hashlib.sha1(os.fsencode(path_of(image))).digest())
            share = -(-len(images) // HELD_OUT)
            test[name], train[name] = sorted(hashed[:share]), sorted(hashed[share:])
    if len(train) < 2:
        raise DataError(f"{root} holds {len(train)} class: give a folder with a folder of images for each of several")
    return train, test


def _open(config: DataConfig, files: Files, names: list[str], loading: Loading) -> Labelled:
    number = {name: position for position, name in enumerate(names)}
    label_of = {file.name: number[name] for file, name in zip(*files, strict=True)}
    # images that are skipped have no label
    images = open_files(config, files[0], loading)
    return Labelled(images, torch.tensor([label_of[file.name] for file in images.files]))
