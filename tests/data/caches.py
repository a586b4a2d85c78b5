"""What the tests of the packed cache share: folders of images, and how they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastle.config import DataConfig
from fastle.data import Images, Loading, open_images
from tests.data.pictures import plainly, write_pictures

# smaller than the images, which are SIDE pixels wide and higher than that
SIZE, SIDE = 16, 29
# two whole blocks of 256 images and a part of a third
MANY = 600


def write_splits(root: Path, train: int) -> Path:
    """A folder with splits of its own, so that an image more moves no other."""
    write_pictures(root / "train", train)
    write_pictures(root / "valid", 5, first=train)
    write_pictures(root / "test", 5, first=train + 5)
    return root


def config(root: Path, **more: Any) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **{"size": SIZE, "channels": 3} | more)


def pixels(root: Path) -> Tensor:
    paths = sorted(path for path in (root / "train").iterdir() if path.suffix in (".png", ".jpg"))
    return torch.stack([plainly(path.read_bytes(), SIZE, resize=True) for path in paths])


def opened(
    root: Path, cache: str = "disk", decoder: str = "torchvision", split: Any = "train", **more: Any
) -> tuple[Images, str]:
    """The images and what was said."""
    said: list[str] = []
    loading = Loading(decoder=decoder, cache=cache, say=lambda text: said.append(str(text)))  # type: ignore[arg-type]
    images = open_images(config(root, **more), split, loading)
    return images, "\n".join(said)
