"""A whole run, and every setting of it by its name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from fastle.options import ConfigError, Option, check_names, from_fields, options_of, pair_text, shown

from .data import DataConfig
from .model import ModelConfig
from .objective import MASKED, ObjectiveConfig
from .own import OwnConfig
from .training import TrainConfig
from .transform import TRANSFORM_OPTIONS, CropResizeConfig

RecipeName = Literal["tuned", "post"]

# no field of its own: it decides the defaults of fields
TUNED: RecipeName = "tuned"
RECIPE = Option(
    name="recipe",
    choices=get_args(RecipeName),
    help="what flags leave open: as measured to be best on photographs of 32 px, or the post's own settings",
    default=TUNED,
)
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


def setting_as_typed(name: str, value: Any) -> Any:
    """A setting of `RunConfig.settings` as people type it; the names of own parts are text already."""
    return OPTIONS[name].as_typed(value) if name in OPTIONS else value


# with less, rounding spoils the small difference of two features that the judge compares
LEAST_REACH_IN_BF16 = 0.3


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
                pair = f"the model's {name} is {pair_text(model)} and the images' is {pair_text(data)}"
                raise ConfigError(f"{pair}: they must be equal")
        size, transform, hole = min(self.model.sides), self.objective.transform, self.objective.hole_ratio
        if isinstance(transform, CropResizeConfig) and int(transform.ratio * size) < 1:
            raise ConfigError(
                f"--crop-ratio {transform.ratio:g} of {size} px is less than a pixel: use {1 / size:.3g} or more"
            )
        # every box of this side covers the whole image
        most = 2 * max(self.model.sides) - 1
        if isinstance(transform, CropResizeConfig) and max(transform.blur_views, default=0) > most:
            raise ConfigError(
                f"--blur-views {max(transform.blur_views)}: use {most} or less for images of "
                f"{pair_text(self.model.size)} px"
            )
        if hole is not None and round(math.sqrt(hole) * size) < 1:
            raise ConfigError(f"--hole-ratio {hole:g} of {size} px is less than a pixel: use {1 / size**2:.3g} or more")
        reach = self.objective.judge_reach
        if self.train.precision == "bf16" and reach < LEAST_REACH_IN_BF16:
            raise ConfigError(
                f"--judge-reach {reach:g} is lost in the rounding of bf16: use --precision fp32, or a reach of at "
                f"least {LEAST_REACH_IN_BF16}"
            )

    def own(self) -> list[str]:
        """The keywords of `fastle.fit` for the parts that only the caller can make."""
        parts = {
            "model": self.model.own,
            "judge": isinstance(self.objective.judge, OwnConfig),
            "transform": isinstance(self.objective.transform, OwnConfig),
        }
        return [name for name, part in parts.items() if part]

    def settings(self) -> dict[str, dict[str, Any]]:
        """What the run uses, by the names of `OPTIONS`, in the groups data, model, objective and training."""
        transform = self.objective.transform
        groups = {
            "data": self.data, "model": self.model, "objective": self.objective, "training": self.train
        }  # fmt: skip
        by_group: dict[str, dict[str, Any]] = {}
        for group, section in groups.items():
            names = self.objective.used() if section is self.objective else options_of(type(section))
            values = {options_of(type(section))[field].name: getattr(section, field) for field in names}
            by_group[group] = {name: value for name, value in values.items() if value not in (None, ())}
        del by_group["model"]["size"]
        if self.model.own is not None:
            by_group["model"] = {"encoder": self.model.own.encoder, "decoder": self.model.own.decoder}
        if isinstance(self.objective.judge, OwnConfig):
            by_group["objective"]["judge"] = self.objective.judge.own
        if self.train.schedule != "trapezoid":
            del by_group["training"]["decay"]
        if isinstance(transform, OwnConfig):
            by_group["objective"]["transform"] = transform.own
        elif transform is not None:
            fields = options_of(type(transform)).items()
            values = {made.name: getattr(transform, field) for field, made in fields}
            by_group["objective"] |= {"transform": transform.name} | {k: v for k, v in values.items() if v is not None}
        return by_group

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, as config.json holds them."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict(), "objective": self.objective.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`, also for what earlier versions wrote.

        Raises:
            ConfigError: A field is missing, unknown or out of range.
        """
        readers: dict[str, Callable[[Any], Any]] = {
            "model": ModelConfig.from_dict,
            "objective": ObjectiveConfig.from_dict,
            "data": partial(from_fields, DataConfig),
            "train": partial(from_fields, TrainConfig),
        }
        # config.json has its format too
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
