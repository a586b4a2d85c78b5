"""EXIF orientation: how the pixels of a file must be turned to make the image that its photographer saw."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

TAG = 0x0112
UPRIGHT = 1
BYTES = {3: 2, 4: 4}  # of a value, by the types that hold whole numbers: SHORT and LONG
ORDERS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}


def read_orientation(exif: bytes) -> int:
    """The orientation that an EXIF block asks for, 1 to 8; 1, upright, if it asks for none or is damaged.

    Args:
        exif: A TIFF structure, as JPEG, PNG and WebP hold it, with or without "Exif" and two zeros in front.
    """
    # Pillow reads the tag too, but prints a warning with a path for each damaged block
    exif = exif.removeprefix(b"Exif\0\0")
    order = ORDERS.get(exif[:2])
    if order is None:
        return UPRIGHT
    first = int.from_bytes(exif[4:8], order)
    count = int.from_bytes(exif[first : first + 2], order)
    for at in range(first + 2, min(first + 2 + 12 * count, len(exif) - 11), 12):
        if int.from_bytes(exif[at : at + 2], order) == TAG:
            length = BYTES.get(int.from_bytes(exif[at + 2 : at + 4], order), 0)
            value = int.from_bytes(exif[at + 8 : at + 8 + length], order)
            return value if 1 <= value <= 8 else UPRIGHT
    return UPRIGHT


def on_its_side(orientation: int) -> bool:
    """Whether an orientation exchanges width and height."""
    return 5 <= orientation <= 8


def turn(image: Tensor, orientation: int) -> Tensor:
    """Turns or mirrors decoded pixels, (C, H, W), as an orientation asks; interleaved, like those of a decoder."""
    if orientation == UPRIGHT:
        return image
    if on_its_side(orientation):
        image = image.transpose(-2, -1)
    mirrored = [dim for dim, orientations in ((-1, (2, 3, 6, 7)), (-2, (3, 4, 7, 8))) if orientation in orientations]
    # in another layout than an upright image's, resizing would take another path and might round differently
    return image.flip(mirrored).permute(1, 2, 0).contiguous().permute(2, 0, 1)
