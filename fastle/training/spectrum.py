"""Patterns that a model draws and its images do not have, such as stripes and checkerboards.

They hardly show in PSNR, and count as sharpness. In the spectrum they stand out: at their frequency the reconstructions
have many times the power of the images.
"""

from __future__ import annotations

import torch
from torch import Tensor

# variance that rounding to 8 bits adds to a value: weaker patterns of the images would not be seen
ROUNDING = 1 / 255**2 / 12


class Spectrum:
    """The mean power of reconstructions and of images at each frequency."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2, H, W // 2 + 1), of the reconstructions and of the images
        self._values = 0

    def update(self, xhat: Tensor, x: Tensor) -> None:
        """Adds reconstructions and images, (B, C, H, W) in [0, 1]."""
        # the other half of the frequencies has the same powers, because images are real
        sums = torch.stack([torch.fft.rfft2(images).abs().square().sum((0, 1)) for images in (xhat, x)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._values += x.numel()

    def peak(self) -> float:
        """The greatest ratio of the reconstructions' power to the images' at any frequency but 0.

        It is at most 1 of images that come back unchanged or paler. Where images have less power than rounding to 8
        bits adds, they are taken to have that. Channels are added up.

        Raises:
            ValueError: Nothing was added.
        """
        if self._sums is None:
            raise ValueError("there is no peak before an update")
        # summed over values, because torch's transform is not normalised
        ratios = self._sums[0] / self._sums[1].clamp_min(self._values * ROUNDING)
        ratios[0, 0] = 0
        return float(ratios.max())
