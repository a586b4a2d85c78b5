"""What the tests of the packed cache share: folders of images, and how they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastle.config import DataConfig
from fastle.data import Images, Loading, open_images
from tests.data.pictures import dali_or_skip, oracle, write_pictures

# pixels: the images are larger than the crops
SIZE, LARGE = 16, 24
# two whole blocks of 256 images and a part of a third
MANY = 600
CACHES = ("none", "disk", "host", "auto")


def write_splits(root: Path, train: int) -> Path:
    """A folder with its own splits, so that adding an image moves no other."""
    write_pictures(root / "train", train)
    write_pictures(root / "valid", 5, first=train)
    write_pictures(root / "test", 5, first=train + 5)
    return root


def config(root: Path, **more: Any) -> DataConfig:
    options: dict[str, Any] = {"dataset": "folder", "root": str(root), "size": SIZE, "channels": 3}
    return DataConfig(**options | more)


def pixels(root: Path) -> Tensor:
    """The oracle's images of the training split."""
    paths = sorted(path for path in (root / "train").iterdir() if path.suffix in (".png", ".jpg"))
    return torch.stack([oracle(path.read_bytes(), SIZE, resize=True) for path in paths])


def loading(decoder: str, cache: str, messages: list[str] | None = None) -> Loading:
    if decoder == "dali":
        dali_or_skip()
    say = (lambda text: None) if messages is None else (lambda text: messages.append(str(text)))
    return Loading(decoder=decoder, cache=cache, say=say)  # type: ignore[arg-type]


def opened(
    root: Path, cache: str = "disk", decoder: str = "torchvision", split: Any = "train", **more: Any
) -> tuple[Images, str]:
    """The images of a split, and the messages."""
    messages: list[str] = []
    images = open_images(config(root, **more), split, loading(decoder, cache, messages))
    return images, "\n".join(messages)


def everything(images: Images) -> Tensor:
    return images.batch(range(len(images)))
