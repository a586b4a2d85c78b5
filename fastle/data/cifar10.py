"""CIFAR-10 in its official Python layout, read by torchvision, which checks the md5 of every file."""

from __future__ import annotations

from pathlib import Path

import torch

from fastle.errors import DataError
from fastle.folders import Split
from fastle.lengths import TRAIN_IMAGES

from .images import ArrayImages

SIZE = 32  # pixels
# the first of the 50,000 official training images; the rest are the validation split
TRAIN = TRAIN_IMAGES["cifar10"]
FOLDER = "cifar-10-batches-py"


def open_cifar10(root: Path, split: Split) -> ArrayImages:
    """Opens a split of CIFAR-10, uint8 (N, 3, 32, 32).

    Args:
        root: The folder that holds cifar-10-batches-py, or that folder itself.
        split: "train" for the first 45,000 training images, "valid" for the last 5,000, "test" for the 10,000 test
            images.

    Raises:
        DataError: The folder does not exist, or the md5 of a file is wrong.
    """
    from torchvision.datasets import CIFAR10  # importing it takes seconds

    home = _home(root)
    batches = home / FOLDER
    if not batches.is_dir():
        raise DataError(f"no CIFAR-10 at {batches}: point --data at it, or download it with --download")
    # opening a FIFO would wait forever
    if odd := [file for file in sorted(batches.iterdir()) if not file.is_file() and not file.is_dir()]:
        raise DataError(f"{odd[0]} is not a regular file: download the files with --download")
    try:
        data = CIFAR10(home, train=split != "test").data
    except RuntimeError:
        raise DataError(f"{batches}: a file is missing or damaged (md5): download them with --download") from None
    images = torch.from_numpy(data).permute(0, 3, 1, 2)
    return ArrayImages({"train": images[:TRAIN], "valid": images[TRAIN:], "test": images}[split])


def download_cifar10(root: Path) -> None:
    """Downloads CIFAR-10 to where `open_cifar10(root, …)` looks for it, unless it is there already.

    Raises:
        DataError: The download failed, or `root` is not writable.
    """
    from torchvision.datasets import CIFAR10  # importing it takes seconds

    home = _home(root)
    try:
        CIFAR10(home, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"CIFAR-10 cannot be downloaded to {home} ({reason}): extract {CIFAR10.url} there") from None


def _home(root: Path) -> Path:
    return root.parent if root.name == FOLDER else root
