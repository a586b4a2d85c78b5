"""What a run computes, as frozen dataclasses that check themselves, and how people set each field.

A command line, a config.json and a checkpoint all describe a run by its `RunConfig`. Each field made by `option`
carries its range, its help text and its name as a flag (see `fastle.options`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from .options import Checked, Option, check_names, from_fields, option, options_of, pick, shown
from .options import ConfigError as ConfigError  # noqa: PLC0414 (where everybody imports it from)

DatasetName = Literal["shapes", "cifar10", "celeba", "folder"]
ObjectiveName = Literal["self-teaching", "pixel"]
JudgeName = Literal["step-frozen", "live", "ema"]
JudgeStatistics = Literal["own", "target"]
JudgeDepth = Literal["code", "features", "all"]
TransformName = Literal["crop-resize", "pixel-mask", "patch-mask", "channel-mask", "noise", "identity", "detail"]
MaskKind = Literal["pixel", "patch", "channel"]
Precision = Literal["fp32", "bf16"]
RecipeName = Literal["tuned", "post"]
Schedule = Literal["constant", "cosine", "trapezoid"]
BadImages = Literal["error", "skip"]

HOLE_RATIO = 0.35
# features of the masked setting's latent
POOLED_LATENT = 128
SIGREG_WEIGHT = 0.03
LARGEST_SIZE = 10_000  # pixels: larger images are refused
MOST_CHANNELS = 1_000  # of images
MOST_WEIGHTS = 2**40  # of a layer
DEFAULT_TRANSFORM: TransformName = "crop-resize"


def _size(multiple_of: int | None = None) -> Any:
    """A field of the data and of the model, which alone needs sizes divisible by 8."""
    text = "height and width of the images, pixels, divisible by 8"
    return option(text, at_least=1, cap=LARGEST_SIZE, multiple_of=multiple_of, group="data", metavar="PX")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Checked):
    """Where the images come from.

    Attributes:
        dataset: the kind of source.
        root: absolute path of the data; None for shapes, which are made.
        size, channels: of the images that the loader hands out.
        bad_images: whether an image file that cannot be used is an error, or is left out.
    """

    dataset: DatasetName = option("shapes are made on the fly; folder is any tree of images", group="data", default="")
    root: str | None = option(
        "the folder that holds the images", initial=None, name="data", group="data", metavar="DIR", default=""
    )
    size: int = _size()
    channels: int = option("1 reads a folder's images as grey, 3 as colour", choices=(1, 3), group="data")
    bad_images: BadImages = option(
        "whether image files that cannot be used are an error, which names all of them, or are left out",
        initial="error",
        group="data",
    )

    def __post_init__(self) -> None:
        # slots=True makes the class anew, and super() without arguments would mean the old one
        Checked.__post_init__(self)
        if self.root is not None and "\0" in self.root:
            raise ConfigError(f"--data must be a path, not {shown(self.root)}")
        if self.bad_images == "skip" and self.dataset in ("shapes", "cifar10"):
            raise ConfigError(f"--bad-images skip has no effect with {self.dataset}, which has no image files")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Checked):
    """The autoencoder of docs/method.md, section 4.

    Attributes:
        size: height and width of the images, pixels; divisible by 8.
        channels: of the images, at least 1.
        hidden: h, the width after the stem.
        map_channels: c, channels of the (c, size/8, size/8) map; divides 8 h.
        latent: features of a pooled latent, or None for a spatial one (the map itself).
    """

    size: int = _size(multiple_of=8)
    channels: int
    hidden: int = option("channels after the first convolution", at_least=1, group="model")
    map_channels: int = option(
        "channels of the encoder's map, whose sides are an eighth of the image's", at_least=1, group="model"
    )
    latent: int | None = option(
        "features of a pooled latent",
        at_least=1,
        group="model",
        default=f"no pooling, the latent is the map; {POOLED_LATENT} with --masked",
    )

    def __post_init__(self) -> None:
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
        """Numbers in an image for each number in its latent."""
        return self.channels * self.size**2 / math.prod(self.latent_shape)


@dataclass(frozen=True, slots=True)
class CropResizeConfig(Checked):
    """A square crop of each image, resized to the image's size.

    Attributes:
        ratio: side of the crop over the image's, in (0, 1].
        ratio_max: each step draws the side, up to this share, in (ratio, 1]; None keeps `ratio`.
        crops: crops of each image, at least 1.
        full_view: whether the whole image is compared too, with the weight of all crops together.
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
        default="a fixed side",
    )
    crops: int = option("crops of each image, each with a box of its own", initial=1, at_least=1, group="objective")
    full_view: bool = option("compare the whole image too", initial=False, group="objective", default="the recipe's")

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.ratio_max is not None and self.ratio_max <= self.ratio:
            raise ConfigError(f"--crop-ratio-max must be above --crop-ratio {self.ratio:g}, not {self.ratio_max:g}")


