"""Default settings of each dataset (docs/method.md, section 4), and how overrides change them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from .config import (
    DEFAULT_TRANSFORM,
    HOLE_RATIO,
    MASKED_FIELDS,
    OPTIONS,
    PIXEL_FIELDS,
    POOLED_LATENT,
    SIGREG_WEIGHT,
    TRANSFORM_OPTIONS,
    TRANSFORMS,
    TUNED,
    ConfigError,
    CropResizeConfig,
    DataConfig,
    DatasetName,
    JudgeStatistics,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
    plain_size,
    sides_of,
    transform_config,
)
from .options import options_of, pick


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One dataset's row. A `pooled_*` value replaces its namesake when the latent is pooled.

    Attributes:
        crop_ratio, post_crop_ratio: With `--recipe tuned` and a spatial latent, and otherwise.
        sigreg_weight: With `--recipe tuned` and a spatial latent.
        lr, pooled_lr: With `--recipe tuned`, the peak of the falling rate.
        post_lr, post_pooled_lr: With `--recipe post`.
        masked: What `--recipe tuned --masked` sets besides, and instead of the above and of the recipe, with
            crop-resize; chosen in long runs (docs/results.md).
        post_pooled_statistics: The judge's with `--recipe post` and crop-resize. With own statistics a pooled judge
            hardly sees contrast, and training stalls at 32 px (docs/results.md); CelebA keeps the author's choice.
    """

    size: int
    channels: int
    hidden: int
    map_channels: int
    pooled_map_channels: int
    crop_ratio: float
    post_crop_ratio: float
    lr: float
    pooled_lr: float
    post_lr: float
    post_pooled_lr: float
    post_pooled_statistics: JudgeStatistics = "own"
    sigreg_weight: float = SIGREG_WEIGHT
    masked: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: int | None = None


# a judge that sees the whole image in place, or crops of one side, leaves patterns unseen that a long training draws
SMALL_MASKED = {
    "crop_ratio": 0.3, "crop_ratio_max": 1.0, "crops": 2, "full_view": False,
    "branch_statistics": "joint", "masked_weight": 3.0,
}  # fmt: skip
PRESETS: dict[str, Preset] = {
    # the method's toy is 28 px, which the model's stride of 8 does not divide
    "shapes": Preset(
        size=32, channels=1, hidden=32, map_channels=16, pooled_map_channels=32,
        crop_ratio=0.3, post_crop_ratio=0.3, lr=1e-3, pooled_lr=1e-3, steps=400,
        post_lr=1e-3, post_pooled_lr=1e-3, post_pooled_statistics="target",
    ),
    # the post's pooled rate is that of docs/results/small.md
    "cifar10": Preset(
        size=32, channels=3, hidden=64, map_channels=32, pooled_map_channels=64,
        crop_ratio=0.6, sigreg_weight=0.003, post_crop_ratio=0.3, lr=2e-3, pooled_lr=1e-3, epochs=50,
        post_lr=1e-4, post_pooled_lr=3e-4, post_pooled_statistics="target", masked=SMALL_MASKED,
    ),
    "celeba": Preset(
        size=128, channels=3, hidden=128, map_channels=32, pooled_map_channels=128,
        crop_ratio=0.15, post_crop_ratio=0.15, lr=1e-3, pooled_lr=1e-3, post_lr=1e-4, post_pooled_lr=1e-3, epochs=50,
    ),
    # folders below SMALL px take the CIFAR-10 model; the post's rate reaches 24 dB in 2,000 steps
    "small folder": Preset(
        size=32, channels=3, hidden=64, map_channels=32, pooled_map_channels=64,
        crop_ratio=0.6, sigreg_weight=0.003, post_crop_ratio=0.3, lr=2e-3, pooled_lr=1e-3, epochs=50,
        post_lr=1e-3, post_pooled_lr=3e-4, post_pooled_statistics="target", masked=SMALL_MASKED,
    ),
    "folder": Preset(
        size=128, channels=3, hidden=128, map_channels=32, pooled_map_channels=128,
        crop_ratio=0.15, post_crop_ratio=0.15, lr=1e-3, pooled_lr=1e-3, post_lr=1e-4, post_pooled_lr=1e-3, epochs=50,
    ),
}  # fmt: skip
SMALL = 64
# options on which the defaults of others depend
FIRST = ("size", "objective", "transform", "latent", "schedule", "steps", "epochs")

