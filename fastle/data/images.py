"""A split of a dataset: so many images, any of them as uint8 on the CPU."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fastle.errors import DataError

from .decode import Decoder, ImageFile

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Images(Protocol):
    """Images of one size, numbered from 0."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, C, H, W) on the CPU, in any memory format.

        Raises:
            DataError: an image cannot be used; the message names it.
        """


class ArrayImages:
    """Images held in memory: `images` is uint8 (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices)]


class EncodedImages:
    """Images held as files and decoded when asked for."""

    def __init__(self, files: Sequence[ImageFile], decoder: Decoder) -> None:
        self._files = files
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._decoder([self._files[index] for index in indices])


def check_split(split: str) -> None:
    """Raises DataError if `split` is none of `SPLITS`, with the one that was probably meant."""
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SPLITS)}"
        raise DataError(f"unknown split {split!r}: {hint}")
