"""What the latent brush shows: a model, what the page must know of it, and pictures to begin with."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from fastle.config import ConfigError, ModelConfig
from fastle.method.model import STRIDE, Autoencoder
from fastle.method.pretrained import find_model, hole_ratio_of, is_saved_model, model_of_run
from fastle.method.transforms import hole_side
from fastle.options import pair_text
from fastle.training.report import grids, read_grid

from .pictures import PICTURES, make_pictures

Backend = Literal["http", "onnx"]  # where the page's model runs: behind the server, or in the browser
BATCH = 16  # most images or latents in one request
LARGE = 128  # pixels at which a smaller spatial model is shown that has no pictures of its own
LARGEST = 512  # pixels; larger pictures do not follow the pointer


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

    def png(self) -> bytes:
        """The image as a PNG file."""
        encoded = io.BytesIO()
        Image.fromarray(self.pixels.permute(1, 2, 0).squeeze(2).numpy()).save(encoded, "PNG")
        return encoded.getvalue()


@dataclass(frozen=True, slots=True)
class Demo:
    """A model on the device that computes, in evaluation mode.

    Attributes:
        model: The model.
        source, weights: What `Autoencoder.from_pretrained` takes to load it.
        size: Height and width of the page's images, pixels. A spatial model takes others than those of its training.
        hole: The side of the hole that a masked model was trained with, pixels; None for other models.
        pictures: At least one.
    """

    model: Autoencoder
    source: str
    size: int
    hole: int | None
    pictures: list[Picture]
    weights: str = "model"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the latent of an image of the page."""
        return replace(self.model.config, size=self.size).latent_shape

    def manifest(self, backend: Backend) -> dict[str, Any]:
        """What the page must know, as JSON can hold it; brush/backend.js hands it to the page."""
        config = self.model.config
        return {
            "backend": backend,
            "name": self.source,
            "weights": self.weights,
            "size": self.size,
            "channels": config.channels,
            "latent": list(self.latent_shape),
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


def open_demo(
    name: str, device: torch.device, size: int | None = None, weights: str = "model"
) -> tuple[Demo, str | None]:
    """The demo of a run directory or of a saved or shipped model; also a line to show if a checkpoint is damaged.

    The pictures are those of the run's newest grid, which are images of its validation split. A model without a grid,
    and one at another size than its own, has those of `make_pictures`.

    Args:
        name: What `find_model` takes.
        device: Where to compute.
        size: Of the images, pixels. By default that of the training, or `LARGE` for a smaller spatial model that was
            saved without its run.
        weights: "model", or an average that the run keeps.

    Raises:
        FastleError: There is no such model, it cannot be used, its images are neither RGB nor grey, or it cannot take
            images of that size.
    """
    path, remark = find_model(name), None
    saved = is_saved_model(path)
    if saved:
        model = Autoencoder.from_pretrained(path, device, weights=weights)
    else:
        model, _, remark = model_of_run(path, device, weights)
    ratio = hole_ratio_of(path)
    config = model.config
    if config.channels not in (1, 3):
        raise ConfigError(f"{name} has images of {config.channels} channels: a page can show 1 (grey) or 3 (RGB)")
    if size is not None:
        _check_size(name, config, size)
    elif not isinstance(config.size, int):
        remark = "\n".join([*([remark] if remark else []), _not_square(name, config)])
    own = min(config.sides)
    pictures = _grid_pictures(path, own, config.channels) if config.size == own and size in (None, own) else []
    if size is None:
        size = max(own, LARGE) if saved and config.latent is None else own
    hole = None if ratio is None else hole_side(ratio, (1, config.channels, size, size))
    # the layout in which the decoder computes: half the time of a frame on a CPU
    model = model.to(memory_format=torch.channels_last)
    return Demo(model, name, size, hole, pictures or _standard_pictures(size, config.channels), weights), remark


def _check_size(name: str, config: ModelConfig, size: int) -> None:
    if config.latent is not None and size != config.size:
        own = pair_text(config.size)
        raise ConfigError(f"--size {size}: the latent of {name} is pooled, so it takes images of {own} px only")
    if size % STRIDE or not STRIDE <= size <= LARGEST:
        raise ConfigError(f"--size must be divisible by {STRIDE}, and at most {LARGEST}, not {size}")


def _not_square(name: str, config: ModelConfig) -> str:
    """The line to show of a model whose images are not square. Raises ConfigError if it takes no others."""
    own = pair_text(config.size)
    if config.latent is not None:
        raise ConfigError(
            f"the brush shows square images, and the latent of {name} is pooled, so it takes images of {own} px only: "
            "use fastle reconstruct or fastle interpolate"
        )
    return f"{name} was trained on images of {own} px; the brush shows square ones"


def _grid_pictures(run: Path, size: int, channels: int) -> list[Picture]:
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


def _standard_pictures(size: int, channels: int) -> list[Picture]:
    imports = "from fastle.web.pictures import make_pictures"
    return [
        Picture(name, image, imports, f"make_pictures({size}, {channels})[{i}:{i + 1}]")
        for i, (name, image) in enumerate(zip(PICTURES, make_pictures(size, channels), strict=True))
    ]
