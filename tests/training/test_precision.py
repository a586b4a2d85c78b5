"""What a run computes in where nobody says: by the device, and as before where a run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastle.training.loop
from fastle.checkpoint import read_run_config
from fastle.config import ConfigError, RunConfig
from fastle.presets import make_config
from fastle.training.precision import with_precision
from tests.training.runs import CPU, config, go

AUTO = make_config("shapes")


def a_gpu(monkeypatch: pytest.MonkeyPatch, *capability: int) -> torch.device:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda")


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AUTO.train.precision == "auto"
    assert with_precision(AUTO, CPU).train.precision == "fp32"
    assert with_precision(AUTO, a_gpu(monkeypatch, 8, 0)).train.precision == "bf16"
    assert with_precision(AUTO, a_gpu(monkeypatch, 7, 5)).train.precision == "fp32"
    named = make_config("shapes", precision="fp32")
    assert with_precision(named, a_gpu(monkeypatch, 9, 0)) == named


def test_a_run_keeps_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = replace(config(steps=2), train=replace(config(steps=2).train, precision="auto"))
    go(tmp_path, automatic)
    # on a CPU, and so it stays on a GPU
    assert read_run_config(tmp_path).train.precision == "fp32"
    gpu = a_gpu(monkeypatch, 9, 0)
    assert with_precision(automatic, gpu, tmp_path).train.precision == "fp32"
    assert with_precision(automatic, gpu, tmp_path / "other").train.precision == "bf16"


def test_from_python_too_a_line_says_that_nobody_chose_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    automatic, chosen = (config(steps=2, precision=precision) for precision in ("auto", "bf16"))
    assert "bf16" not in go(tmp_path / "new", automatic, progress=False)
    assert "bf16" not in go(tmp_path / "kept", chosen, progress=False)
    assert "computing in bf16, as before" in go(tmp_path / "kept", automatic, progress=False)
    monkeypatch.setattr(fastle.training.loop, "precision_on", lambda device: "bf16")
    assert "computing in bf16, as --precision auto does here" in go(tmp_path / "kept", automatic, progress=False)


def test_configurations_of_before_the_choice_are_fp32() -> None:
    values = AUTO.to_dict()
    del values["train"]["precision"]
    assert RunConfig.from_dict(values).train.precision == "fp32"


def test_a_reach_below_the_rounding_of_bf16_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"--judge-reach 0\.1 is lost in the rounding of bf16: use --precision fp32"
    with pytest.raises(ConfigError, match=message):
        make_config("shapes", judge_reach=0.1, precision="bf16")
    short = make_config("shapes", judge_reach=0.1)
    assert with_precision(short, CPU).train.precision == "fp32"
    # before a run directory is looked at
    with pytest.raises(ConfigError, match=message):
        with_precision(short, a_gpu(monkeypatch, 8, 0))
