"""The transformations and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastle.options import Checked, ConfigError, option, options_of

from .own import OwnConfig

TransformName = Literal["crop-resize", "pixel-mask", "patch-mask", "channel-mask", "noise", "identity", "detail"]
MaskKind = Literal["pixel", "patch", "channel"]

DEFAULT_TRANSFORM: TransformName = "crop-resize"


@dataclass(frozen=True, slots=True)
class CropResizeConfig(Checked):
    """A crop of each image, with its proportions, resized to the image's size.

    Attributes:
        ratio: Sides of the crop over the image's, in (0, 1].
        ratio_max: Each step draws the side, up to this share, in (ratio, 1]; None keeps `ratio`.
        crops: Crops of each image, at least 1.
        full_view: Whether the whole image is compared too, with the weight of all other views together.
        blur_views: Sides, pixels, of the boxes that blur grey copies of the whole image, odd: each is one more view,
            with the weight of a crop. A side of 1 leaves the grey image as it is.
    """

    name: ClassVar[TransformName] = "crop-resize"

    ratio: float = option(
        "side of the crop over the image's", above=0, at_most=1, name="crop_ratio", group="objective", metavar="R"
    )
    ratio_max: float | None = option(
        "draw the crop's side anew in each step, log-uniform from --crop-ratio to this share",
        initial=None,
        above=0,
        at_most=1,
        name="crop_ratio_max",
        group="objective",
        metavar="R",
        default="the preset's, without --crop-ratio; otherwise a fixed side",
    )
    crops: int = option("crops of each image, each with a box of its own", initial=1, at_least=1, group="objective")
    full_view: bool = option("compare the whole image too", initial=False, group="objective", default="the recipe's")
    blur_views: tuple[int, ...] = option(
        "compare grey copies of the whole image too, blurred by boxes of these odd sides, pixels; none without a side",
        initial=(),
        many=True,
        at_least=1,
        group="objective",
        default="the preset's",
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        for side in self.blur_views:
            if side % 2 == 0:
                raise ConfigError(f"--blur-views {side}: a box around a pixel has an odd side, such as {side - 1}")
        if self.ratio_max is not None and self.ratio_max <= self.ratio:
            raise ConfigError(f"--crop-ratio-max must be above --crop-ratio {self.ratio:g}, not {self.ratio_max:g}")


@dataclass(frozen=True, slots=True)
class MaskConfig(Checked):
    """Zeros in a share of the pixels, of the 4x4 patches or of the channels.

    Attributes:
        kind: What the mask sets to zero.
        ratio: The share, in (0, 1).
    """

    kind: MaskKind
    ratio: float = option(
        "share that a mask transformation sets to zero",
        initial=0.7,
        above=0,
        below=1,
        name="mask_ratio",
        group="objective",
        metavar="R",
    )

    @property
    def name(self) -> TransformName:
        """The name of --transform."""
        names: dict[MaskKind, TransformName] = {
            "pixel": "pixel-mask", "patch": "patch-mask", "channel": "channel-mask"
        }  # fmt: skip
        return names[self.kind]


@dataclass(frozen=True, slots=True)
class NoiseConfig(Checked):
    """Gaussian noise.

    Attributes:
        std: Standard deviation, above 0, on images in [0, 1].
    """

    name: ClassVar[TransformName] = "noise"

    std: float = option(
        "standard deviation of --transform noise, on images in [0, 1]",
        initial=0.1,
        above=0,
        name="noise_std",
        group="objective",
        metavar="S",
    )


@dataclass(frozen=True, slots=True)
class DetailConfig(Checked):
    """The five views of the detail stack, beside the image itself."""

    name: ClassVar[TransformName] = "detail"


@dataclass(frozen=True, slots=True)
class IdentityConfig(Checked):
    """The image itself."""

    name: ClassVar[TransformName] = "identity"


TransformConfig = CropResizeConfig | MaskConfig | NoiseConfig | DetailConfig | IdentityConfig | OwnConfig
# the class of each transformation, and the fields that its name decides
TRANSFORMS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "crop-resize": (CropResizeConfig, {}),
    "pixel-mask": (MaskConfig, {"kind": "pixel"}),
    "patch-mask": (MaskConfig, {"kind": "patch"}),
    "channel-mask": (MaskConfig, {"kind": "channel"}),
    "noise": (NoiseConfig, {}),
    "detail": (DetailConfig, {}),
    "identity": (IdentityConfig, {}),
}
TRANSFORM_OPTIONS = {made.name: made for kind, _ in TRANSFORMS.values() for made in options_of(kind).values()}