@dataclass(frozen=True, slots=True)
class MaskConfig(Checked):
    """Zeros in a share of the pixels, of the 4x4 patches or of the channels.

    Attributes:
        kind: what the mask sets to zero.
        ratio: the share, in (0, 1).
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
        std: standard deviation, above 0, on images in [0, 1].
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


TransformConfig = CropResizeConfig | MaskConfig | NoiseConfig | DetailConfig | IdentityConfig
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

# no field of its own: it decides the defaults of fields
TUNED: RecipeName = "tuned"
RECIPE = Option(
    name="recipe",
    choices=get_args(RecipeName),
    help="what flags leave open: the best that fastle's measurements know, or the post's own settings",
    default=TUNED,
)
# masked is no field of its own: an objective with a hole is masked
MASKED = Option(
    name="masked", kind=bool, help="cut a hole into the input: the symmetric masked setting", group="objective"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(Checked):
    """One row of docs/method.md, section 1. The pixel baseline has a name and a hole ratio, and leaves the rest alone.

    Attributes:
        name: "self-teaching", or "pixel" for the baseline.
        hole_ratio: share of the input that the hole covers in the masked setting, in (0, 1); None without a hole.
        judge: the encoder that compares.
        judge_statistics: the batch whose mean and variance normalise J(T x̂): its own, or that of J(T x).
        judge_depth: what the judge compares: the code, the down blocks' outputs too, or the stem's as well.
        transform: what the judge is shown; None for the baseline.
        sigreg_weight: λ, at least 0.
        slices: M, at least 1.
    """

    name: ObjectiveName = option(
        "the method, or its pixel baseline", initial="self-teaching", name="objective", group="objective"
    )
    hole_ratio: float | None = option(
        "share of the input that the hole covers, with --masked",
        initial=None,
        above=0,
        below=1,
        group="objective",
        metavar="R",
        default=str(HOLE_RATIO),
    )
    judge: JudgeName = option("the encoder that compares", initial="step-frozen", group="objective")
    judge_statistics: JudgeStatistics = option(
        "the batch whose mean and variance normalise the judged reconstructions: their own, or that of their targets",
        initial="own",
        group="objective",
        default="the recipe's",
    )
    judge_depth: JudgeDepth = option(
        "what the judge compares: the code, the features of the blocks before it too, or those of every layer",
        initial="code",
        group="objective",
        default="the recipe's",
    )
    sigreg_weight: float = option(
        "weight λ of SIGReg",
        initial=SIGREG_WEIGHT,
        at_least=0,
        group="objective",
        metavar="W",
        default="the recipe's",
    )
    slices: int = option("random slices of SIGReg", initial=256, at_least=1, group="objective", metavar="M")
    transform: TransformConfig | None = option(
        "what the judge is shown of each image",
        initial=None,
        choices=get_args(TransformName),
        group="objective",
        default=DEFAULT_TRANSFORM,
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.name == "self-teaching" and self.transform is None:
            raise ConfigError("--objective self-teaching needs a transformation")
        if self.name == "pixel":
            unused = [field for field in dataclasses.fields(self) if field.name not in PIXEL_FIELDS]
            for field in unused:
                if getattr(self, field.name) != field.default:
                    flag = options_of(ObjectiveConfig)[field.name].flag
                    raise ConfigError(f"{flag} has no effect with --objective pixel")

    @property
    def masked(self) -> bool:
        """Whether the input has a hole."""
        return self.hole_ratio is not None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of what the row uses, the transformation as a dict with its name."""
        names = PIXEL_FIELDS if self.transform is None else tuple(options_of(ObjectiveConfig))
        values = {name: getattr(self, name) for name in names}
        if self.transform is not None:
            fields = options_of(type(self.transform))
            values["transform"] = {"name": self.transform.name} | {f: getattr(self.transform, f) for f in fields}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObjectiveConfig:
        """The inverse of `to_dict`.

        It also reads what fastle wrote before transformations had settings of their own: "transform" is the name, and
        "crop_ratio" and the like stand beside it, those that the row does not use null.
        """
        transform = values.get("transform")
        if isinstance(transform, Mapping):
            check_names("transform", transform, required=("name",))
            OPTIONS["transform"].check(transform["name"] or "")
            made, decided = TRANSFORMS[transform["name"]]
            fields = {field: value for field, value in transform.items() if field != "name"}
            return from_fields(cls, {**values, "transform": from_fields(made, fields, decided)})
        flat = {name: values[name] for name in TRANSFORM_OPTIONS if values.get(name) is not None}
        for name, value in flat.items():
            TRANSFORM_OPTIONS[name].check(value)
        unused = {name for name, value in values.items() if value is None and values.get("name") == "pixel"}
        given = {name: value for name, value in values.items() if name not in {*TRANSFORM_OPTIONS, *unused}}
        return from_fields(cls, given | {"transform": None if transform is None else transform_config(transform, flat)})


