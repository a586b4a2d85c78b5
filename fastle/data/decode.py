"""From encoded files to pixels: the one interface between where images lie and what decodes them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastle.errors import DataError


class ImageFile(Protocol):
    """One encoded image, wherever it lies."""

    @property
    def name(self) -> str:
        """What a message calls it."""

    def read(self) -> bytes:
        """The encoded bytes."""


class Decoder(Protocol):
    """Turns encoded images into pixels of one size."""

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        """uint8 (B, C, size, size) on the CPU, in the order of `files`.

        Raises:
            DataError: a file cannot be used; the message names it.
        """


@dataclass(frozen=True, slots=True)
class DiskFile:
    """An image file. `name` is its path: a string, because there may be a million of them."""

    name: str

    def read(self) -> bytes:
        return Path(self.name).read_bytes()


class TorchvisionDecoder:
    """JPEG, PNG and WebP, whatever the name ends in, decoded by torchvision in threads.

    Alpha is dropped, 16 bits become 8, EXIF orientation is not applied.

    Args:
        size: height and width handed out, pixels.
        channels: 3 for RGB, 1 for grey, whatever the file holds.
        resize: whether the shorter side is first brought to `size` (bilinear, antialiased); without, an image smaller
            than the crop is an error. Both end in a centre crop, placed as torchvision's `CenterCrop` does.
    """

    def __init__(self, size: int, channels: int, resize: bool) -> None:
        self._size = size
        self._channels = channels
        self._resize = resize
        # the decoder releases the GIL; beyond 16 threads the disk and the copies are what is waited for
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="decode")

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        # the decoders write pixel after pixel: channels-last takes them over without a transpose
        shape = (len(files), self._channels, self._size, self._size)
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for row, image in zip(batch, self._pool.map(self._load, files), strict=True):
            row.copy_(image)
        return batch

    def _load(self, file: ImageFile) -> Tensor:
        try:
            image = decode(file.read(), self._channels)
        except OSError as error:
            raise DataError(f"{file.name} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise DataError(f"{file.name} {error}") from None
        if self._resize:
            image = F.resize(image, [self._size], antialias=True)
        height, width = image.shape[-2:]
        if min(height, width) < self._size:
            raise DataError(f"{file.name} is {width}x{height}, smaller than the crop of {self._size}x{self._size}")
        return F.center_crop(image, [self._size, self._size])


def decode(data: bytes, channels: int) -> Tensor:
    """uint8 (channels, H, W) of an encoded image.

    Raises:
        ValueError: it does not decode; the message is the fault alone, in one line.
    """
    if fault := fault_of(data):
        raise ValueError(fault)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    try:
        # bytearray: torch warns of memory that it must not write to
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        # "decode_jpeg, /build/decode_jpeg.cpp:171, Image is incomplete or truncated": the last part is for people,
        # and its first sentence: the next one is advice to callers of torchvision
        fault = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ValueError(f"does not decode: {fault}") from None
    if image.ndim != 3:
        raise ValueError("is an animation, not one image")
    image = F.to_dtype(image, torch.uint8, scale=True)
    # the WebP decoder knows no grey and leaves colour, with or without alpha
    return image if len(image) == channels else F.rgb_to_grayscale(image[:3])


def fault_of(data: bytes) -> str | None:
    """What a failed download left in the place of a file, in words; None if it looks like neither of the usual two."""
    if not data:
        return "is empty"
    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is an HTML page: the download failed, fetch it again"
    return None
