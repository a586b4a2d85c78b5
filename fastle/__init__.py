"""fastle: fast self-teaching autoencoders and SIGReg for PyTorch."""

from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_channels, mask_patches
from fastle.method.model import Autoencoder
from fastle.method.objective import Draws, Losses, PixelBaseline, SelfTeaching
from fastle.method.sigreg import SIGReg, sigreg

from .config import ModelConfig, ObjectiveConfig
from .errors import FastleError

__all__ = [
    "Autoencoder", "Draws", "FastleError", "Losses", "ModelConfig", "ObjectiveConfig", "PixelBaseline", "SIGReg",
    "SelfTeaching", "crop_resize", "mask_channels", "mask_fill", "mask_patches", "sigreg",
]  # fmt: skip