PIXEL_FIELDS = ("name", "hole_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Checked):
    """The loop: AdamW, the learning rate of each step, and averages of the weights.

    Attributes:
        steps, epochs: the length of the run; one of the two.
        batch_size: of all ranks together.
        accumulate: parts of a batch, whose gradients are averaged; each has statistics and draws of its own.
        lr: peak of the learning rate, above 0.
        schedule, warmup, decay: how it changes over the run; see `fastle.training.schedule`.
        weight_decay: AdamW's, at least 0.
        clip: bound on the norm of the gradient of all weights, above 0; None for no bound.
        averages: lengths of averages of the weights, σ_rel of EDM2; see `fastle.training.average`.
        seed: of the weights, the order of the images and every draw.
        precision: "bf16" is autocast with fp32 weights, latent and statistics.
    """

    steps: int | None = option("length of the run; a finished run goes on with more", initial=None, at_least=1)
    epochs: int | None = option("length of the run in passes over the images", initial=None, at_least=1)
    # the judge's BatchNorm has no variance over one image
    batch_size: int = option("images in a step, of all processes together", initial=128, at_least=2)
    accumulate: int = option(
        "take the gradient of a batch in this many parts, each with statistics of its own", initial=1, at_least=1
    )
    lr: float = option("learning rate of AdamW, its peak where it changes", above=0, metavar="LR")
    schedule: Schedule = option(
        "whether the learning rate stays, falls along a cosine, or falls linearly in the last part of the run",
        initial="constant",
        default="the recipe's",
    )
    warmup: float = option(
        "first share of the run, over which the learning rate rises from 0",
        initial=0.0,
        at_least=0,
        below=1,
        metavar="R",
        default="the recipe's",
    )
    decay: float = option(
        "last share of the run, over which --schedule trapezoid falls", initial=0.4, above=0, at_most=1, metavar="R"
    )
    weight_decay: float = option("weight decay of AdamW", initial=0.01, at_least=0, metavar="W")
    clip: float | None = option("bound on the norm of the gradient", initial=None, above=0, metavar="G", default="none")
    averages: tuple[float, ...] = option(
        "lengths of averages of the weights, as a share of the run (0.05 is EDM2's shortest)",
        initial=(),
        many=True,
        above=0,
        below=0.28,
        metavar="R",
        default="the recipe's",
    )
    seed: int = option(
        "seed of the weights, the order of the images and every draw", initial=0, at_least=0, below=2**63
    )
    precision: Precision = option("bf16 is autocast, with weights and statistics in fp32", initial="fp32")

    def __post_init__(self) -> None:
        if not isinstance(self.averages, (list, tuple)):
            raise ConfigError(f"--averages must be numbers in a list, not {shown(self.averages)}")
        # JSON knows no tuples
        object.__setattr__(self, "averages", tuple(self.averages))
        Checked.__post_init__(self)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either --steps or --epochs, not both")
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size} into parts of 2 or more"
            )
        if len(set(self.averages)) < len(self.averages):
            raise ConfigError(f"--averages {' '.join(map(str, self.averages))} names a length twice")