# what each recipe sets beside the presets, by the names of the options; "tuned" is measured at 32 px (docs/results.md)
RECIPES: dict[str, dict[str, Any]] = {
    "tuned": {
        "judge_statistics": "target", "judge_depth": "features", "full_view": True,
        "schedule": "trapezoid", "warmup": 0.05, "clip": 1.0,
    },
    "post": {},
}  # fmt: skip


def make_config(dataset: DatasetName, **overrides: Any) -> RunConfig:
    """The run that a dataset's preset and some overrides describe. An override of None changes nothing.

    Raises:
        ConfigError: A value is out of range, or would have no effect.
        TypeError: There is no such override.

    Overrides:
    """
    unknown = overrides.keys() - OPTIONS.keys()
    if unknown:
        raise TypeError(f"make_config has no override called {', '.join(sorted(unknown))}")
    given = {name: value for name, value in overrides.items() if value is not None}
    if "data" in given:
        given["data"] = str(Path(given["data"]).expanduser().absolute())
    masked, pixel = bool(given.pop("masked", False)), given.get("objective") == "pixel"
    recipe = given.pop("recipe", TUNED)
    OPTIONS["recipe"].check(recipe)
    transform = given.get("transform", DEFAULT_TRANSFORM)
    OPTIONS["transform"].check(transform)
    schedule = given.get("schedule", RECIPES[recipe].get("schedule", "constant"))
    _check_effects(given, dataset, masked=masked, transform=None if pixel else transform, schedule=schedule)

    if "size" in given:
        given["size"] = plain_size(given["size"])
        OPTIONS["size"].check(given["size"])
    small = dataset == "folder" and min(sides_of(given.get("size", SMALL))) < SMALL
    preset = PRESETS["small folder" if small else dataset]
    defaults = _defaults(preset, given, masked=masked, transform=transform, post=recipe == "post")
    of_masked = dict(preset.masked) if masked and recipe == TUNED and transform == "crop-resize" else {}
    if "crop_ratio" in given:
        # a side that somebody asks for is not the least of several
        of_masked.pop("crop_ratio_max", None)
    settings = {"dataset": dataset, "precision": "auto"} | defaults | RECIPES[recipe] | of_masked | given
    objective = pick(ObjectiveConfig, settings) | {"transform": transform_config(transform, settings)}
    if pixel:
        objective = {name: value for name, value in objective.items() if name in PIXEL_FIELDS}
    return RunConfig(
        model=ModelConfig(channels=settings["channels"], **pick(ModelConfig, settings)),
        objective=ObjectiveConfig(**objective),
        data=DataConfig(**pick(DataConfig, settings)),
        train=TrainConfig(**pick(TrainConfig, settings)),
    )


def default_run(config: RunConfig) -> str:
    """The run directory of a configuration, where nobody names one: runs/, dataset and setting."""
    parts = [
        config.data.dataset,
        "masked" if config.objective.masked else "",
        str(config.model.latent or ""),
        "pixel" if config.objective.name == "pixel" else "",
    ]
    return "runs/" + "-".join(part for part in parts if part)


def command_of(config: RunConfig) -> str | None:
    """The shortest fastle-train command that gives a configuration, with DIR for the folder of its images.

    None if no command gives it: Python knows configurations for which there are no flags, and images that are no files.
    """
    if config.data.root is None and config.data.dataset != "shapes":
        return None
    shortest = overrides_of(config)
    if shortest is None:
        return None
    words = ["fastle-train", config.data.dataset]
    for name in filter(shortest.__contains__, OPTIONS):
        flag, value = OPTIONS[name].flag, shortest[name]
        if OPTIONS[name].kind is bool:
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = (
                ["DIR"] if name == "data" else list(value) if OPTIONS[name].many else [OPTIONS[name].as_typed(value)]
            )
            words += [flag, *map(str, values)]
    return " ".join(words)


def overrides_of(config: RunConfig) -> dict[str, Any] | None:
    """The fewest overrides with which `make_config` gives a configuration of its dataset; None if none do."""
    root = {} if config.data.root is None else {"data": config.data.root}
    masked = {"masked": True} if config.objective.masked else {}
    transform = config.objective.transform
    # no override of its own says that the side is fixed: naming the side does
    side = (
        {"crop_ratio": transform.ratio} if isinstance(transform, CropResizeConfig) and not transform.ratio_max else {}
    )
    of_recipes = [_overrides_of(config, root | masked | side | {"recipe": recipe}) for recipe in RECIPES]
    return min((overrides for overrides in of_recipes if overrides is not None), key=len, default=None)


