"""Labelled images: a folder of images for each class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastle.config import DataConfig
from fastle.errors import DataError
from fastle.folders import find_images

from .images import Images
from .loading import Loading
from .open import open_files

HELD_OUT = 5  # of so many images of a class, one is held out to test


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
            fifth of each class is held out to test, chosen by a hash of the path.
        loading: How images are loaded.

    Returns:
        The images to train, those to test, and the names of the classes.

    Raises:
        DataError: There are fewer than two classes, a class has too few images, or test/ has a class that train/ lacks.
        BadFiles: See `open_images`.
    """
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _classes(root / "train"), _classes(root / "test")
        if unknown := sorted(test.keys() - train.keys()):
            raise DataError(f"{root / 'test' / unknown[0]} is a class that {root / 'train'} lacks: name both the same")
    else:
        whole = _classes(root)
        train, test = {}, {}
        for name, paths in whole.items():
            if len(paths) < 2:
                raise DataError(f"{root / name} holds one image, too few to train and to test: add images")
            hashed = sorted(paths, key=lambda path: hashlib.sha1(os.fsencode(path.relative_to(root))).digest())
            share = -(-len(paths) // HELD_OUT)
            test[name], train[name] = sorted(hashed[:share]), sorted(hashed[share:])
    names = sorted(train)
    if len(names) < 2:
        raise DataError(f"{root} holds {len(names)} class: give a folder with a folder of images for each of several")
    return _open(config, train, names, loading), _open(config, test, names, loading), names


def _classes(root: Path) -> dict[str, list[Path]]:
    """The images of each class, by the name of its folder."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: give the folder that holds one for each class")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: [folder / path for path in find_images(folder)] for folder in folders}


def _open(config: DataConfig, classes: dict[str, list[Path]], names: list[str], loading: Loading) -> Labelled:
    paths = [path for name in names for path in classes.get(name, [])]
    label_of = {str(path): names.index(name) for name, of_class in classes.items() for path in of_class}
    # images that are skipped have no label
    images = open_files(config, paths, loading)
    return Labelled(images, torch.tensor([label_of[file.name] for file in images.files]))
