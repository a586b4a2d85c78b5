"""The learning rate of each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastle.presets import make_config
from fastle.training.schedule import rate_share
from fastle.training.trainer import Trainer


def shares(total: int, **settings: Any) -> list[float]:
    config = replace(make_config("shapes", steps=total, recipe="post").train, **settings)
    return [rate_share(config, step, total) for step in range(total)]


def test_constant_stays_after_the_warm_up() -> None:
    assert shares(6, schedule="constant", warmup=0) == [1] * 6
    assert shares(6, schedule="constant", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_trapezoid_falls_to_nothing_in_its_last_part() -> None:
    assert shares(10, schedule="trapezoid", decay=0.4) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert shares(4, schedule="trapezoid", decay=1, warmup=0.5) == pytest.approx([0.5, 0.75, 0.5, 0.25])


def test_cosine_falls_from_the_end_of_the_warm_up() -> None:
    assert shares(6, schedule="cosine", warmup=1 / 3) == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_rate_that_falls_needs_the_length_of_the_run() -> None:
    config = make_config("shapes", steps=5)
    epochs = replace(config, train=replace(config.train, steps=None, epochs=3, schedule="cosine"))
    with pytest.raises(ValueError, match="total_steps"):
        Trainer(epochs, torch.device("cpu"))
    Trainer(epochs, torch.device("cpu"), total_steps=15)