def _settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings of a configuration, by the names of the options."""
    settings = {name: value for group in config.settings().values() for name, value in group.items()}
    # `settings` leaves out a clip of None, which people set as 0
    return {"clip": 0} | settings


def _overrides_of(config: RunConfig, given: dict[str, Any]) -> dict[str, Any] | None:
    """Overrides that give a configuration: `given` and others, less any that are not needed. None if there are none."""
    wanted = _settings_of(config)
    # first those on which the defaults of others depend
    order = sorted(wanted.keys() & OPTIONS.keys() - {"dataset"}, key=[*FIRST, *OPTIONS].index)
    chosen = dict(given)
    try:
        for name in order:
            settings = _settings_of(make_config(config.data.dataset, **chosen))
            if name not in chosen and settings.get(name) != wanted[name]:
                chosen[name] = wanted[name]
        if make_config(config.data.dataset, **chosen) != config:
            return None
    except ConfigError:
        return None
    for name in list(chosen):
        fewer = {key: value for key, value in chosen.items() if key != name}
        try:
            if make_config(config.data.dataset, **fewer) == config:
                chosen = fewer
        except ConfigError:
            continue
    return chosen


def _defaults(preset: Preset, given: Mapping[str, Any], *, masked: bool, transform: str, post: bool) -> dict[str, Any]:
    """The settings that depend on the dataset, or on other settings."""
    latent = given.get("latent", POOLED_LATENT if masked else None)
    pooled = latent is not None
    rates = (preset.post_lr, preset.post_pooled_lr) if post else (preset.lr, preset.pooled_lr)
    return {
        "size": preset.size,
        "channels": preset.channels,
        "hidden": preset.hidden,
        "map_channels": preset.pooled_map_channels if pooled else preset.map_channels,
        "latent": latent,
        "hole_ratio": HOLE_RATIO if masked else None,
        "judge_statistics": preset.post_pooled_statistics if pooled and transform == "crop-resize" else "own",
        "crop_ratio": preset.post_crop_ratio if post or pooled else preset.crop_ratio,
        "sigreg_weight": SIGREG_WEIGHT if post or pooled else preset.sigreg_weight,
        "lr": rates[pooled],
    } | ({} if given.keys() & {"steps", "epochs"} else {"steps": preset.steps, "epochs": preset.epochs})


def _check_effects(
    given: Mapping[str, Any], dataset: str, *, masked: bool, transform: str | None, schedule: str
) -> None:
    """Raises ConfigError for an override without effect. `transform` is None for the pixel baseline."""
    # the options without an effect, and the reason
    lacking = dict[str, str]()
    if dataset == "shapes":
        lacking["data"] = "with shapes, which are made on the fly; use `folder` for your own images"
    if dataset != "folder":
        lacking["channels"] = f"with {dataset}, whose images have {PRESETS[dataset].channels}; it is for `folder`"
    if not masked:
        lacking |= dict.fromkeys(("hole_ratio", *MASKED_FIELDS), "without --masked")
    if schedule != "trapezoid":
        lacking["decay"] = f"with --schedule {schedule}"
    if not masked or transform is not None:
        lacking["clean_branch"] = "without --objective pixel --masked"
    if transform is None:
        used = {options_of(ObjectiveConfig)[field].name for field in PIXEL_FIELDS}
        rows = {option.name for option in options_of(ObjectiveConfig).values()} | TRANSFORM_OPTIONS.keys()
        lacking |= dict.fromkeys(rows - used, "with --objective pixel")
    else:
        own = {option.name for option in options_of(TRANSFORMS[transform][0]).values()}
        lacking |= dict.fromkeys(TRANSFORM_OPTIONS.keys() - own, f"with --transform {transform}")
    for name in given:
        if name in lacking:
            raise ConfigError(f"{OPTIONS[name].flag} has no effect {lacking[name]}")


# what `help` shows: the overrides are declared with the fields of the configuration
make_config.__doc__ = (make_config.__doc__ or "") + "".join(
    f"    {option.name}: {option.text}\n    " for option in OPTIONS.values() if option.name != "dataset"
)
setattr(  # noqa: B010 (mypy knows no such attribute of a function)
    make_config,
    "__signature__",
    Signature(
        [
            Parameter("dataset", Parameter.POSITIONAL_OR_KEYWORD, annotation="DatasetName"),
            *(
                Parameter(
                    option.name, Parameter.KEYWORD_ONLY, default=None, annotation=f"{option.kind.__name__} | None"
                )
                for option in OPTIONS.values()
                if option.name != "dataset"
            ),
        ],
        return_annotation="RunConfig",
    ),
)
