"""Configurations: presets, flags over presets, and every value or combination that is refused."""

import json
from typing import Any

import pytest

from fastle.config import ConfigError, ModelConfig, RunConfig
from fastle.method.transforms import make_transform
from fastle.presets import make_config


def test_presets_are_the_methods_table() -> None:
    """method section 4: size, widths, latent, learning rate; λ, batch and epochs."""
    table = {
        "cifar10": ((32, 64, 32, None, 1e-4), make_config("cifar10")),
        "celeba": ((128, 128, 32, None, 1e-4), make_config("celeba")),
        "celeba 128": ((128, 128, 128, 128, 1e-3), make_config("celeba", masked=True)),
        "celeba 512": ((128, 128, 128, 512, 1e-3), make_config("celeba", masked=True, latent=512)),
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
    assert make_config("celeba").objective.crop_ratio == 0.15
    assert make_config("celeba", masked=True).objective.hole_ratio == 0.35


def test_compression_and_latent_shape() -> None:
    assert make_config("celeba").model.latent_shape == (32, 16, 16)
    assert make_config("cifar10").model.latent_shape == (32, 4, 4)
    assert [make_config("celeba", latent=n).model.compression for n in (None, 128, 512)] == [6, 384, 96]


def test_defaults_are_the_method() -> None:
    objective = make_config("celeba").objective
    assert (objective.name, objective.judge, objective.transform) == ("self-teaching", "step-frozen", "crop-resize")
    assert not objective.masked


@pytest.mark.parametrize(
    ("transform", "unit", "value"),
    [("crop-resize", "crop_ratio", 0.15), ("pixel-mask", "mask_ratio", 0.7), ("noise", "noise_std", 0.1)],
)
def test_a_transformation_has_its_own_setting_and_no_other(transform: str, unit: str, value: float) -> None:
    objective = make_config("celeba", transform=transform).objective  # type: ignore[arg-type]
    settings = {name: getattr(objective, name) for name in ("crop_ratio", "mask_ratio", "noise_std")}
    assert settings == {"crop_ratio": None, "mask_ratio": None, "noise_std": None} | {unit: value}


def test_crops_are_one_of_a_fixed_side_until_asked_for() -> None:
    for flags in ({}, {"objective": "pixel"}, {"transform": "noise"}):
        objective = make_config("celeba", **flags).objective  # type: ignore[arg-type]
        assert (objective.crop_ratio_max, objective.crops) == (None, 1)
    objective = make_config("celeba", crop_ratio=0.1, crop_ratio_max=1.0, crops=4, masked=True).objective
    assert (objective.crop_ratio, objective.crop_ratio_max, objective.crops) == (0.1, 1.0, 4)
    assert make_config("celeba", crop_ratio_max=0.5).objective.crop_ratio == 0.15


def test_who_normalises_is_the_presets_for_crops_and_a_flags_for_all() -> None:
    def statistics(dataset: Any, **flags: Any) -> str:
        return make_config(
            dataset, data=None if dataset == "shapes" else "photographs", **flags
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


def test_mask_ratio_is_the_holes_when_masked() -> None:
    objective = make_config("celeba", masked=True, mask_ratio=0.5).objective
    assert objective.hole_ratio == 0.5 and objective.mask_ratio is None
    assert make_config("celeba", masked=True, objective="pixel", mask_ratio=0.5).objective.hole_ratio == 0.5


def test_small_folders_take_the_cifar_model() -> None:
    assert make_config("folder", size=32).model == make_config("cifar10").model
    assert make_config("folder").model == make_config("celeba").model
    assert make_config("folder", size=64).model.hidden == 128


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"latent": 0}, "--latent 0 cannot be"),
        ({"size": 30}, "--size 30 cannot be: it must be divisible by 8, 32 say"),
        ({"size": 0}, "--size 0"),
        ({"crop_ratio": 1.5}, "--crop-ratio 1.5"),
        ({"crop_ratio": 0.0}, "--crop-ratio 0.0"),
        ({"crop_ratio": 0.005}, "less than a pixel"),
        ({"crop_ratio_max": 0.15}, "--crop-ratio-max 0.15 cannot be: it must be above --crop-ratio 0.15 and at most 1"),
        ({"crop_ratio": 0.3, "crop_ratio_max": 0.2}, "--crop-ratio-max 0.2"),
        ({"crop_ratio_max": 1.01}, "--crop-ratio-max 1.01"),
        ({"crop_ratio_max": float("nan")}, "--crop-ratio-max nan"),
        ({"crop_ratio": 0.005, "crop_ratio_max": 1.0}, "less than a pixel"),
        ({"crops": 0}, "--crops 0 cannot be: it must be at least 1"),
        ({"transform": "noise", "crop_ratio_max": 1.0}, "--crop-ratio-max has no effect with --transform noise"),
        ({"transform": "detail", "crops": 2}, "--crops has no effect with --transform detail"),
        ({"objective": "pixel", "crop_ratio_max": 1.0}, "--crop-ratio-max has no effect with --objective pixel"),
        ({"objective": "pixel", "crops": 2}, "--crops has no effect with --objective pixel"),
        ({"mask_ratio": 0.5}, "--mask-ratio has no effect with --transform crop-resize"),
        ({"transform": "identity", "crop_ratio": 0.5}, "--crop-ratio has no effect with --transform identity"),
        ({"transform": "pixel-mask", "mask_ratio": 1.0}, "--mask-ratio 1.0"),
        ({"transform": "pixel-mask", "masked": True}, "--transform pixel-mask cannot be with --masked"),
        ({"masked": True, "mask_ratio": 0.0}, "--mask-ratio 0.0"),
        ({"masked": True, "mask_ratio": 1e-6}, "less than a pixel"),
        ({"transform": "noise", "noise_std": 0.0}, "--noise-std 0.0"),
        ({"objective": "pixel", "judge": "ema"}, "--judge has no effect with --objective pixel"),
        (
            {"objective": "pixel", "judge_statistics": "target"},
            "--judge-statistics has no effect with --objective pixel",
        ),
        ({"judge_statistics": "running"}, "--judge-statistics running"),
        ({"objective": "pixel", "transform": "noise"}, "--transform has no effect with --objective pixel"),
        ({"objective": "pixel", "sigreg_weight": 1.0}, "--sigreg-weight has no effect with --objective pixel"),
        ({"sigreg_weight": -1.0}, "--sigreg-weight -1.0"),
        ({"sigreg_weight": float("nan")}, "--sigreg-weight nan"),
        ({"slices": 0}, "--slices 0"),
        ({"steps": 0}, "--steps 0"),
        ({"steps": 5, "epochs": 5}, "either --steps or --epochs"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": float("inf")}, "--lr inf"),
        ({"seed": -1}, "--seed -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_in_one_line(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config("celeba", **flags)  # type: ignore[arg-type]
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shapes_take_no_data() -> None:
    with pytest.raises(ConfigError, match="--data has no effect"):
        make_config("shapes", data="somewhere")


def test_map_channels_that_the_skip_cannot_average_to() -> None:
    with pytest.raises(ConfigError, match="must divide"):
        ModelConfig(size=32, channels=3, hidden=16, map_channels=24, latent=None)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"masked": True},
        {"objective": "pixel"},
        {"transform": "detail", "judge": "ema"},
        {"crop_ratio_max": 1.0, "crops": 2},
    ],
)
def test_json_round_trip(flags: dict[str, object]) -> None:
    config = make_config("celeba", **flags)  # type: ignore[arg-type]
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("flags", [{}, {"objective": "pixel"}, {"transform": "noise"}])
def test_configurations_from_before_there_were_several_crops_load(flags: dict[str, object]) -> None:
    config = make_config("celeba", **flags)  # type: ignore[arg-type]
    values = json.loads(json.dumps(config.to_dict()))
    del values["objective"]["crop_ratio_max"], values["objective"]["crops"]
    assert RunConfig.from_dict(values) == config


@pytest.mark.parametrize("field", ["name", "judge", "transform"])
def test_names_are_checked_in_python_too(field: str) -> None:
    values = make_config("celeba").to_dict()
    values["objective"][field] = "bogus"
    with pytest.raises(ConfigError, match="bogus cannot be: it must be one of"):
        RunConfig.from_dict(values)


def test_whole_numbers_are_numbers() -> None:
    for config in (make_config("celeba", crop_ratio=1), make_config("celeba", transform="noise", noise_std=2)):
        make_transform(config.objective)


@pytest.mark.parametrize("damage", ["missing", "unknown", "section"])
def test_a_configuration_of_another_version_is_an_error(damage: str) -> None:
    values = make_config("celeba").to_dict()
    if damage == "missing":
        del values["model"]["hidden"]
    elif damage == "unknown":
        values["train"]["momentum"] = 0.9
    else:
        del values["data"]
    with pytest.raises(ConfigError, match="not a configuration of this version"):
        RunConfig.from_dict(values)
