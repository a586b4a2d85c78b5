"""A split of a dataset: so many images, any of them as uint8."""

from __future__ import annotations

import difflib
from collections.abc import Container, Sequence
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
        """uint8 (B, C, H, W) on the CPU or on the device that holds them, in any memory format.

        Raises:
            DataError: an image cannot be used; the message names it.
        """


class ArrayImages:
    """Images held in memory: `images` is uint8 (N, C, H, W), and so are its batches on its device."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        index = torch.as_tensor(indices)
        if self.images.is_cuda:
            # without pinning the copy would wait
            index = index.pin_memory().to(self.images.device, non_blocking=True)
        return self.images.index_select(0, index)


class EncodedImages:
    """Images held as files and decoded when asked for.

    Attributes:
        files, decoder: as given.
    """

    def __init__(self, files: Sequence[ImageFile], decoder: Decoder) -> None:
        self.files = files
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.decoder([self.files[index] for index in indices])

    def without(self, positions: Container[int]) -> EncodedImages:
        """Those that are left when some are taken out."""
        return EncodedImages([file for i, file in enumerate(self.files) if i not in positions], self.decoder)


def check_split(split: str) -> None:
    """Raises DataError if `split` is none of `SPLITS`, with the one that was probably meant."""
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SPLITS)}"
        raise DataError(f"unknown split {split!r}: {hint}")
