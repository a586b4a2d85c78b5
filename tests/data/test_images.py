"""Images in memory and images in files give the same batches; splits have names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastle.data.decode import ImageFile
from fastle.data.images import ArrayImages, EncodedImages, check_split
from fastle.errors import DataError


@dataclass(frozen=True)
class Number:
    name: str

    def stamp(self) -> str:
        return ""

    def read(self) -> bytes:
        return bytes([int(self.name)])


def first_byte(files: Sequence[ImageFile]) -> Tensor:
    return torch.tensor([list(file.read()) for file in files], dtype=torch.uint8).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "images",
    [
        ArrayImages(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1)),
        EncodedImages([Number(str(i)) for i in range(9)], first_byte),
    ],
    ids=["array", "encoded"],
)
def test_batches_hold_the_images_asked_for_in_that_order(images: ArrayImages | EncodedImages) -> None:
    assert len(images) == 9
    batch = images.batch([8, 0, 3, 3])
    assert batch.dtype == torch.uint8
    assert batch.shape == (4, 1, 1, 1)
    assert batch.flatten().tolist() == [8, 0, 3, 3]
    with pytest.raises(IndexError):
        images.batch([9])


@pytest.mark.parametrize(
    ("split", "hint"),
    [("validation", "did you mean 'valid'?"), ("x", "the splits are train, valid, test")],
)
def test_an_unknown_split_gets_a_suggestion(split: str, hint: str) -> None:
    with pytest.raises(DataError) as error:
        check_split(split)
    assert str(error.value) == f"unknown split {split!r}: {hint}"
