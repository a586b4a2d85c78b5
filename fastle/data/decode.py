"""From encoded files to pixels: the one interface between where images lie and what decodes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastle.errors import DataError

from .header import Header, check_png, read_header


class ImageFile(Protocol):
    """One encoded image, wherever it lies."""

    @property
    def name(self) -> str:
        """What a message calls it."""

    def read(self) -> bytes:
        """The encoded bytes."""

    def stamp(self) -> str:
        """A string that changes when the bytes may have changed, told without reading them.

        Raises:
            OSError: there is no such file, or it cannot be asked.
        """


class BadFiles(DataError):
    """Files that cannot be used: a line for each, below one that counts them if they are several, then the way out.

    Attributes:
        faults: message, "NAME fault", by position in the call, ascending.
    """

    def __init__(self, faults: Mapping[int, str], hint: str = "") -> None:
        self.faults = dict(sorted(faults.items()))
        lines = list(self.faults.values())
        listed = "\n  ".join(lines if len(lines) == 1 else [f"{len(lines)} images cannot be used:", *lines])
        between = "; " if len(lines) == 1 else "\n"
        super().__init__(f"{listed}{between}{hint}" if hint else listed)


class Decoder(Protocol):
    """Turns encoded images into pixels of one size.

    The rules are the same for every decoder. JPEG, PNG and WebP are taken, whatever the name ends in; animations, also
    PNG and WebP ones, and all other kinds are bad files, and so is what `read_header` refuses. Grey becomes RGB; CMYK,
    palettes and 16 bits become 8 bits of RGB as torchvision does it; alpha is dropped, EXIF orientation not applied.
    """

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        """uint8 (B, C, size, size) in channels-last memory, in the order of `files`.

        Raises:
            BadFiles: files cannot be used; it holds every one of them.
        """


@dataclass(frozen=True, slots=True)
class DiskFile:
    """An image file. `name` is its path: a string, because there may be a million of them."""

    name: str

    def read(self) -> bytes:
        # half of what pathlib takes, for small files by the thousand in a second
        with open(self.name, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()

    def stamp(self) -> str:
        return stamp_of(self.name)


class TorchvisionDecoder:
    """Decodes with torchvision in threads: everywhere, every kind, grey as well.

    Args:
        size: height and width handed out, pixels.
        channels: 3 for RGB, 1 for grey, whatever the file holds.
        resize: whether the shorter side is first brought down to `size` (bilinear, antialiased). Both end in a centre
            crop, placed as torchvision's `CenterCrop` does; a smaller image is a bad file.
        threads: as many as there are processors, but at most 16, unless told otherwise.
    """

    def __init__(self, size: int, channels: int, resize: bool, threads: int | None = None) -> None:
        self._size = size
        self._channels = channels
        self._resize = resize
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="decode")

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        # the decoders write pixel after pixel: channels-last takes them over without a transpose
        shape = (len(files), self._channels, self._size, self._size)
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        faults = {}
        for position, image in enumerate(self._pool.map(self._load, files)):
            if isinstance(image, str):
                faults[position] = f"{files[position].name} {image}"
            else:
                batch[position].copy_(image)
        if faults:
            raise BadFiles(faults)
        return batch

    def _load(self, file: ImageFile) -> Tensor | str:
        """An image of the size handed out, or its fault."""
        try:
            data = read_file(file)
            header = read_header(data)
            check_size(header, self._size)
            return fit(decode(data, self._channels), self._size, self._resize)
        except ValueError as error:
            return str(error)


def default_threads() -> int:
    # the decoders release the GIL; beyond 16 threads the disk and the copies are what is waited for
    return min(os.cpu_count() or 1, 16)


def stamp_of(path: str) -> str:
    """Size and time of the last change of a file. OSError if there is none."""
    status = os.stat(path)  # noqa: PTH116 (a million paths: no object for each)
    return f"{status.st_size} {status.st_mtime_ns}"


def read_file(file: ImageFile) -> bytes:
    """The bytes of a file; ValueError with its fault if it cannot be read."""
    try:
        return file.read()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None


def check_size(header: Header, size: int) -> None:
    """Raises ValueError, with the fault alone, if no image of `size` can be cut from one with such a header."""
    if min(header.width, header.height) < size:
        # nothing is enlarged in silence
        raise ValueError(f"is {header.width}x{header.height}, smaller than the {size}x{size} asked for")


def fit(image: Tensor, size: int, resize: bool) -> Tensor:
    """uint8 (C, size, size) from (C, H, W): the shorter side brought to `size` if so wished, the centre cut out."""
    if resize:
        image = F.resize(image, [size], antialias=True)
    return F.center_crop(image, [size, size])


def decode(data: bytes, channels: int) -> Tensor:
    """uint8 (channels, H, W) of an encoded image.

    Raises:
        ValueError: it does not decode; the message is the fault alone, in one line.
    """
    header = read_header(data)
    if header.kind == "PNG":
        check_png(data)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    try:
        # bytearray: torch warns of memory that it must not write to
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        # "decode_jpeg, /build/decode_jpeg.cpp:171, Image is incomplete or truncated": the last part is for people,
        # and its first sentence: the next one is advice to callers of torchvision
        fault = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ValueError(f"does not decode: {fault}") from None
    if image.shape[1:] != (header.height, header.width):
        raise ValueError(f"does not decode: its header says {header.width}x{header.height}")
    image = F.to_dtype(image, torch.uint8, scale=True)
    # the WebP decoder knows no grey and leaves colour, with or without alpha
    return image if len(image) == channels else F.rgb_to_grayscale(image[:3])
