"""What a run is: frozen dataclasses that check themselves.

A command line, a config.json and a checkpoint all say the same thing through `RunConfig`; nothing else is an option.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import FastleError

DatasetName = Literal["shapes", "cifar10", "celeba", "folder"]
ObjectiveName = Literal["self-teaching", "pixel"]
JudgeName = Literal["step-frozen", "live", "ema"]
JudgeStatistics = Literal["own", "target"]
TransformName = Literal["crop-resize", "pixel-mask", "patch-mask", "channel-mask", "noise", "identity", "detail"]
Precision = Literal["fp32", "bf16"]
BadImages = Literal["error", "skip"]

MASKS: tuple[TransformName, ...] = ("pixel-mask", "patch-mask", "channel-mask")


class ConfigError(FastleError):
    """A value that cannot be, or values that cannot be together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The autoencoder of method section 4.

    Attributes:
        size: height and width of the images, pixels; divisible by 8.
        channels: of the images.
        hidden: h, the width after the stem.
        map_channels: c, channels of the (c, size/8, size/8) map.
        latent: features of a pooled latent, or None for a spatial one (the map itself).
    """

    size: int
    channels: int
    hidden: int
    map_channels: int
    latent: int | None

    def __post_init__(self) -> None:
        for name in ("size", "channels", "hidden", "map_channels"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.size % 8 == 0, "size", self.size, f"divisible by 8, {max(8, round(self.size / 8) * 8)} say")
        _require(self.latent is None or self.latent >= 1, "latent", self.latent, "at least 1")
        if 8 * self.hidden % self.map_channels:
            raise ConfigError(f"map_channels {self.map_channels} must divide 8 times hidden ({8 * self.hidden})")

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(c, size/8, size/8)."""
        return (self.map_channels, self.size // 8, self.size // 8)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent,) when pooled, else `map_shape`."""
        return self.map_shape if self.latent is None else (self.latent,)

    @property
    def compression(self) -> float:
        """Numbers in an image for each number in its code."""
        return self.channels * self.size**2 / math.prod(self.latent_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """One row of method section 1. What a row does not use is None, so that no setting is ever silently ignored.

    Attributes:
        name: "self-teaching", or "pixel" for the baseline.
        hole_ratio: the share of the input cut out in the masked setting, in (0, 1); None without.
        judge, transform: of a self-teaching row.
        judge_statistics: of the batch that normalises J(T x̂): its own, or that of J(T x); self-teaching only.
        crop_ratio: side of the crop over the image's, in (0, 1]; crop-resize only.
        crop_ratio_max: the side is drawn for each step, up to this share, in (crop_ratio, 1]; None keeps `crop_ratio`.
        crops: of each image, ≥ 1; above 1 crop-resize only.
        mask_ratio: share masked, in (0, 1); the three mask transformations only.
        noise_std: standard deviation, > 0, on images in [0, 1]; noise only.
        sigreg_weight: λ ≥ 0.
        slices: M ≥ 1.
    """

    name: ObjectiveName
    hole_ratio: float | None = None
    judge: JudgeName | None = None
    judge_statistics: JudgeStatistics = "own"
    transform: TransformName | None = None
    crop_ratio: float | None = None
    crop_ratio_max: float | None = None
    crops: int = 1
    mask_ratio: float | None = None
    noise_std: float | None = None
    sigreg_weight: float | None = None
    slices: int | None = None

    def __post_init__(self) -> None:
        if self.hole_ratio is not None:
            _require(0 < self.hole_ratio < 1, "mask-ratio", self.hole_ratio, "between 0 and 1")
        _one_of("objective", self.name, ObjectiveName)
        _one_of("judge", self.judge, JudgeName)
        _one_of("judge-statistics", self.judge_statistics, JudgeStatistics)
        _one_of("transform", self.transform, TransformName)
        used = self._used()
        for name in ("judge", "transform", "crop_ratio", "mask_ratio", "noise_std", "sigreg_weight", "slices"):
            value = getattr(self, name)
            if (value is not None) != (name in used):
                fault = "is missing" if value is None else "has no effect"
                raise ConfigError(f"{_flag(name)} {fault} with {self._row()}")
        if self.judge_statistics != "own" and self.name == "pixel":
            raise ConfigError(f"--judge-statistics has no effect with {self._row()}")
        for name, without in (("crop_ratio_max", None), ("crops", 1)):
            if getattr(self, name) != without and self.transform != "crop-resize":
                raise ConfigError(f"{_flag(name)} has no effect with {self._row()}")
        if self.crop_ratio is not None:
            _require(0 < self.crop_ratio <= 1, "crop-ratio", self.crop_ratio, "above 0 and at most 1")
            if self.crop_ratio_max is not None:
                rule = f"above --crop-ratio {self.crop_ratio:g} and at most 1"
                _require(self.crop_ratio < self.crop_ratio_max <= 1, "crop-ratio-max", self.crop_ratio_max, rule)
        _require(self.crops >= 1, "crops", self.crops, "at least 1")
        if self.mask_ratio is not None:
            _require(0 < self.mask_ratio < 1, "mask-ratio", self.mask_ratio, "between 0 and 1")
        if self.noise_std is not None:
            _require(0 < self.noise_std < math.inf, "noise-std", self.noise_std, "above 0")
        if self.sigreg_weight is not None:
            _require(0 <= self.sigreg_weight < math.inf, "sigreg-weight", self.sigreg_weight, "at least 0")
        if self.slices is not None:
            _require(self.slices >= 1, "slices", self.slices, "at least 1")

    def _used(self) -> set[str]:
        if self.name == "pixel":
            return set()
        ratio = {"crop-resize": {"crop_ratio"}, "noise": {"noise_std"}} | {mask: {"mask_ratio"} for mask in MASKS}
        return {"judge", "transform", "sigreg_weight", "slices"} | ratio.get(self.transform or "", set())

    def _row(self) -> str:
        return "--objective pixel" if self.name == "pixel" else f"--transform {self.transform}"

    @property
    def masked(self) -> bool:
        """Whether a hole is cut into the input."""
        return self.hole_ratio is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the images come from.

    Attributes:
        dataset: the kind of source.
        root: absolute path of the data; None for shapes, which are made.
        size, channels: of the images handed out.
        bad_images: what images that cannot be used are: an error, or left out.
    """

    dataset: DatasetName
    root: str | None
    size: int
    channels: int
    bad_images: BadImages = "error"

    def __post_init__(self) -> None:
        _one_of("dataset", self.dataset, DatasetName)
        _one_of("bad-images", self.bad_images, BadImages)
        if self.bad_images == "skip" and self.dataset in ("shapes", "cifar10"):
            raise ConfigError(f"--bad-images skip has no effect with {self.dataset}, which has no image files")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop: AdamW with PyTorch's defaults at a constant learning rate.

    Attributes:
        steps, epochs: exactly one is given.
        batch_size: of all ranks together.
        lr: learning rate, > 0.
        seed: of the weights, the order of the images and every draw.
        precision: "bf16" is autocast with fp32 weights, latent and statistics.
    """

    steps: int | None
    epochs: int | None
    batch_size: int
    lr: float
    seed: int
    precision: Precision

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either --steps or --epochs, not both")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _one_of("precision", self.precision, Precision)
        # the judge's BatchNorm has no variance over one image
        _require(self.batch_size >= 2, "batch-size", self.batch_size, "at least 2")
        _require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, device apart."""

    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        size, crop, hole = self.model.size, self.objective.crop_ratio, self.objective.hole_ratio
        if crop is not None and int(crop * size) < 1:
            raise ConfigError(f"--crop-ratio {crop:g} of {size} px is less than a pixel: use {1 / size:.3g} or more")
        if hole is not None and round(math.sqrt(hole) * size) < 1:
            raise ConfigError(f"--mask-ratio {hole:g} of {size} px is less than a pixel: use {1 / size**2:.3g} or more")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, as config.json holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        sections = {"model": ModelConfig, "objective": ObjectiveConfig, "data": DataConfig, "train": TrainConfig}
        try:
            return cls(**{name: section(**values[name]) for name, section in sections.items()})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a configuration of this version of fastle: {error}") from None


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{_flag(name)} {value} cannot be: it must be {rule}")


def _one_of(name: str, value: object, choices: object) -> None:
    _require(value is None or value in get_args(choices), name, value, f"one of {', '.join(get_args(choices))}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
