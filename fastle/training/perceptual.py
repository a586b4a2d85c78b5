"""LPIPS and FID of reconstructions, by torchmetrics: distances between the features of networks trained on ImageNet.

LPIPS (Zhang et al., 2018) is the distance of AlexNet's features, averaged over the images: 0 for equal images. FID
(Heusel et al., 2017) is the Fréchet distance between normal distributions fitted to InceptionV3's 2,048 features of all
images and of all reconstructions: 0 for equal distributions. It depends on the number of images, and below some 10,000
of them it is too high. Both networks are fetched when they are first needed, into torch's cache (TORCH_HOME).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastle.errors import FastleError
from fastle.extras import missing_extra

FEATURES = 2048
MIN_SIZE = 32


class NoWeights(FastleError):
    """The weights of a network that judges reconstructions can be neither read nor fetched."""


class TooSmall(FastleError):
    """The images are smaller than a network takes."""


class Perceptual:
    """LPIPS and FID, added up batch by batch.

    Args:
        size: The shorter side of the images, in pixels.
        device: Of the images.

    Raises:
        TooSmall, NoWeights: See there.
        MissingExtra: Torch-fidelity is not installed, which brings InceptionV3.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        if size < MIN_SIZE:
            raise TooSmall(f"LPIPS needs images of {MIN_SIZE} px or more, as AlexNet does; these have {size}")
        try:
            # torchmetrics' own error would not say which extra of fastle brings it
            import torch_fidelity  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_extra(error, "FID") or error from error
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            self._lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
            self._fid = FrechetInceptionDistance(FEATURES).to(device)
        # an error of the network is an OSError; an incomplete file is a RuntimeError or worse, by how it was cut
        except (OSError, RuntimeError, EOFError) as error:
            raise NoWeights(
                f"LPIPS and FID need the weights of AlexNet and InceptionV3, which cannot be had: {error}. "
                f"Where there is no network, copy the folder {torch.hub.get_dir()} from a machine that has them"
            ) from error
        self._seen = 0

    def update(self, xhat: Tensor, x: Tensor) -> None:
        """Adds reconstructions and their images, both (B, C, H, W) in [0, 1], grey or RGB."""
        colour = [images.expand(-1, 3, -1, -1) for images in (x, xhat)]
        self._lpips.update(*colour)
        self._seen += len(x)
        for images, real in zip(colour, (True, False), strict=True):
            self._fid.update((images * 255).round().byte(), real=real)

    def figures(self) -> dict[str, float]:
        """lpips and fid of all that was added; fid of two images or more."""
        figures = {"lpips": float(self._lpips.compute())}
        if self._seen > 1:
            figures["fid"] = float(self._fid.compute())
        return figures