TRANSFORM_OPTIONS = {made.name: made for kind, _ in TRANSFORMS.values() for made in options_of(kind).values()}
# every setting of a run by its name, in the order of --help
OPTIONS: dict[str, Option] = {
    made.name: made
    for group in (
        options_of(DataConfig),
        {field: made for field, made in options_of(ModelConfig).items() if field != "size"},
        {"masked": MASKED},
        options_of(ObjectiveConfig),
        TRANSFORM_OPTIONS,
        {"recipe": RECIPE},
        options_of(TrainConfig),
    )
    for made in group.values()
}


def transform_config(name: str, settings: Mapping[str, Any]) -> TransformConfig:
    """The transformation of a name, with those of the settings that are its own.

    Raises:
        ConfigError: there is no such transformation, or a setting is out of range.
    """
    OPTIONS["transform"].check(name)
    made, decided = TRANSFORMS[name]
    config: TransformConfig = made(**decided, **pick(made, settings))
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, apart from the device."""

    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        for name, model, data in (
            ("size", self.model.size, self.data.size), ("channels", self.model.channels, self.data.channels)
        ):  # fmt: skip
            if model != data:
                raise ConfigError(f"the model's {name} is {model} and the images' is {data}: they must be equal")
        size, transform, hole = self.model.size, self.objective.transform, self.objective.hole_ratio
        if isinstance(transform, CropResizeConfig) and int(transform.ratio * size) < 1:
            raise ConfigError(
                f"--crop-ratio {transform.ratio:g} of {size} px is less than a pixel: use {1 / size:.3g} or more"
            )
        if hole is not None and round(math.sqrt(hole) * size) < 1:
            raise ConfigError(f"--hole-ratio {hole:g} of {size} px is less than a pixel: use {1 / size**2:.3g} or more")

    def settings(self) -> dict[str, dict[str, Any]]:
        """What the run uses, by the names of `OPTIONS`, in the groups data, model, objective and training."""
        transform = self.objective.transform
        groups = {
            "data": self.data, "model": self.model, "objective": self.objective, "training": self.train
        }  # fmt: skip
        shown: dict[str, dict[str, Any]] = {}
        for group, section in groups.items():
            names = PIXEL_FIELDS if section is self.objective and transform is None else options_of(type(section))
            values = {options_of(type(section))[field].name: getattr(section, field) for field in names}
            shown[group] = {name: value for name, value in values.items() if value not in (None, ())}
        del shown["model"]["size"]
        if self.train.schedule != "trapezoid":
            del shown["training"]["decay"]
        if transform is not None:
            fields = options_of(type(transform)).items()
            values = {made.name: getattr(transform, field) for field, made in fields}
            shown["objective"] |= {"transform": transform.name} | {k: v for k, v in values.items() if v is not None}
        return shown

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, as config.json holds them."""
        return dataclasses.asdict(self) | {"objective": self.objective.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`, also for what earlier versions wrote.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        readers: dict[str, Callable[[Any], Any]] = {
            "model": partial(from_fields, ModelConfig),
            "objective": ObjectiveConfig.from_dict,
            "data": partial(from_fields, DataConfig),
            "train": partial(from_fields, TrainConfig),
        }
        # config.json says what it is, too
        check_names("configuration", values, required=readers, known=(*readers, "format"))
        sections = {}
        for name, read in readers.items():
            check_names(name, values[name])
            try:
                sections[name] = read(values[name])
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
        return cls(**sections)

    def differences(self, later: RunConfig) -> list[str]:
        """What differs in a later configuration, "name before → after" each, apart from the length of the run."""
        train = replace(later.train, steps=self.train.steps, epochs=self.train.epochs)
        old, new = _flatten(self.to_dict()), _flatten(replace(later, train=train).to_dict())
        return [
            f"{name} {shown(old.get(name))} → {shown(new.get(name))}"
            for name in old | new
            if old.get(name) != new.get(name)
        ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
