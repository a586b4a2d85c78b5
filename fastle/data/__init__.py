"""Where images come from: shapes, CIFAR-10, CelebA, any folder; decoded, ordered and fed to the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastle.errors import DataError

from . import celeba, cifar10, folder, shapes
from .decode import Decoder, DiskFile, TorchvisionDecoder
from .feed import Feed
from .images import Images, Split, check_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fastle.config import DataConfig

__all__ = ["Decoder", "Feed", "Images", "Split", "decode_files", "open_images", "open_tree", "train_size"]


def open_images(config: DataConfig, split: Split) -> Images:
    """The images of a split, uint8 (C, size, size) each.

    Raises:
        DataError: they are not there, not complete or not of that size; the message says what to do.
    """
    check_split(split)
    if config.dataset == "shapes":
        return shapes.make_shapes(split, config.size)
    root = _root(config)
    if config.dataset == "cifar10":
        if config.size != cifar10.SIZE:
            raise DataError(f"--size {config.size} cannot be: the images of CIFAR-10 are 32x32, and are not resized")
        return cifar10.open_cifar10(root, split)
    if config.dataset == "celeba":
        return celeba.open_celeba(root, split, _decoder(config))
    return folder.open_folder(root, split, _decoder(config))


def open_tree(config: DataConfig, root: Path) -> Images:
    """Every image below a folder, cut to size as the dataset's own are.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    return folder.open_folder(root, None, _decoder(config))


def decode_files(config: DataConfig, paths: Sequence[Path]) -> Tensor:
    """uint8 (B, C, size, size) of image files, cut to size as the dataset's own are.

    Raises:
        DataError: a file cannot be used; the message names it.
    """
    return _decoder(config)([DiskFile(str(path)) for path in paths])


def train_size(config: DataConfig) -> int | None:
    """How many training images there are, told without reading one; None for a folder that is not there.

    Raises:
        DataError: the folder is there, but cannot be split.
    """
    if config.dataset == "folder":
        root = None if config.root is None else Path(config.root)
        return len(folder.split_paths(root, "train")) if root is not None and root.exists() else None
    return {"shapes": shapes.SIZES["train"], "cifar10": cifar10.TRAIN, "celeba": celeba.TRAIN}[config.dataset]


def _decoder(config: DataConfig) -> TorchvisionDecoder:
    # CelebA's images have one size, and the method crops them; the sizes elsewhere are anyone's
    return TorchvisionDecoder(config.size, config.channels, resize=config.dataset != "celeba")


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise DataError(f"{config.dataset} needs --data, the folder that holds it")
    return Path(config.root)
