"""Parts of a run that the caller makes in Python. A configuration only knows what they are called."""

from __future__ import annotations

from dataclasses import dataclass

from fastle.options import Checked, ConfigError, option, shown


@dataclass(frozen=True, slots=True)
class OwnConfig(Checked):
    """A judge or a transformation of the caller's own.

    Attributes:
        own: Its name; a judge's has a digest of its weights, a dataclass's has its fields.
    """

    own: str = option("a part that the caller makes")

    @property
    def name(self) -> str:
        """The name, as other transformations have one."""
        return self.own

    def __str__(self) -> str:
        return self.own


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNetworks(Checked):
    """An encoder and a decoder of the caller's own.

    Attributes:
        encoder, decoder: The names of their classes.
        latent_shape: Of one image: (D,), or (c, h, w) of a spatial latent.
        parameter_count: Of both, and of the latent's BatchNorm.
    """

    encoder: str = option("the class of the encoder")
    decoder: str = option("the class of the decoder")
    latent_shape: tuple[int, ...]
    parameter_count: int

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        # JSON knows no tuples
        given: object = self.latent_shape
        shape = tuple(given) if isinstance(given, (list, tuple)) else ()
        if len(shape) not in (1, 3) or any(type(side) is not int or side < 1 for side in shape):
            raise ConfigError(f"latent_shape must be (D,) or (c, h, w), not {shown(given)}")
        object.__setattr__(self, "latent_shape", shape)
        if type(self.parameter_count) is not int or self.parameter_count < 1:
            raise ConfigError(f"parameter_count must be a whole number above 0, not {shown(self.parameter_count)}")
