"""What the latent brush shows: a model, what the page must know of it, and pictures to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastle.checkpoint import read_run_config
from fastle.config import ConfigError
from fastle.method.model import Autoencoder
from fastle.method.pretrained import find_model, is_saved_model, of_run
from fastle.method.transforms import hole_side
from fastle.training.report import grids, read_grid

from .pictures import PICTURES, make_pictures

BATCH = 16  # most images or latents in one request


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that the page begins with.

    Attributes:
        name: What people read.
        pixels: uint8 (C, size, size).
        imports, code: Python that makes a batch of this image: a line of imports, and an expression.
    """

    name: str
    pixels: Tensor
    imports: str
    code: str


@dataclass(frozen=True, slots=True)
class Demo:
    """A model on the device that computes, in evaluation mode.

    Attributes:
        model: The model.
        source: What `Autoencoder.from_pretrained` takes to load it.
        hole: The side of the hole that a masked model was trained with, pixels; None for other models.
        pictures: At least one.
    """

    model: Autoencoder
    source: str
    hole: int | None
    pictures: list[Picture]

    def manifest(self) -> dict[str, Any]:
        """What the page must know, as JSON can hold it; brush/model.js hands it to the page."""
        config = self.model.config
        return {
            "name": self.source,
            "size": config.size,
            "channels": config.channels,
            "latent": list(config.latent_shape),
            "hole": self.hole,
            "batch": BATCH,
            "pictures": [
                {
                    "name": picture.name,
                    "file": f"pictures/{i}.png",
                    "python": {"import": picture.imports, "code": picture.code},
                }
                for i, picture in enumerate(self.pictures)
            ],
        }

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Latents, fp32 on the CPU, of uint8 images (B, size, size, C)."""
        return self._encode(images).float().cpu()

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Images, uint8 (B, size, size, C) on the CPU, of fp32 latents."""
        return self._decode(z.to(self._device))

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions, uint8 (B, size, size, C) on the CPU, of uint8 images of that shape."""
        return self._decode(self._encode(images))

    @property
    def _device(self) -> torch.device:
        return self.model.decoder.head.weight.device

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images.to(self._device).permute(0, 3, 1, 2))

    def _decode(self, z: Tensor) -> Tensor:
        pixels = (255 * self.model.decode(z)).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def open_demo(name: str, device: torch.device) -> tuple[Demo, str | None]:
    """The demo of a run directory or of a saved or shipped model; also a line to show if a checkpoint is damaged.

    The pictures are those of the run's newest grid, which are images of its validation split. A model without a grid
    has those of `make_pictures`.

    Raises:
        FastleError: There is no such model, it cannot be used, or its images are neither RGB nor grey.
    """
    path, remark, ratio = find_model(name), None, None
    if is_saved_model(path):
        model = Autoencoder.from_pretrained(path, device)
    else:
        model, _, remark = of_run(path, device)
        ratio = read_run_config(path).objective.hole_ratio
    size, channels = model.config.size, model.config.channels
    if channels not in (1, 3):
        raise ConfigError(f"{name} has images of {channels} channels: a page can show 1 (grey) or 3 (RGB)")
    hole = None if ratio is None else hole_side(ratio, (1, channels, size, size))
    # the layout in which the decoder computes: half the time of a frame on a CPU
    model = model.to(memory_format=torch.channels_last)
    return Demo(model, name, hole, _of_grid(path, size, channels) or _made(size, channels)), remark


def _of_grid(run: Path, size: int, channels: int) -> list[Picture]:
    paths = grids(run)
    if not paths:
        return []
    imports = "from fastle.training.report import read_grid"
    images = read_grid(paths[-1], size)["input"][:, :channels]
    call = f'read_grid({str(paths[-1])!r}, {size})["input"]'
    return [
        Picture(f"Validation image {i + 1}", image, imports, f"{call}[{i}:{i + 1}, :{channels}]")
        for i, image in enumerate(images)
    ]


def _made(size: int, channels: int) -> list[Picture]:
    imports = "from fastle.web.pictures import make_pictures"
    return [
        Picture(name, image, imports, f"make_pictures({size}, {channels})[{i}:{i + 1}]")
        for i, (name, image) in enumerate(zip(PICTURES, make_pictures(size, channels), strict=True))
    ]
