"""Decoding: the interfaces of encoded files and of decoders, and the decoder that uses torchvision and Pillow."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastle.config import Size, sides_of
from fastle.errors import DataError
from fastle.files import open_regular

from . import pillow
from .bits import check_depth, dtype_of, of_bits
from .header import MAX_PIXELS, Header, check_png, read_header
from .orientation import turn

# of a file: what the largest image takes uncompressed, with four samples of 16 bits in each pixel
MAX_BYTES = 8 * MAX_PIXELS


class ImageFile(Protocol):
    """One encoded image, wherever it is stored."""

    @property
    def name(self) -> str:
        """The name of the file in messages."""

    def read(self) -> bytes:
        """Reads the encoded bytes. Raises OSError if that fails."""

    def stamp(self) -> str:
        """A string that changes when the bytes may have changed, found without reading them.

        Its first word is the size, in bytes, of the file that holds the image.

        Raises:
            OSError: The file does not exist or cannot be accessed.
        """


class BadFiles(DataError):
    """Files cannot be used. The message has a line for each, below a count if there are several, and ends with a hint.

    Attributes:
        faults: Messages "NAME fault", by the position of the file in the call, in ascending order.
    """

    def __init__(self, faults: Mapping[int, str], hint: str = "") -> None:
        self.faults = dict(sorted(faults.items()))
        lines = list(self.faults.values())
        listed = "\n  ".join(lines if len(lines) == 1 else [f"{len(lines)} images cannot be used:", *lines])
        separator = "; " if len(lines) == 1 else "\n"
        super().__init__(f"{listed}{separator}{hint}" if hint else listed)


class Decoder(Protocol):
    """Decodes encoded images to one size.

    All decoders follow the same rules, whatever the file's extension. What `read_header` rejects is a bad file. Grey
    becomes RGB; CMYK, palettes and, unless they are asked for, 16 bits become 8-bit RGB as in torchvision; alpha is
    dropped; images are turned as their EXIF orientation asks. Of several frames or pages, the first is decoded.
    """

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        """Decodes files, in their order, to uint8, or of 16 bits to uint16, (B, C, H, W) in channels-last memory.

        Raises:
            BadFiles: Files cannot be used. The error lists every one of them.
        """


@dataclass(frozen=True, slots=True)
class DiskFile:
    """An image file on disk. `name` is its path, a string because there may be a million of them."""

    name: str

    def read(self) -> bytes:
        with open_regular(self.name, MAX_BYTES) as file:
            return file.read()

    def stamp(self) -> str:
        return file_stamp(self.name)


class Tally:
    """Counts, once each, the files that Pillow decodes and those with more than 8 bits."""

    def __init__(self) -> None:
        self._by_pillow: dict[str, str] = {}
        # by name, whether its 16 bits cannot be kept
        self._deep: dict[str, bool] = {}

    def add(self, name: str, header: Header) -> None:
        """Counts a file, if Pillow decodes it or it has more than 8 bits."""
        if header.by_pillow:
            self._by_pillow[name] = header.kind
        if header.deep:
            self._deep[name] = header.reduced

    def remarks(self, bits: int) -> list[str]:
        """Lines that tell the user about the files so far. `bits` are kept, 8 or 16."""
        lines = []
        if self._by_pillow:
            kinds = Counter(self._by_pillow.values()).most_common()
            listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            lines.append(f"decoder: Pillow for {listed}, which DALI and torchvision cannot decode; it is slower")
        return [*lines, *self.remarks_on_depth(bits)]

    def remarks_on_depth(self, bits: int) -> list[str]:
        """Those of `remarks` on images of more than 8 bits."""
        if not self._deep:
            return []
        remark = f"decoder: of {len(self._deep):,} images with more than 8 bits, "
        if bits == 16:
            return [f"{remark}all bits are kept"]
        remark += "the upper 8 are kept; a run with --bits 16 "
        reduced = sum(self._deep.values())
        if not reduced:
            return [f"{remark}keeps all"]
        whole = len(self._deep) - reduced
        remark += f"keeps all of {whole:,} and " if whole else ""
        return [f"{remark}refuses {reduced:,}: save these as PNG of 16 bits"]


class TorchvisionDecoder:
    """Decodes to RGB or grey in threads, with torchvision or, what that cannot, with Pillow. It runs everywhere.

    Args:
        size: Of the decoded images, in pixels: a number for a square, or (height, width).
        channels: 3 for RGB or 1 for grey, whatever a file holds.
        resize: Whether images are first resized (bilinear, antialiased) until they just cover `size`: for a square,
            until the shorter side has that length. In either case the centre is then cropped as by torchvision's
            `CenterCrop`, and a smaller image is a bad file.
        upscale: Whether smaller images are resized, too.
        threads: The number of threads; by default, that of the processors, but at most 16.
        bits: How many of each value are kept, 8 or 16.
        tally: Counts the files.
    """

    def __init__(
        self,
        size: Size,
        channels: int,
        resize: bool,
        threads: int | None = None,
        *,
        upscale: bool = False,
        bits: int = 8,
        tally: Tally | None = None,
    ) -> None:
        self._size = size
        self._channels = channels
        self._resize = resize
        self._upscale = upscale
        self._bits = bits
        self._tally = tally or Tally()
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="decode")

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        # the decoders write interleaved pixels, which channels-last memory takes without a transpose
        shape = (len(files), self._channels, *sides_of(self._size))
        batch = torch.empty(shape, dtype=dtype_of(self._bits), memory_format=torch.channels_last)
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
        """The decoded image, or its fault."""
        try:
            data = read_file(file)
            header = read_header(data)
            check_size(header, self._size, resize=self._resize, upscale=self._upscale)
            check_depth(header, self._bits)
            image = resize_and_crop(decode(data, header, self._channels, self._bits), self._size, self._resize)
            self._tally.add(file.name, header)
            return image
        except pillow.NotInstalled as error:
            # the file is not at fault, so --bad-images must not skip it
            raise DataError(f"{file.name} {error}") from None
        except ValueError as error:
            return str(error)


def default_threads() -> int:
    # the decoders release the GIL; beyond 16 threads, the disk and the copies limit the speed
    return min(os.cpu_count() or 1, 16)


def file_stamp(path: str) -> str:
    """The size and modification time of a file. Raises OSError if it does not exist."""
    status = os.stat(path)  # noqa: PTH116 (a million paths: no object for each)
    return f"{status.st_size} {status.st_mtime_ns}"


def read_file(file: ImageFile) -> bytes:
    """Reads a file. Raises ValueError, with the fault alone, if that fails."""
    try:
        return file.read()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None


def check_size(header: Header, size: Size, *, resize: bool, upscale: bool) -> None:
    """Raises ValueError, with the fault alone, if an image is too small to crop `size` pixels from it.

    Args:
        header: The image's.
        size, resize, upscale: See `TorchvisionDecoder`.
    """
    height, width = sides_of(size)
    if (header.height < height or header.width < width) and not upscale:
        # no image is enlarged silently
        hint = "; a run with --upscale enlarges such images" if resize else ""
        raise ValueError(too_small(header.height, header.width, size) + hint)


def too_small(height: int, width: int, size: Size) -> str:
    """What is wrong with an image that is smaller than `size`."""
    if isinstance(size, int):
        return f"is {width}x{height}, smaller than the {size}x{size} asked for"
    return f"is {height} px high and {width} px wide, smaller than the {size[0]}x{size[1]} asked for"


def resize_and_crop(image: Tensor, size: Size, resize: bool) -> Tensor:
    """Crops the centre of (C, H, W) to (C, *size); `resize` resizes it before, until it just covers `size`."""
    # importing it takes seconds
    import torchvision.transforms.v2.functional as F

    height, width = sides_of(size)
    if resize:
        dtype, (before, across) = image.dtype, image.shape[-2:]
        # torchvision would round uint16 down
        image = image.float() if dtype == torch.uint16 else image
        # the side that covers last gets its length, and the other one follows from the proportions, rounded down
        if height * across >= width * before:
            image = F.resize(image, [height, height * across // before], antialias=True)
        else:
            image = F.resize(image, [width * before // across, width], antialias=True)
        image = image.round().to(dtype) if dtype == torch.uint16 else image
    return F.center_crop(image, [height, width])


def decode(data: bytes, header: Header, channels: int, bits: int = 8) -> Tensor:
    """Decodes an image, whose header has been read, to uint8 or, of 16 bits, to uint16 (channels, H, W), upright.

    Raises:
        ValueError: The image does not decode. The message is the fault alone, in one line.
    """
    if header.by_pillow:
        image = pillow.decode(data, header.kind, channels)
    else:
        image = turn(_by_torchvision(data, header, channels), header.orientation)
    if image.shape[1:] != (header.height, header.width):
        raise ValueError(f"does not decode: its header says {header.width}x{header.height}")
    return of_bits(image, bits)


def _by_torchvision(data: bytes, header: Header, channels: int) -> Tensor:
    # importing them takes seconds
    import torchvision.transforms.v2.functional as F
    from torchvision.io import ImageReadMode, decode_image

    if header.kind == "PNG":
        check_png(data)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    try:
        # bytearray, because torch warns about read-only memory
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        # of "decode_jpeg, /build/decode_jpeg.cpp:171, Image is incomplete or truncated. …", keep the sentence after the
        # line number; what follows it is advice for callers of torchvision
        fault = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ValueError(f"does not decode: {fault}") from None
    # the WebP decoder cannot decode to grey: it leaves RGB, with or without alpha
    return image if len(image) == channels else F.rgb_to_grayscale(image[:3])
