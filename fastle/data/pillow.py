"""What torchvision has no decoder for: TIFF, BMP, GIF, AVIF, HEIC and animated WebP, decoded by Pillow.

Of several pages or frames, the first is the image. Importing Pillow's codecs takes a while, so functions do it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .orientation import TAG, UPRIGHT, on_its_side

if TYPE_CHECKING:
    from PIL import Image

# the modules and classes that read each format. Pillow's own `open` would warn of images beyond a limit of its own
READERS = {
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "WebP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
}
# formats whose decoders may be missing
MISSING = {
    "AVIF": "is an AVIF, which this Pillow cannot decode: pip install --upgrade pillow",
    "HEIC": 'is a HEIC, which needs pillow-heif: pip install "fastle[heic]"',
}
# tags of a TIFF
SUBFILE_TYPE, BITS, PHOTOMETRIC, DNG_VERSION = 254, 258, 262, 50706
# what Pillow's readers and its code for tags raise for damaged files. a header that promises more pixels than memory
# holds is damaged, too
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError, MemoryError,
    struct.error,
)  # fmt: skip
# modes of one sample that holds more than 8 bits
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")


class SizeAndDepth(NamedTuple):
    """The upright size in pixels, and `deep` and `reduced` as in `Header`."""

    width: int
    height: int
    deep: bool
    reduced: bool


class Refused(ValueError):
    """An image that cannot be used although it may be in order. The message is the fault alone."""


class NotInstalled(Refused):
    """A format needs a package that is not installed. The message ends with the command that helps."""


def read_size(data: bytes, kind: str) -> SizeAndDepth:
    """Size and depth of an image.

    Args:
        data: An encoded image, whole.
        kind: Its format, of `READERS`.

    Raises:
        ValueError: It is damaged or truncated. The message is the fault alone, in one line.
        Refused: It is a raw photograph, or has samples of another kind than 8 or 16 bits.
        NotInstalled: Its decoder is not installed.
    """
    with _opened(data, kind) as image:
        width, height = image.size
        # Pillow gives the upright size of a TIFF, and libheif that of a HEIC
        if kind == "AVIF" and on_its_side(image.getexif().get(TAG, UPRIGHT)):
            width, height = height, width
        whole = image.mode in DEEP
        reduced = not whole and _is_deep(image, data, kind)
        return SizeAndDepth(width, height, deep=whole or reduced, reduced=reduced)


def decode(data: bytes, kind: str, channels: int) -> Tensor:
    """Decodes an image to (channels, H, W), upright: to uint16 if it is grey of more than 8 bits, else to uint8.

    Args:
        data, kind: See `read_size`.
        channels: 3 for RGB or 1 for grey.

    Raises:
        ValueError: See `read_size`.
    """
    from PIL import ImageOps

    with _opened(data, kind) as image:
        upright = ImageOps.exif_transpose(image)
        if image.mode in DEEP:
            grey = sixteen(upright, getattr(image, "tag_v2", {}))
            return torch.from_numpy(grey[:, :, None].repeat(channels, 2)).permute(2, 0, 1)
        pixels = upright.convert("RGB")
        if channels == 1:
            pixels = pixels.convert("L")
        return torch.from_numpy(np.array(pixels)).view(pixels.height, pixels.width, channels).permute(2, 0, 1)


@contextmanager
def _opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """An image whose pixels have not been decoded yet. What Pillow raises of damaged files becomes a fault."""
    from PIL.Image import DecompressionBombError

    reader = _reader(kind)
    try:
        with reader(io.BytesIO(data)) as image:
            _check_kind(image)
            yield image
    except Refused:
        raise
    except (*DAMAGED, DecompressionBombError) as error:
        # for a damaged header, Pillow raises a SyntaxError with the text of an inner error
        words = "" if isinstance(error, SyntaxError) else " ".join(str(error).split())
        fault = words or f"the header of the {kind} is damaged"
        raise ValueError(f"does not decode: {fault}") from None


def _reader(kind: str) -> Callable[[io.BytesIO], Image.Image]:
    module, name = READERS[kind]
    try:
        reader: Callable[[io.BytesIO], Image.Image] = getattr(import_module(module), name)
    except ImportError:
        raise NotInstalled(MISSING[kind]) from None
    if kind == "AVIF" and not import_module(module).SUPPORTED:
        raise NotInstalled(MISSING[kind])
    return reader


def _check_kind(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    # from a raw photograph that is built like a TIFF, Pillow would take the thumbnail
    if tags.get(SUBFILE_TYPE, 0) & 1 or DNG_VERSION in tags:
        raise Refused("is a raw photograph, which fastle cannot decode")
    if image.mode in ("I", "F"):
        raise Refused("has samples of 32 bits, or with a sign: save it with 8 or 16 bits")


def _is_deep(image: Image.Image, data: bytes, kind: str) -> bool:
    """Whether a file has more than 8 bits, although Pillow gives 8."""
    if kind == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(BITS, (1,))) > 8
    if kind == "AVIF":
        # a bit of the third byte in this box says that there are 10 or 12
        box = data.find(b"av1C")
        return box >= 0 and any(byte & 0x40 for byte in data[box + 6 : box + 7])
    return int(image.info.get("bit_depth", 8)) > 8


def sixteen(image: Image.Image, tags: Mapping[int, Any]) -> NDArray[np.uint16]:
    """Grey samples of 9 to 16 bits, (H, W), scaled so that 65535 is white.

    Args:
        image: Of a mode in `DEEP`.
        tags: Of the TIFF that it comes from; empty for others.
    """
    (bits,) = tags.get(BITS, (16,))
    # in the machine's byte order, the only one that torch knows
    grey = np.asarray(image).astype(np.uint16)
    if bits < 16:
        # the upper bits once more below the lower ones: the largest value becomes 65535, and the upper 8 bits stay
        grey = grey << (16 - bits) | grey >> (2 * bits - 16)
    # Pillow inverts an image whose 0 is white only if it has 8 bits
    return np.uint16(65535) - grey if tags.get(PHOTOMETRIC) == 0 else grey
