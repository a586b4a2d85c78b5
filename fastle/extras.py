"""The packages that only a part of fastle needs, and the extra of the installation that brings each."""

from __future__ import annotations

from .errors import FastleError

# by the name under which they are imported; setup.py declares what the extras hold
EXTRAS = {
    "PIL": "train",
    "filelock": "train",
    "huggingface_hub": "hub",
    "matplotlib": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pyarrow": "parquet",
    "rich": "train",
    "shtab": "completion",
    "starlette": "demo",
    "tensorboard": "tensorboard",
    "torch_fidelity": "perceptual",
    "torchmetrics": "train",
    "torchvision": "train",
    "trackio": "trackio",
    "uvicorn": "demo",
    "wandb": "wandb",
}


class MissingExtra(FastleError):
    """A package that is needed for what was asked is not installed."""


def missing_extra(error: ModuleNotFoundError, what: str) -> MissingExtra | None:
    """What a user can do about a failed import, or None if no extra has that package.

    Args:
        error: Of the import.
        what: What needs the package.
    """
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return MissingExtra(f'{what} needs {package}, which is not installed: pip install "fastle[{EXTRAS[package]}]"')
