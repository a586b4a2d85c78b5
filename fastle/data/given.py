"""Images given in Python: a tensor, an array or any dataset that has a length and an index, read as `Images`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastle.config import DataConfig, Size, sides_of
from fastle.errors import DataError

from . import pillow
from .bits import unit
from .decode import resize_and_crop, too_small
from .identity import Identity
from .images import Images

SHARE = 20  # one image in so many is held out to validate
LOOKED_AT = 8  # images that identify a set


class GivenImages:
    """Some of the images of a source, brought to one size and to uint8, or to fp32 in [0, 1] where 16 bits are kept.

    One thread at a time reads from the source, which need not be thread-safe.

    Args:
        source: Has a length and an index. An item is an image, a pair that begins with one, or a mapping with "image".
            An image is (C, H, W) or (H, W), uint8, uint16 or floating in [0, 1], or a PIL image.
        positions: The images that are taken, as indices of the source.
        size, channels: Of the batches. Images are shrunk until they just cover `size`, and the centre is cut out; grey
            becomes RGB and RGB grey, as for files.
        bits: How many of each value are kept: floats are rounded to 8, or with 16 stay as they are.
    """

    def __init__(self, source: Any, positions: NDArray[np.int64], *, size: Size, channels: int, bits: int = 8) -> None:
        self._source, self._positions = source, positions
        self._size, self._channels, self._bits = size, channels, bits
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, indices: Sequence[int]) -> Tensor:
        positions = [int(self._positions[index]) for index in indices]
        with self._lock:
            images = [self._read(position) for position in positions]
        return torch.stack([self._fit(image, at) for image, at in zip(images, positions, strict=True)])

    def _read(self, position: int) -> Tensor:
        item = self._source[position]
        if isinstance(item, Mapping):
            if "image" not in item:
                raise DataError(f'image {position} is a mapping of {", ".join(map(str, item))}: name the image "image"')
            item = item["image"]
        elif isinstance(item, (tuple, list)) and item:
            item = item[0]
        if hasattr(item, "convert") and hasattr(item, "mode"):
            if item.mode in pillow.DEEP:
                return torch.from_numpy(pillow.sixteen(item, getattr(item, "tag_v2", {})))
            if item.mode[0] in "IF":
                raise DataError(f"image {position} is a PIL image of mode {item.mode}: give a tensor in [0, 1]")
            pixels = np.array(item.convert("L" if self._channels == 1 else "RGB"))
            return torch.from_numpy(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        if isinstance(item, np.ndarray):
            # torch knows only the machine's own byte order
            return torch.as_tensor(item.astype(item.dtype.newbyteorder("="), copy=False))
        if isinstance(item, Tensor):
            return item
        raise DataError(f"image {position} is a {type(item).__name__}: give tensors, arrays or PIL images")

    def _fit(self, image: Tensor, position: int) -> Tensor:
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise DataError(f"image {position} has the shape {tuple(image.shape)}, not (1 or 3, height, width)")
        if image.is_floating_point():
            smallest, largest = (float(bound) for bound in image.aminmax())
            if not (0 <= smallest and largest <= 1):
                raise DataError(
                    f"image {position} has values from {smallest:.4g} to {largest:.4g}: floats must be in [0, 1]"
                )
            image = image.float() if self._bits == 16 else (image * 255).round().to(torch.uint8)
        elif image.dtype == torch.uint16 and self._bits != 16:
            raise DataError(f"image {position} has values of 16 bits: give bits=16, or uint8")
        elif image.dtype not in (torch.uint8, torch.uint16):
            raise DataError(f"image {position} is {image.dtype}: give uint8, or floats in [0, 1]")
        elif self._bits == 16:
            image = unit(image) if image.dtype == torch.uint16 else image.float() / 255
        height, width = image.shape[1:]
        sides = sides_of(self._size)
        if height < sides[0] or width < sides[1]:
            raise DataError(f"image {position} {too_small(height, width, self._size)}: give a smaller size")
        if len(image) != self._channels:
            # importing it takes seconds
            import torchvision.transforms.v2.functional as F

            image = image.expand(3, -1, -1) if self._channels == 3 else F.rgb_to_grayscale(image)
        if (height, width) == sides:
            return image
        image = resize_and_crop(image, self._size, resize=True)
        # interpolation weights sum to 1 only up to rounding
        return image.clamp(0, 1) if self._bits == 16 else image


def open_given(
    data: Any, valid: Any, config: DataConfig, say: Callable[[str], object]
) -> tuple[Images, Images, Identity]:
    """The images to train and to validate, and the identity of the first.

    Args:
        data: See `GivenImages`.
        valid: The images to validate, given in the same way; None holds out one in twenty of `data`.
        config: The size, channels and bits of the batches.
        say: Shows a line.

    Raises:
        DataError: There are too few images, or one of those that identify the set cannot be used.
    """
    positions = np.arange(_length(data))
    if valid is None:
        if len(positions) < 2:
            raise DataError(f"{len(positions)} images are too few to train and to validate: give more")
        # the legacy generator, whose stream never changes
        shuffled = np.random.RandomState(0).permutation(len(positions))
        share = -(-len(positions) // SHARE)
        source, held_out, positions = data, np.sort(shuffled[:share]), np.sort(shuffled[share:])
    else:
        source, held_out = valid, np.arange(_length(valid))
    about: dict[str, Any] = {"size": config.size, "channels": config.channels, "bits": config.bits}
    train, held = GivenImages(data, positions, **about), GivenImages(source, held_out, **about)
    return train, held, _identify(train, say)


def open_all_given(data: Any, *, size: Size, channels: int, bits: int) -> GivenImages:
    """All images of a source; see `GivenImages`.

    Raises:
        DataError: There is none, or it has no length and no index.
    """
    if not _length(data):
        raise DataError("there are no images to measure: give some as data")
    return GivenImages(data, np.arange(_length(data)), size=size, channels=channels, bits=bits)


def shape_of(data: Any) -> tuple[int, int] | None:
    """The channels and the side of a tensor or an array of square images, (N, C, side, side); None for others."""
    if not isinstance(data, (Tensor, np.ndarray)) or data.ndim != 4 or data.shape[2] != data.shape[3]:
        return None
    return int(data.shape[1]), int(data.shape[2])


def _length(data: Any) -> int:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"data is a {type(data).__name__}, without a length and an index: give a path, a tensor, an array or a "
            "map-style dataset"
        )
    return len(data)


def _identify(images: GivenImages, say: Callable[[str], object]) -> Identity:
    """The number of images, and a digest of a few. A set whose images are random is known by its number alone."""
    count = len(images)
    looked_at = [index * count // LOOKED_AT for index in range(LOOKED_AT)] if count > LOOKED_AT else list(range(count))
    first, second = (images.batch(looked_at) for _ in range(2)) if count else (torch.empty(0), torch.empty(0))
    if not torch.equal(first, second):
        say("the images differ from one reading to the next: a run that is resumed will not repeat them")
        return Identity(count, "random images given in Python")
    return Identity(
        count, f"given in Python, {hashlib.blake2b(first.cpu().numpy().tobytes(), digest_size=16).hexdigest()}"
    )
