"""Images of 16 bits: which files hold more than 8, how decoded ones are kept, and how they become floats.

Decoders and caches keep them as uint16; whoever reads a batch of images gets fp32 in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastle.method.model import unit_range

from .header import Header


def dtype_of(bits: int) -> torch.dtype:
    """The type of decoded images of 8 or of 16 bits."""
    return torch.uint8 if bits == 8 else torch.uint16


def check_depth(header: Header, bits: int) -> None:
    """Raises ValueError, with the fault alone, if 16 bits are to be kept and the decoder gives only the upper 8."""
    if bits == 16 and header.reduced:
        what = {"TIFF": "a colour TIFF", "AVIF": "an AVIF"}.get(header.kind, f"a {header.kind}")
        raise ValueError(
            f"is {what} with more than 8 bits, of which Pillow keeps the upper 8: save it as a PNG of 16 bits"
        )


def of_bits(image: Tensor, bits: int) -> Tensor:
    """Converts a uint8 or uint16 image to 8 bits, the upper ones, or to 16, where 65535 is white."""
    if image.dtype == dtype_of(bits):
        return image
    # NumPy, because torch does not compute in uint16
    values = image.numpy()
    return torch.from_numpy(values * np.uint16(257) if bits == 16 else (values >> 8).astype(np.uint8))


def unit(images: Tensor) -> Tensor:
    """Converts uint16 images to fp32 in [0, 1], with the same bits on every device; uint8 images stay as they are."""
    return unit_range(images) if images.dtype == torch.uint16 else images
