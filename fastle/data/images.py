"""The images of a split, held in memory or as encoded files, and read in batches."""

from __future__ import annotations

import difflib
from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastle.errors import DataError
from fastle.folders import SPLITS

from .bits import unit
from .decode import Decoder, ImageFile
from .shards import ShardFiles


class Images(Protocol):
    """The images of a split, all of one size, indexed from 0."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """A batch (B, C, H, W), uint8 or, of 16 bits, fp32 in [0, 1].

        It is on the CPU or on the device that holds the images, in any memory format.

        Raises:
            DataError: An image cannot be used. The message names it.
        """


class ArrayImages:
    """Images held in memory, uint8 or in [0, 1], (N, C, H, W), on the CPU or a GPU. Batches are on the same device."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        index = torch.as_tensor(indices)
        if self.images.is_cuda:
            # a copy from memory that is not pinned would wait for the GPU
            index = index.pin_memory().to(self.images.device, non_blocking=True)
        return self.images.index_select(0, index)


class EncodedImages:
    """Images held as encoded files, and decoded on request.

    Attributes:
        files, decoder: As given.
    """

    def __init__(self, files: Sequence[ImageFile], decoder: Decoder) -> None:
        self.files = files
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return unit(self.decoded(indices))

    def decoded(self, indices: Sequence[int]) -> Tensor:
        """A batch as the decoder gives it, uint8 or uint16."""
        return self.decoder([self.files[index] for index in indices])

    def without(self, positions: Container[int]) -> EncodedImages:
        """The images except those at `positions`."""
        if isinstance(self.files, ShardFiles):
            return EncodedImages(self.files.without(positions), self.decoder)
        return EncodedImages([file for i, file in enumerate(self.files) if i not in positions], self.decoder)


def check_split(split: str) -> None:
    """Raises DataError, with a suggestion, if `split` is none of `SPLITS`."""
    if split not in SPLITS:
        matches = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"the splits are {', '.join(SPLITS)}"
        raise DataError(f"unknown split {split!r}: {hint}")
