"""fastle: fast self-teaching autoencoders and SIGReg for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastle.extras import missing_extra

if TYPE_CHECKING:
    from fastle.config import ModelConfig, ObjectiveConfig
    from fastle.errors import FastleError
    from fastle.fitting import Result, evaluate, fit
    from fastle.kernels.crop_resize import crop_resize
    from fastle.kernels.mask_fill import mask_fill
    from fastle.kernels.random_mask import mask_channels, mask_patches
    from fastle.method.model import Autoencoder
    from fastle.method.objective import Draws, Losses, PixelBaseline, SelfTeaching
    from fastle.method.own import frozen
    from fastle.method.sigreg import SIGReg, draw_slices, sigreg, two_sample_sigreg

__all__ = [
    "Autoencoder", "Draws", "FastleError", "Losses", "ModelConfig", "ObjectiveConfig", "PixelBaseline", "Result",
    "SIGReg", "SelfTeaching", "crop_resize", "draw_slices", "evaluate", "fit", "frozen", "mask_channels",
    "mask_fill", "mask_patches", "sigreg", "two_sample_sigreg",
]  # fmt: skip

# torch takes seconds to import, and a command must be able to answer a signal before
_HOMES = {
    "Autoencoder": "method.model", "Draws": "method.objective", "FastleError": "errors", "Losses": "method.objective",
    "ModelConfig": "config", "ObjectiveConfig": "config", "PixelBaseline": "method.objective", "Result": "fitting",
    "SIGReg": "method.sigreg", "SelfTeaching": "method.objective", "crop_resize": "kernels.crop_resize",
    "draw_slices": "method.sigreg", "evaluate": "fitting", "fit": "fitting", "frozen": "method.own",
    "mask_channels": "kernels.random_mask", "mask_fill": "kernels.mask_fill", "mask_patches": "kernels.random_mask",
    "sigreg": "method.sigreg", "two_sample_sigreg": "method.sigreg",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastle' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"fastle.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if missing := missing_extra(error, f"fastle.{name}"):
            raise missing from None
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
