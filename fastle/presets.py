"""Default settings of each dataset (docs/method.md, section 4), and how overrides change them."""

from __future__ import annotations

from collections.abc import Mapping
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
    TRANSFORM_OPTIONS,
    TRANSFORMS,
    TUNED,
    ConfigError,
    CropResizeConfig,
    DataConfig,
    DatasetName,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
    plain_size,
    sides_of,
    transform_config,
)
from .options import options_of, pick

# Settings by the names of the options, for each dataset in layers. A layer holds where all words of its name do: the
# recipe, "spatial" or "pooled" for the latent, "masked", the transformation, and "stem" where the judge compares the
# features of its stem. A later layer wins over an earlier.
Preset = dict[str, dict[str, Any]]

# with own statistics a pooled judge hardly sees contrast, and training stalls at 32 px (docs/results.md)
_SEES_CONTRAST = {"judge_statistics": "target"}
# in a long training a judge that sees the whole image in place, or crops of one side, or that compares with the image
# itself, makes the decoder draw patterns (docs/results.md#stripes)
_NO_PATTERNS = {
    "crop_ratio": 0.3, "crop_ratio_max": 1.0, "crops": 2, "full_view": False,
    "branch_statistics": "joint", "masked_weight": 3.0, "judge_reach": 0.3,
}  # fmt: skip
# inside the hole they bring it level with the pixel baseline after as many steps (docs/results.md#several-holes)
_SEVERAL_HOLES = {"holes": 4, "sigreg_weight": 0.005}
# of spatial latents; at 128 and 64 px the post's smaller crops and larger λ have 0.4 and 0.7 dB less (docs/results.md)
_SEES_DETAIL = {"crop_ratio": 0.6, "sigreg_weight": 0.003}
_LARGE: Preset = {
    "always": {"size": 128, "channels": 3, "hidden": 128, "epochs": 50, "crop_ratio": 0.15},
    "spatial": {"map_channels": 32},
    "pooled": {"map_channels": 128},
    "tuned": {"lr": 1e-3},
    "tuned spatial crop-resize": _SEES_DETAIL,
    "post spatial": {"lr": 1e-4},
    "post pooled": {"lr": 1e-3},
}
_SMALL: Preset = {
    "always": {"size": 32, "channels": 3, "hidden": 64, "epochs": 50, "crop_ratio": 0.3},
    "spatial": {"map_channels": 32},
    "pooled": {"map_channels": 64},
    "tuned spatial": _SEES_DETAIL | {"blur_views": (3,), "lr": 2e-3},
    "tuned spatial stem": {"blur_views": (1, 3)},
    "tuned pooled": {"lr": 1e-3},
    "tuned masked crop-resize": _NO_PATTERNS | _SEVERAL_HOLES,
    "post pooled": {"lr": 3e-4},  # of docs/results/small.md
    "post pooled crop-resize": _SEES_CONTRAST,
}
PRESETS: dict[str, Preset] = {
    # the method's toy is 28 px, which the model's stride of 8 does not divide
    "shapes": {
        "always": {"size": 32, "channels": 1, "hidden": 32, "steps": 400, "crop_ratio": 0.3, "lr": 1e-3},
        "spatial": {"map_channels": 16},
        "pooled": {"map_channels": 32},
        "post pooled crop-resize": _SEES_CONTRAST,
    },
    "cifar10": _SMALL | {"post spatial": {"lr": 1e-4}},
    # CelebA keeps the author's own statistics with `--recipe post`
    "celeba": _LARGE,
    # folders below FEW_PIXELS px take the CIFAR-10 model; the post's rate reaches 24 dB in 2,000 steps
    "small folder": _SMALL | {"post spatial": {"lr": 1e-3}},
    "folder": _LARGE,
}
FEW_PIXELS = 64
# options on which the defaults of others depend
FIRST = ("size", "objective", "transform", "latent", "judge_depth", "schedule", "steps", "epochs")

# what a recipe sets beside the presets, by the names of the options; docs/results.md measures "tuned" at 32 to 128 px
RECIPES: dict[str, dict[str, Any]] = {
    "tuned": {
        "judge_statistics": "target", "judge_depth": "features", "full_view": True,
        "optimizer": "muon", "schedule": "trapezoid", "warmup": 0.05, "clip": 1.0,
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
    small = dataset == "folder" and min(sides_of(given.get("size", FEW_PIXELS))) < FEW_PIXELS
    pooled = given.get("latent", POOLED_LATENT if masked else None) is not None
    facts = {"always", recipe, "pooled" if pooled else "spatial", transform}
    if masked:
        facts.add("masked")
    if given.get("judge_depth") == "all":
        facts.add("stem")
    defaults: dict[str, Any] = {"dataset": dataset, "precision": "auto"} | RECIPES[recipe]
    defaults |= {"latent": POOLED_LATENT, "hole_ratio": HOLE_RATIO} if masked else {"latent": None}
    for words, settings in PRESETS["small folder" if small else dataset].items():
        if facts >= set(words.split()):
            defaults |= settings
    if given.keys() & {"steps", "epochs"}:
        defaults = {name: value for name, value in defaults.items() if name not in {"steps", "epochs"}}
    if "crop_ratio" in given:
        # a side that somebody asks for is not the least of several
        defaults.pop("crop_ratio_max", None)
    if given.get("judge") == "live" or given.get("judge_statistics") == "own":
        # these have no reach
        defaults.pop("judge_reach", None)
    if pixel or given.get("branch_statistics") == "own":
        # the peer is the post's, with one hole; and the running statistics would be those of holes alone
        for name in _SEVERAL_HOLES:
            defaults.pop(name, None)
    settings = defaults | given
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
            words += [flag, *(["DIR"] if name == "data" else OPTIONS[name].words(value))]
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


def _check_effects(
    given: Mapping[str, Any], dataset: str, *, masked: bool, transform: str | None, schedule: str
) -> None:
    """Raises ConfigError for an override without effect. `transform` is None for the pixel baseline."""
    # the options without an effect, and the reason
    lacking = dict[str, str]()
    if dataset == "shapes":
        lacking["data"] = "with shapes, which are made on the fly; use `folder` for your own images"
    if dataset != "folder":
        lacking["channels"] = (
            f"with {dataset}, whose images have {PRESETS[dataset]['always']['channels']}; it is for `folder`"
        )
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
                Parameter(option.name, Parameter.KEYWORD_ONLY, default=None, annotation=f"{option.annotation} | None")
                for option in OPTIONS.values()
                if option.name != "dataset"
            ),
        ],
        return_annotation="RunConfig",
    ),
)
