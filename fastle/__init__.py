"""fastle: self-teaching autoencoders, and SIGReg, at the speed of the hardware."""

from .config import ModelConfig, ObjectiveConfig
from .errors import FastleError
from .kernels.crop_resize import crop_resize
from .kernels.mask_fill import mask_fill
from .model import Autoencoder
from .objective import Draws, Losses, PixelBaseline, SelfTeaching
from .sigreg import SIGReg, sigreg

__all__ = [
    "Autoencoder", "Draws", "FastleError", "Losses", "ModelConfig", "ObjectiveConfig", "PixelBaseline", "SIGReg",
    "SelfTeaching", "crop_resize", "mask_fill", "sigreg",
]  # fmt: skip
