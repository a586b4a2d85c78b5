"""The model's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastle.options import Checked, ConfigError, check_names, from_fields, option, shown

from .data import Size, image_size, plain_size, sides_of
from .own import OwnNetworks

# length of the masked setting's latent
POOLED_LATENT = 128
MOST_CHANNELS = 1_000  # of images
MOST_WEIGHTS = 2**40  # of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Checked):
    """The autoencoder of docs/method.md, section 4.

    Attributes:
        size: Of the images, pixels: a number for a square, or (height, width), each divisible by 8.
        channels: Of the images, at least 1.
        hidden: H, the width after the stem.
        map_channels: C, channels of the (c, height/8, width/8) map; divides 8 h.
        latent: Length of a pooled latent, or None for a spatial one (the map itself).
        own: The caller's own encoder and decoder in place of fastle's, which alone have a width and a map.
    """

    size: int | tuple[int, int] = image_size(multiple_of=8)
    channels: int
    hidden: int = option("channels after the first convolution", at_least=1, group="model")
    map_channels: int = option(
        "channels of the encoder's map, whose sides are an eighth of the image's", at_least=1, group="model"
    )
    latent: int | None = option(
        "length of a pooled latent",
        at_least=1,
        group="model",
        default=f"no pooling, the latent is the map; {POOLED_LATENT} with --masked",
    )
    own: OwnNetworks | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", plain_size(self.size))
        Checked.__post_init__(self)
        if type(self.channels) is not int or not 1 <= self.channels <= MOST_CHANNELS:
            raise ConfigError(f"channels must be at least 1 and at most {MOST_CHANNELS}, not {shown(self.channels)}")
        if 8 * self.hidden % self.map_channels:
            raise ConfigError(
                f"--map-channels {self.map_channels} must divide 8 times --hidden, which is {8 * self.hidden}"
            )
        weights = max(36 * self.hidden**2, math.prod(self.map_shape) * (self.latent or 0))
        if weights > MOST_WEIGHTS:
            raise ConfigError(
                f"a layer of {weights:.2g} weights fits nowhere: give a smaller --hidden, --map-channels or --latent"
            )

    @classmethod
    def of_own(cls, own: OwnNetworks, *, size: Size, channels: int) -> ModelConfig:
        """The configuration of an encoder and a decoder of the caller's own."""
        latent = own.latent_shape[0] if len(own.latent_shape) == 1 else None
        return cls(size=size, channels=channels, hidden=1, map_channels=1, latent=latent, own=own)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of what the model has."""
        values = asdict(self)
        own = values.pop("own")
        return values if own is None else {"size": self.size, "channels": self.channels, "own": own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        if "own" not in values:
            return from_fields(cls, values)
        check_names("model", values, required=("size", "channels"), known=("size", "channels", "own"))
        check_names("own", values["own"])
        return cls.of_own(from_fields(OwnNetworks, values["own"]), size=values["size"], channels=values["channels"])

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the images, pixels."""
        return sides_of(self.size)

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(c, height/8, width/8)."""
        height, width = self.sides
        return (self.map_channels, height // 8, width // 8)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent,) when pooled, else `map_shape`."""
        if self.own is not None:
            return self.own.latent_shape
        return self.map_shape if self.latent is None else (self.latent,)

    @property
    def parameter_count(self) -> int:
        """The number of trainable parameters, computed without making the model."""
        if self.own is not None:
            return self.own.parameter_count
        hidden, maps, pooled = self.hidden, self.map_channels, self.latent
        total = math.prod(self.map_shape)
        encoder = [
            _conv(4, self.channels, hidden),
            *(_conv(3, hidden, 2 * hidden), _conv(3, 2 * hidden, 2 * hidden)),
            *(_conv(3, 2 * hidden, maps), _conv(3, maps, maps)),
            0 if pooled is None else total * pooled + pooled,
            2 * self.latent_shape[0],
        ]
        decoder = [
            0 if pooled is None else pooled * total + total,
            *(_conv(3, maps, 2 * hidden), _conv(3, 2 * hidden, 2 * hidden), _conv(1, maps, 2 * hidden)),
            *(_conv(3, 2 * hidden, hidden), _conv(3, hidden, hidden), _conv(1, 2 * hidden, hidden)),
            _conv(3, hidden, self.channels),
        ]
        return sum(encoder) + sum(decoder)

    @property
    def compression(self) -> float:
        """Numbers in an image for each number in its latent."""
        return self.channels * math.prod(self.sides) / math.prod(self.latent_shape)


def _conv(side: int, channels_in: int, channels_out: int) -> int:
    """The weights of a convolution and its biases."""
    return (side**2 * channels_in + 1) * channels_out
