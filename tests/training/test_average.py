"""Averages of the weights: their profile over the run, and what they follow."""

from __future__ import annotations

import math

import pytest
import torch

from fastle.method.model import Autoencoder
from fastle.presets import make_config
from fastle.training.average import WeightAverage, power

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
