"""fastle: self-teaching autoencoders, and SIGReg, at the speed of the hardware."""

from .config import ModelConfig, ObjectiveConfig
from .errors import FastleError
from .kernels.crop_resize import crop_resize
from .kernels.mask_fill import mask_fill
from .kernels.random_mask import mask_channels, mask_patches
from .model import Autoencoder
from .objective import Draws, Losses, PixelBaseline, SelfTeaching
from .sigreg import SIGReg, sigreg

__all__ = [
    "Autoencoder", "Draws", "FastleError", "Losses", "ModelConfig", "ObjectiveConfig", "PixelBaseline", "SIGReg",
    "SelfTeaching", "crop_resize", "mask_channels", "mask_fill", "mask_patches", "sigreg",
]  # fmt: skip
