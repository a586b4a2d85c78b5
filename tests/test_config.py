"""Configurations: presets, flags over presets, and every value or combination that is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastle.commands.train
import fastle.training.loop
from fastle.checkpoint import read_run_config
from fastle.config import (
    OPTIONS,
    ConfigError,
    CropResizeConfig,
    DetailConfig,
    IdentityConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    RunConfig,
    TransformConfig,
)
from fastle.data import open_images
from fastle.method.model import Autoencoder
from fastle.method.transforms import make_transform
from fastle.presets import make_config
from fastle.training.evaluate import evaluate
from fastle.training.loop import Execution, train


def test_presets_are_the_methods_table() -> None:
    """docs/method.md, section 4: size, widths, latent, learning rate; λ, batch and epochs."""
    table = {
        "cifar10": ((32, 64, 32, None, 1e-4), make_config("cifar10", recipe="post")),
        "celeba": ((128, 128, 32, None, 1e-4), make_config("celeba", recipe="post")),
        "celeba 128": ((128, 128, 128, 128, 1e-3), make_config("celeba", recipe="post", masked=True)),
        "celeba 512": ((128, 128, 128, 512, 1e-3), make_config("celeba", recipe="post", masked=True, latent=512)),
    }
    for name, (expected, config) in table.items():
        model, train = config.model, config.train
        assert (model.size, model.hidden, model.map_channels, model.latent, train.lr) == expected, name
        assert (train.batch_size, train.epochs, config.objective.sigreg_weight, config.objective.slices) == (
            128,
            50,
            0.03,
            256,
        )
    assert make_config("celeba", recipe="post").objective.transform == CropResizeConfig(0.15)
    assert make_config("celeba", masked=True).objective.hole_ratio == 0.35


def test_compression_and_latent_shape() -> None:
    assert make_config("celeba").model.latent_shape == (32, 16, 16)
    assert make_config("cifar10").model.latent_shape == (32, 4, 4)
    assert [make_config("celeba", latent=n).model.compression for n in (None, 128, 512)] == [6, 384, 96]


def test_tuned_recipe_compares_more_and_lets_the_rate_fall() -> None:
    for dataset, masked in (("cifar10", False), ("celeba", True), ("shapes", True)):
        config = make_config(dataset, masked=masked)  # type: ignore[arg-type]
        assert config == make_config(dataset, masked=masked, recipe="tuned")  # type: ignore[arg-type]
        objective, post = config.objective, make_config(dataset, masked=masked, recipe="post")  # type: ignore[arg-type]
        assert (objective.judge_statistics, objective.judge_depth) == ("target", "features")
        assert isinstance(objective.transform, CropResizeConfig) and objective.transform.full_view
        assert config.train.schedule == "trapezoid" and config.model == post.model
        assert (post.objective.branch_statistics, post.objective.masked_weight) == ("own", 1)
        assert (objective.branch_statistics, objective.masked_weight) == (("joint", 3) if masked else ("own", 1))
        assert post.objective.judge_depth == "code" and post.train.schedule == "constant"
    # flags win over a recipe
    config = make_config("cifar10", full_view=False, judge_depth="all", schedule="constant", warmup=0)
    assert config.objective.transform == CropResizeConfig(0.6) and config.objective.judge_depth == "all"
    assert config.train.schedule == "constant" and config.train.warmup == 0
    # the baseline has the recipe's schedule, so that both train alike
    assert make_config("cifar10", objective="pixel").train == make_config("cifar10").train


def test_defaults_are_the_method() -> None:
    objective = make_config("celeba").objective
    assert (objective.name, objective.judge) == ("self-teaching", "step-frozen")
    assert not objective.masked


@pytest.mark.parametrize(
    ("flags", "transform"),
    [
        ({}, CropResizeConfig(0.15, None, 1)),
        ({"crop_ratio": 0.1, "crop_ratio_max": 1.0, "crops": 4}, CropResizeConfig(0.1, 1.0, 4)),
        ({"crop_ratio_max": 0.5}, CropResizeConfig(0.15, 0.5)),
        ({"transform": "pixel-mask"}, MaskConfig("pixel", 0.7)),
        ({"transform": "patch-mask", "mask_ratio": 0.5}, MaskConfig("patch", 0.5)),
        ({"transform": "channel-mask"}, MaskConfig("channel", 0.7)),
        ({"transform": "noise"}, NoiseConfig(0.1)),
        ({"transform": "noise", "noise_std": 0.2}, NoiseConfig(0.2)),
        ({"transform": "identity"}, IdentityConfig()),
        ({"transform": "detail"}, DetailConfig()),
        ({"objective": "pixel"}, None),
    ],
    ids=str,
)
def test_a_transformation_has_its_own_settings(flags: dict[str, Any], transform: TransformConfig | None) -> None:
    for masked in (False, True):
        assert make_config("celeba", recipe="post", masked=masked, **flags).objective.transform == transform


def test_who_normalises_is_the_presets_for_crops_and_a_flags_for_all() -> None:
    def statistics(dataset: Any, **flags: Any) -> str:
        return make_config(
            dataset, recipe="post", data=None if dataset == "shapes" else "photographs", **flags
        ).objective.judge_statistics

    small = {"size": 32}
    assert statistics("cifar10", masked=True) == statistics("folder", latent=64, **small) == "target"
    assert statistics("shapes", masked=True) == "target"
    assert statistics("cifar10") == statistics("folder", **small) == statistics("celeba", masked=True) == "own"
    assert statistics("folder", masked=True) == statistics("shapes") == "own"
    assert statistics("cifar10", masked=True, transform="noise") == "own"
    assert statistics("cifar10", masked=True, judge_statistics="own") == "own"
    assert statistics("celeba", transform="noise", judge_statistics="target") == "target"
    assert statistics("cifar10", masked=True, objective="pixel") == "own"


def test_the_hole_and_the_mask_have_shares_of_their_own() -> None:
    for transform in ("pixel-mask", "patch-mask", "channel-mask"):
        objective = make_config("celeba", masked=True, transform=transform, hole_ratio=0.2, mask_ratio=0.5).objective
        assert objective.hole_ratio == 0.2
        assert isinstance(objective.transform, MaskConfig) and objective.transform.ratio == 0.5
    assert make_config("celeba", masked=True, objective="pixel", hole_ratio=0.5).objective.hole_ratio == 0.5


def test_widths_and_grey_folders() -> None:
    config = make_config("folder", hidden=16, map_channels=8, channels=1)
    assert (config.model.hidden, config.model.map_channels) == (16, 8)
    assert config.model.channels == config.data.channels == 1


def test_small_folders_take_the_cifar_model() -> None:
    assert make_config("folder", size=32).model == make_config("cifar10").model
    assert make_config("folder").model == make_config("celeba").model
    assert make_config("folder", size=64).model.hidden == 128


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"latent": 0}, "--latent must be at least 1, not 0"),
        ({"recipe": "best"}, "--recipe must be one of tuned, post, not best"),
        ({"accumulate": 3}, "--accumulate 3 must divide --batch-size 128 into parts of 2 or more"),
        ({"averages": (0.1, 0.1)}, "--averages 0.1 0.1 names a length twice"),
        ({"averages": (0.1, 0.5)}, "--averages must be above 0 and below 0.28, not 0.5"),
        ({"schedule": "cosine", "decay": 0.2}, "--decay has no effect with --schedule cosine"),
        ({"size": 30}, "--size must be divisible by 8, such as 32, not 30"),
        ({"size": 0}, "--size must be at least 1, not 0"),
        ({"size": (96, 100)}, "--size must be divisible by 8, such as 96, not 96x100"),
        ({"size": (8, 16, 24)}, "--size must be a whole number, or HEIGHTxWIDTH such as 96x128, not 8x16x24"),
        ({"size": (96, 128.0)}, "--size must be a whole number, not 96x128.0"),
        ({"size": "96x128"}, "--size must be a whole number, not 96x128"),
        ({"crop_ratio": 1.5}, "--crop-ratio must be above 0 and at most 1, not 1.5"),
        ({"crop_ratio": 0.0}, "--crop-ratio must"),
        ({"crop_ratio": 0.005}, "less than a pixel"),
        ({"crop_ratio_max": 0.15}, "--crop-ratio-max must be above --crop-ratio 0.15, not 0.15"),
        ({"crop_ratio": 0.3, "crop_ratio_max": 0.2}, "--crop-ratio-max must be above --crop-ratio 0.3"),
        ({"crop_ratio_max": 1.01}, "--crop-ratio-max must be"),
        ({"crop_ratio_max": float("nan")}, "--crop-ratio-max must be"),
        ({"crop_ratio": 0.005, "crop_ratio_max": 1.0}, "less than a pixel"),
        ({"crops": 0}, "--crops must be at least 1, not 0"),
        ({"transform": "noise", "crop_ratio_max": 1.0}, "--crop-ratio-max has no effect with --transform noise"),
        ({"transform": "detail", "crops": 2}, "--crops has no effect with --transform detail"),
        ({"objective": "pixel", "crop_ratio_max": 1.0}, "--crop-ratio-max has no effect with --objective pixel"),
        ({"objective": "pixel", "crops": 2}, "--crops has no effect with --objective pixel"),
        ({"mask_ratio": 0.5}, "--mask-ratio has no effect with --transform crop-resize"),
        ({"transform": "identity", "crop_ratio": 0.5}, "--crop-ratio has no effect with --transform identity"),
        ({"transform": "pixel-mask", "mask_ratio": 1.0}, "--mask-ratio must be above 0 and below 1, not 1.0"),
        ({"hole_ratio": 0.3}, "--hole-ratio has no effect without --masked"),
        ({"masked": True, "mask_ratio": 0.3}, "--mask-ratio has no effect with --transform crop-resize"),
        ({"noise_std": 0.1}, "--noise-std has no effect with --transform crop-resize"),
        ({"objective": "pixel", "mask_ratio": 0.3}, "--mask-ratio has no effect with --objective pixel"),
        ({"objective": "pixel", "slices": 256}, "--slices has no effect with --objective pixel"),
        ({"transform": "crop"}, "--transform must be one of crop-resize, pixel-mask"),
        ({"objective": "pixels"}, "--objective must be one of self-teaching, pixel, not pixels"),
        ({"channels": 1}, "--channels has no effect with celeba, whose images have 3"),
        ({"hidden": 0}, "--hidden must be at least 1"),
        ({"hidden": 16, "map_channels": 24}, "--map-channels 24 must divide 8 times --hidden, which is 128"),
        ({"masked": True, "hole_ratio": 0.0}, "--hole-ratio must be above 0 and below 1, not 0.0"),
        ({"masked": True, "hole_ratio": 1e-6}, "less than a pixel"),
        ({"transform": "noise", "noise_std": 0.0}, "--noise-std must be above 0, not 0.0"),
        ({"objective": "pixel", "judge": "ema"}, "--judge has no effect with --objective pixel"),
        (
            {"objective": "pixel", "judge_statistics": "target"},
            "--judge-statistics has no effect with --objective pixel",
        ),
        ({"judge_statistics": "running"}, "--judge-statistics must be one of own, target, not running"),
        (
            {"objective": "pixel", "clean_branch": True},
            "--clean-branch has no effect without --objective pixel --masked",
        ),
        ({"masked": True, "clean_branch": True}, "--clean-branch has no effect without --objective pixel --masked"),
        ({"consistency_weight": 0.5}, "--consistency-weight has no effect without --masked"),
        ({"masked": True, "masked_weight": 0.0}, "--masked-weight must be above 0, not 0.0"),
        ({"branch_statistics": "joint"}, "--branch-statistics has no effect without --masked"),
        ({"objective": "pixel", "transform": "noise"}, "--transform has no effect with --objective pixel"),
        ({"objective": "pixel", "sigreg_weight": 1.0}, "--sigreg-weight has no effect with --objective pixel"),
        ({"sigreg_weight": -1.0}, "--sigreg-weight must be at least 0, not -1.0"),
        ({"sigreg_weight": float("nan")}, "--sigreg-weight must"),
        ({"slices": 0}, "--slices must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"steps": 5, "epochs": 5}, "either --steps or --epochs"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("inf")}, "--lr must be above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**63}, "--seed must"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_in_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config("celeba", **flags)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shapes_take_no_data() -> None:
    with pytest.raises(ConfigError, match="--data has no effect"):
        make_config("shapes", data="somewhere")


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "celeba"])
def test_only_folders_have_a_choice_of_channels(dataset: Any) -> None:
    with pytest.raises(ConfigError, match=f"--channels has no effect with {dataset}"):
        make_config(dataset, channels=3)
    with pytest.raises(ConfigError, match="--channels must be one of 1, 3, not 2"):
        make_config("folder", channels=2)


def test_python_is_refused_like_the_command_line() -> None:
    with pytest.raises(TypeError, match="no override called momentum"):
        make_config("shapes", momentum=0.9)
    with pytest.raises(ConfigError, match="--slices has no effect with --objective pixel"):
        ObjectiveConfig(name="pixel", slices=8)
    with pytest.raises(ConfigError, match="--transform has no effect with --objective pixel"):
        ObjectiveConfig(name="pixel", transform=DetailConfig())
    with pytest.raises(ConfigError, match="needs a transformation"):
        ObjectiveConfig(name="self-teaching")
    with pytest.raises(ConfigError, match="channels must be at least 1"):
        ModelConfig(size=32, channels=0, hidden=16, map_channels=8, latent=None)


def test_signature_and_help_name_every_option() -> None:
    names = list(inspect.signature(make_config).parameters)
    assert names == list(OPTIONS) and len(names) > 25
    for name, option in OPTIONS.items():
        assert name == "dataset" or f"{name}: {option.text}" in (make_config.__doc__ or "")
    assert OPTIONS["crop_ratio"].text.endswith("above 0 and at most 1 (default: the preset's)")
    assert OPTIONS["slices"].text.endswith("at least 1 (default: 256)")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"masked": True},
        {"objective": "pixel"},
        {"transform": "detail", "judge": "ema"},
        {"crop_ratio_max": 1.0, "crops": 2},
        {"transform": "patch-mask", "masked": True},
        {"transform": "noise"},
        {"transform": "identity"},
    ],
)
def test_json_round_trip(flags: dict[str, Any]) -> None:
    config = make_config("celeba", **flags)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# what fastle 0.1 wrote for these overrides, but for values that were null
BEFORE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"objective": "pixel"}, {"name": "pixel"}),
    ({}, {"transform": "crop-resize", "crop_ratio": 0.3}),
    ({"crop_ratio_max": 0.8, "crops": 2},
     {"transform": "crop-resize", "crop_ratio": 0.3, "crop_ratio_max": 0.8, "crops": 2}),
    ({"transform": "pixel-mask"}, {"transform": "pixel-mask", "mask_ratio": 0.7}),
    ({"transform": "patch-mask", "mask_ratio": 0.5}, {"transform": "patch-mask", "mask_ratio": 0.5}),
    ({"transform": "channel-mask"}, {"transform": "channel-mask", "mask_ratio": 0.7}),
    ({"transform": "noise", "noise_std": 0.2}, {"transform": "noise", "noise_std": 0.2}),
    ({"transform": "identity", "judge": "live"}, {"transform": "identity", "judge": "live"}),
    ({"transform": "detail", "judge": "ema"}, {"transform": "detail", "judge": "ema"}),
    ({"masked": True, "hole_ratio": 0.4},
     {"transform": "crop-resize", "crop_ratio": 0.3, "hole_ratio": 0.4, "judge_statistics": "target"}),
    ({"masked": True, "objective": "pixel"}, {"name": "pixel", "hole_ratio": 0.35}),
]  # fmt: skip
NULLS = dict.fromkeys(
    ("hole_ratio", "judge", "transform", "crop_ratio", "crop_ratio_max", "mask_ratio", "noise_std", "sigreg_weight",
     "slices")
)  # fmt: skip
TEACHING = {"name": "self-teaching", "judge": "step-frozen", "sigreg_weight": 0.03, "slices": 256}


@pytest.mark.parametrize(("flags", "written"), BEFORE, ids=lambda value: "-".join(map(str, value.values())) or "method")
def test_configurations_of_before_load(flags: dict[str, Any], written: dict[str, Any]) -> None:
    config = make_config("shapes", recipe="post", **flags)
    teaching = {} if written.get("name") == "pixel" else TEACHING
    values = json.loads(json.dumps(config.to_dict()))
    values["objective"] = NULLS | {"judge_statistics": "own", "crops": 1} | teaching | written
    assert RunConfig.from_dict(values) == config
    # before there were several crops, and a choice of statistics
    for later in ("crop_ratio_max", "crops", "judge_statistics"):
        if later not in written:
            del values["objective"][later]
    assert RunConfig.from_dict(values) == config


OLD_RUN = Path(__file__).parent / "data_files" / "run-of-0.1"


def test_a_run_of_before_loads_evaluates_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # made by fastle 0.1 at commit e4c385f, which then went on to step 6
    run, device = tmp_path / "run", torch.device("cpu")
    shutil.copytree(OLD_RUN, run)
    config = make_config(
        "shapes", recipe="post", size=16, hidden=4, map_channels=4, masked=True, latent=8, crop_ratio=0.4,
        crop_ratio_max=0.8, crops=2,
        hole_ratio=0.3, batch_size=8, slices=8, steps=4, precision="fp32",
    )  # fmt: skip
    assert read_run_config(run) == config

    images = open_images(config.data, "test")
    model = Autoencoder.from_pretrained(run, device)
    figures = evaluate(model, images, hole_ratio=config.objective.hole_ratio, device=device)
    assert 7 < figures["clean"]["psnr"] < 8.5 and "psnr_inside" in figures["masked"]

    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 8)
    longer = make_config("shapes", recipe="post", **config_flags(config) | {"steps": 6})
    train(longer, run, Execution(device=device), console=Console(quiet=True))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 6
    expected = {"total": 0.7967566, "consistency": 4.619723e-4, "clean": 1.1655607, "sigreg": 0.6877044}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert read_run_config(run) == longer


def config_flags(config: RunConfig) -> dict[str, Any]:
    """The overrides that make this configuration of shapes again."""
    settings = {name: value for values in config.settings().values() for name, value in values.items()}
    del settings["dataset"], settings["channels"]
    return settings | {"masked": config.objective.masked}


@pytest.mark.parametrize("field", ["name", "judge", "transform"])
def test_names_are_checked_in_python_too(field: str) -> None:
    values = make_config("celeba").to_dict()
    values["objective"][field] = "bogus"
    with pytest.raises(ConfigError, match=r"must be one of .*, not bogus"):
        RunConfig.from_dict(values)


def test_whole_numbers_are_numbers() -> None:
    for config in (make_config("celeba", crop_ratio=1), make_config("celeba", transform="noise", noise_std=2)):
        assert config.objective.transform is not None
        make_transform(config.objective.transform)


# what a damaged file or a slip of the hand may hold, by the path of the field
NONSENSE = {
    "float": ("model.hidden", 32.0, "model: --hidden must be a whole number, not 32.0"),
    "true": ("model.hidden", True, "model: --hidden must be a whole number, not True"),
    "true is not 1": ("data.channels", True, "data: --channels must be one of 1, 3, not True"),
    "none": ("model.hidden", None, "model: --hidden must be a whole number, not None"),
    "beyond": ("train.seed", 2**63, "train: --seed must be at least 0 and below 9.223e+18, not 9223372036854775808"),
    "infinite": ("train.lr", float("inf"), "train: --lr must be above 0, not inf"),
    "digits": ("model.latent", int("9" * 30), f"model: --latent must be at most 2,147,483,648, not {'9' * 30}"),
    "layer": ("model.latent", 2**31, "model: a layer of 1.8e+13 weights fits nowhere"),
    "huge": ("train.lr", 1e300, "train: --lr must be at most 1e+30, not 1e+300"),
    "unequal": ("model.size", 136, "the model's size is 136 and the images' is 128: they must be equal"),
    "unequal sides": ("model.size", [8, 136], "the model's size is 8x136 and the images' is 128: they must be equal"),
    "three sides": ("model.size", [8, 8, 8], "model: --size must be a whole number, or HEIGHTxWIDTH such as 96x128"),
    "large": ("data.size", 10**9, "data: --size must be at most 10,000"),
    "nul": ("data.root", "a\0b", "data: --data must be a path"),
    "object": ("train", [1], "not a configuration of this version of fastle: train is [1], not an object"),
    "no name": ("objective.transform", {}, "objective: not a configuration of this version of fastle: transform lacks"),
    "null name": ("objective.transform", {"name": None}, "objective: --transform must be one of"),
    "object in object": ("objective.transform", [1], "objective: --transform must be one of"),
    "list for text": ("objective.judge", ["live"], "objective: --judge must be one of"),
    "long": ("data.root", ["x" * 10**6], "data: --data must be text, not ['xxxx"),
    "many digits": ("model.hidden", 10**5000, "model: --hidden must be at most 2,147,483,648, not a number of thous"),
    "null for a default": ("objective.judge", None, "objective: --judge must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_in_one_short_line_that_names_the_field(name: str) -> None:
    path, value, message = NONSENSE[name]
    values = make_config("celeba").to_dict()
    *sections, field = path.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[field] = value
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_dict(values)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_what_another_run_would_compute_is_a_difference() -> None:
    config = make_config("celeba", data="/a", lr=0.25)
    assert config.differences(make_config("celeba", data="/a", lr=0.25, steps=7)) == []
    assert config.differences(make_config("celeba", data="/b", lr=0.5)) == [
        "data.root /a → /b",
        "train.lr 0.25 → 0.5",
    ]


@pytest.mark.parametrize("damage", ["missing", "unknown", "section", "transform"])
def test_a_configuration_of_another_version_is_an_error(damage: str) -> None:
    values = make_config("celeba").to_dict()
    if damage == "missing":
        del values["model"]["hidden"]
    elif damage == "unknown":
        values["train"]["momentum"] = 0.9
    elif damage == "transform":
        del values["objective"]["transform"]["ratio"]
    else:
        del values["data"]
    with pytest.raises(ConfigError, match="not a configuration of this version"):
        RunConfig.from_dict(values)


def test_clipping_is_the_recipes_and_can_be_turned_off() -> None:
    bounds = [make_config("shapes", **flags).train.clip for flags in ({}, {"recipe": "post"}, {"clip": 0}, {"clip": 2})]
    assert bounds == [1.0, None, None, 2]
