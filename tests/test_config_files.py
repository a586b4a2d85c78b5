"""Configurations as files and dicts: they are read as written, by earlier versions too, and nonsense is refused."""

from __future__ import annotations

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
    ConfigError,
    RunConfig,
)
from fastle.data import open_images
from fastle.method.model import Autoencoder
from fastle.method.transforms import make_transform
from fastle.presets import make_config
from fastle.training.evaluate import evaluate
from fastle.training.loop import Execution, train


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"masked": True},
        {"objective": "pixel"},
        {"transform": "detail", "judge": "ema"},
        {"crop_ratio_max": 1.0, "crops": 2},
        {"blur_views": (1, 5)},
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
