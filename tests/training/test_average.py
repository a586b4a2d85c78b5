"""Averages of the weights: their profile over the run, what they follow, and where they are saved."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from fastle.method.model import Autoencoder
from fastle.presets import make_config
from fastle.training.average import WeightAverage, power
from fastle.training.run import RunDirectory
from fastle.training.trainer import Trainer
from tests.method.test_pretrained import equal, refusal
from tests.training.runs import CPU, config

STEPS = 4000


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_profile_has_the_length_asked_for(length: float) -> None:
    model = Autoencoder(make_config("shapes", hidden=2, map_channels=2).model)
    average = WeightAverage(model, length)
    first, second = (model.get_parameter(name) for name in ("encoder.stem.bias", "decoder.head.bias"))
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            # the average of t and of t² gives the mean and the deviation of the profile
            first.fill_(step / STEPS)
            second.fill_((step / STEPS) ** 2)
        average.prepare(step)
        average.update(model)
    averaged = average.model.state_dict()
    mean, square = (float(averaged[name][0]) for name in ("encoder.stem.bias", "decoder.head.bias"))
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=5e-3)
    # the peak of the profile is at its end
    gamma = power(length)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_first_step_and_buffers() -> None:
    model = Autoencoder(make_config("shapes", hidden=2, map_channels=2).model)
    average = WeightAverage(model, 0.1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    average.prepare(1)
    average.update(model)
    for name, value in average.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert average.name == "ema-100"


def test_a_checkpoint_of_a_run_and_its_averages(tmp_path: Path) -> None:
    trainer = Trainer(config(averages=(0.05,)), CPU)
    run = RunDirectory(tmp_path / "run")
    run.open(trainer.config)
    run.begin(trainer)
    for step in (1, 2):
        trainer(torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8))
        trainer.done = step
        run.save(trainer)
        if step == 1:
            first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert torch.equal(Autoencoder.from_pretrained(older).encoder.stem.weight, first["encoder.stem.weight"])
    assert equal(Autoencoder.from_pretrained(newest), Autoencoder.from_pretrained(tmp_path / "run"))
    average = Autoencoder.from_pretrained(newest, weights="ema-050")
    assert equal(average, trainer.averages[0].model) and not equal(average, trainer.model)
    # by itself a checkpoint knows what it is of
    assert equal(Autoencoder.from_pretrained(shutil.copy(newest, tmp_path)), trainer.model)
    assert "holds no ema-100" in refusal(newest, weights="ema-100")
