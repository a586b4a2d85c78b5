"""What the commands share that use a trained model: the model behind a name, and how images become its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastle.config import DataConfig, RunConfig
from fastle.method.model import Autoencoder
from fastle.method.pretrained import config_of, find_model


@dataclass(frozen=True, slots=True)
class Loaded:
    """A trained model.

    Attributes:
        model: In evaluation mode, on its device.
        path: The run directory, the checkpoint or the saved model.
        config: Of its run; None for a saved model, which does not know it.
        data: How image files become its input.
    """

    model: Autoencoder
    path: Path
    config: RunConfig | None
    data: DataConfig


def load_model(name: str, device: torch.device, weights: str | None = None) -> Loaded:
    """Loads the model that a name leads to.

    Args:
        name: See `Autoencoder.from_pretrained`.
        device: The device to put the model on.
        weights: "model", which None stands for, or an average that the run keeps.

    Raises:
        FastleError: See `Autoencoder.from_pretrained`; or the images of the model are neither grey nor RGB.
    """
    path = find_model(name)
    config = config_of(path)
    model = Autoencoder.from_pretrained(path, device, weights=weights or "model")
    if config is not None:
        return Loaded(model, path, config, config.data)
    data = DataConfig(dataset="folder", size=model.config.size, channels=model.config.channels, bits=model.bits)
    return Loaded(model, path, None, data)
