"""The rows of docs/method.md, section 1, and their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastle.options import Checked, ConfigError, Option, check_names, from_fields, option, options_of, pick

from .own import OwnConfig
from .transform import DEFAULT_TRANSFORM, TRANSFORM_OPTIONS, TRANSFORMS, TransformConfig, TransformName

ObjectiveName = Literal["self-teaching", "pixel"]
JudgeName = Literal["step-frozen", "live", "ema"]
JudgeStatistics = Literal["own", "target"]
JudgeDepth = Literal["code", "features", "all"]
BranchStatistics = Literal["own", "joint"]

HOLE_RATIO = 0.35
SIGREG_WEIGHT = 0.03
# the fields that the pixel baseline has
PIXEL_FIELDS = ("name", "hole_ratio", "holes", "clean_branch")
# those that have no effect without a hole
MASKED_FIELDS = ("holes", "clean_branch", "branch_statistics", "consistency_weight", "masked_weight")
# masked is no field of its own: an objective with a hole is masked
MASKED = Option(
    name="masked", kind=bool, help="cut a hole into the input: the symmetric masked setting", group="objective"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(Checked):
    """One row of docs/method.md, section 1. The pixel baseline sets `PIXEL_FIELDS` only.

    Attributes:
        name: "self-teaching", or "pixel" for the baseline.
        hole_ratio: Share of the input that the hole covers in the masked setting, in (0, 1); None without a hole.
        holes: How many holes each image has in the masked setting, at least 1: each in a copy of its own, which is one
            more masked branch.
        clean_branch: Whether the pixel baseline reconstructs whole images beside those with a hole, as the masked
            setting of the method always does.
        judge: The encoder that compares, or a network of the caller's own.
        judge_statistics: The batch whose mean and variance normalise J(T x̂): its own, or that of J(T x).
        judge_depth: What the judge compares: the code, the down blocks' outputs too, or the stem's as well.
        judge_reach: r, from 0.01 to 1: the share of the way from a reconstruction to its image at which J's target
            lies; 1 is the image itself. Below 1 the judge must be frozen and the statistics the target's.
        transform: What the judge is shown; None for the baseline.
        branch_statistics: The codes whose mean and variance normalise a branch's latents in the masked setting: its
            own, or those of all branches.
        consistency_weight, masked_weight: Weights of these two terms in the masked setting, where that of the clean
            branch is 1; the first is at least 0, the second above 0.
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
    holes: int = option(
        "holes of each image, each in a copy of its own, with --masked",
        initial=1,
        at_least=1,
        group="objective",
        metavar="N",
        default="the preset's",
    )
    clean_branch: bool = option(
        "reconstruct whole images beside those with a hole, as the method does, with --objective pixel --masked",
        initial=False,
        group="objective",
    )
    judge: JudgeName | OwnConfig = option(
        "the encoder that compares", initial="step-frozen", choices=get_args(JudgeName), group="objective"
    )
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
    judge_reach: float = option(
        "share of the way from a reconstruction to its image at which the judge's target lies; 1 is the image itself",
        initial=1.0,
        at_least=0.01,
        at_most=1,
        group="objective",
        metavar="R",
        default="the recipe's",
    )
    branch_statistics: BranchStatistics = option(
        "the codes whose mean and variance normalise a branch's latents, with --masked: its own, or all branches'",
        initial="own",
        group="objective",
        default="the recipe's",
    )
    consistency_weight: float = option(
        "weight of the consistency of the branches, with --masked; that of the clean branch's agreement is 1",
        initial=1.0,
        at_least=0,
        group="objective",
        metavar="W",
    )
    masked_weight: float = option(
        "weight of the masked branch's agreement, with --masked",
        initial=1.0,
        above=0,
        group="objective",
        metavar="W",
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
            self._check_unused(options_of(ObjectiveConfig).keys() - PIXEL_FIELDS, "with --objective pixel")
        else:
            self._check_unused(["clean_branch"], "without --objective pixel --masked")
        if self.judge_reach < 1 and self.judge == "live":
            raise ConfigError(
                "--judge-reach below 1 has no meaning with --judge live, which learns from its targets: give --judge "
                "step-frozen or ema, or --judge-reach 1"
            )
        if self.judge_reach < 1 and self.judge_statistics == "own" and self.transform is not None:
            raise ConfigError(
                "--judge-reach below 1 needs the statistics of the target: give --judge-statistics target, or "
                "--judge-reach 1"
            )
        if not self.masked:
            self._check_unused(MASKED_FIELDS, "without --masked")

    def _check_unused(self, fields: Collection[str], why: str) -> None:
        """Raises ConfigError for a field that has no effect and is not at its default."""
        for field in dataclasses.fields(self):
            if field.name in fields and getattr(self, field.name) != field.default:
                raise ConfigError(f"{options_of(ObjectiveConfig)[field.name].flag} has no effect {why}")

    @property
    def masked(self) -> bool:
        """Whether the input has a hole."""
        return self.hole_ratio is not None

    def used(self) -> list[str]:
        """The fields that have an effect on the row."""
        pixel = self.transform is None
        unused = {"clean_branch"} if self.masked and not pixel else set() if self.masked else {*MASKED_FIELDS}
        return [name for name in (PIXEL_FIELDS if pixel else options_of(ObjectiveConfig)) if name not in unused]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of what the row uses, the transformation as a dict with its name."""
        values = {name: getattr(self, name) for name in self.used()}
        if isinstance(self.judge, OwnConfig):
            values["judge"] = {"own": self.judge.own}
        if isinstance(self.transform, OwnConfig):
            values["transform"] = {"own": self.transform.own}
        elif self.transform is not None:
            fields = options_of(type(self.transform))
            values["transform"] = {"name": self.transform.name} | {f: getattr(self.transform, f) for f in fields}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObjectiveConfig:
        """The inverse of `to_dict`.

        It also reads what fastle wrote before transformations had settings of their own: "transform" is the name, and
        "crop_ratio" and the like stand beside it, those that the row does not use null.
        """
        judge, transform = values.get("judge"), values.get("transform")
        if isinstance(judge, Mapping):
            values = {**values, "judge": from_fields(OwnConfig, judge)}
        if isinstance(transform, Mapping) and "own" in transform:
            return from_fields(cls, {**values, "transform": from_fields(OwnConfig, transform)})
        if isinstance(transform, Mapping):
            check_names("transform", transform, required=("name",))
            options_of(cls)["transform"].check(transform["name"] or "")
            made, decided = TRANSFORMS[transform["name"]]
            fields = {field: value for field, value in transform.items() if field != "name"}
            return from_fields(cls, {**values, "transform": from_fields(made, fields, decided)})
        flat = {name: values[name] for name in TRANSFORM_OPTIONS if values.get(name) is not None}
        for name, value in flat.items():
            TRANSFORM_OPTIONS[name].check(value)
        unused = {name for name, value in values.items() if value is None and values.get("name") == "pixel"}
        given = {name: value for name, value in values.items() if name not in {*TRANSFORM_OPTIONS, *unused}}
        return from_fields(cls, given | {"transform": None if transform is None else transform_config(transform, flat)})


def transform_config(name: str, settings: Mapping[str, Any]) -> TransformConfig:
    """The transformation of a name, with those of the settings that are its own.

    Raises:
        ConfigError: There is no such transformation, or a setting is out of range.
    """
    options_of(ObjectiveConfig)["transform"].check(name)
    made, decided = TRANSFORMS[name]
    config: TransformConfig = made(**decided, **pick(made, settings))
    return config
