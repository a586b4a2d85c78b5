"""How many images and steps a run has, without torch and without reading an image."""

from __future__ import annotations

from pathlib import Path

from .config import DataConfig, RunConfig
from .errors import FastleError
from .folders import find_shards, split_paths

TRAIN_IMAGES = {"shapes": 12_000, "cifar10": 45_000, "celeba": 162_770}


def train_size(config: DataConfig) -> int | None:
    """The number of training images, without reading one; None for shards, and a folder that does not exist.

    Raises:
        DataError: The folder exists, but cannot be split.
    """
    if config.dataset == "folder":
        root = None if config.root is None else Path(config.root)
        if root is not None and find_shards(root):
            return None
        return len(split_paths(root, "train")) if root is not None and root.exists() else None
    return TRAIN_IMAGES[config.dataset]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The number of whole batches in `n` images. The last, partial batch of an epoch is dropped.

    Raises:
        FastleError: The images do not fill one batch.
    """
    if batch_size > n:
        # a batch of one cannot be trained on either
        if n < 2:
            raise FastleError(f"too few training images ({n}): a batch needs two; add images")
        raise FastleError(f"{n} images do not fill a batch of {batch_size}: use --batch-size {n} or less")
    return n // batch_size


def total_steps(config: RunConfig, epoch_steps: int) -> int:
    """The number of steps of a run whose epochs have `epoch_steps` each."""
    steps, epochs = config.train.steps, config.train.epochs
    return steps if steps is not None else epoch_steps * (epochs or 0)
