"""The plain step computes what fastle's step computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.config import RunConfig
from fastle.method.model import Autoencoder
from fastle.method.objective import SelfTeaching
from fastle.presets import make_config
from fastle.training.plain_step import PlainAutoencoder, PlainObjective, PlainStep, StartingPoint
from fastle.training.trainer import Trainer

CPU = torch.device("cpu")


def tiny(masked: bool = True, latent: int | None = 6, size: Any = 16, batch_size: int = 4, **flags: Any) -> RunConfig:
    flags = {"recipe": "post", "steps": 3, "judge_statistics": "own"} | flags  # as CelebA's
    config = make_config(
        "cifar10", masked=masked, latent=latent, size=size, slices=8, crop_ratio=0.4, batch_size=batch_size, **flags
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=8, map_channels=8))


CONFIGS = {
    "celeba-masked": tiny(),
    "celeba-spatial": tiny(masked=False, latent=None, size=(24, 16)),
    "cifar10": tiny(masked=False, latent=None),
    "pooled": tiny(masked=False),
    "target-statistics": tiny(judge_statistics="target", size=(16, 24)),
    # a rate that rises: steps of a wrong one would show
    "tuned": tiny(recipe="tuned", judge_statistics="target", warmup=0.9),
    "tuned-spatial": tiny(False, None, recipe="tuned", judge_statistics="target"),
    "sides": tiny(recipe="tuned", size=(24, 16), crop_ratio_max=0.9, crops=2),
    "own-all": tiny(judge_depth="all", full_view=True),
    "near": tiny(recipe="tuned", judge_statistics="target", judge_reach=0.3, full_view=True),
    "blurred": tiny(False, None, judge_statistics="target", blur_views=(3, 5), crops=2, size=(24, 16)),
    "holes": tiny(recipe="tuned", judge_statistics="target", judge_reach=0.3, holes=3),
    "holes-own-branches": tiny(holes=2),
    "near-spatial": tiny(False, None, judge_reach=0.3, judge_depth="all", judge_statistics="target"),
    "clipped": tiny(clip=0.3, lr=0.01),
}


def a_start(config: RunConfig) -> tuple[StartingPoint, Tensor]:
    size = (config.train.batch_size, config.model.channels, *config.model.sides)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return StartingPoint(config, CPU), images


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_objective_is_fastles(name: str) -> None:
    config = CONFIGS[name]
    start, images = a_start(config)
    draws = start.draw(images, 3)
    assert draws.slices is not None
    draws, x = dataclasses.replace(draws, slices=draws.slices.double()), images.double() / 255
    ours, plain = Autoencoder(config.model), PlainAutoencoder(config.model)
    for model in (ours, plain):
        model.load_state_dict(start.weights)
        model.double().train()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    wanted = SelfTeaching(ours, config.objective)(x, draws).total
    got = PlainObjective(plain, config.objective)(x, draws)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(wanted, list(ours.parameters()))
    gradients = torch.autograd.grad(got, list(plain.parameters()))
    largest = max(float(g.norm()) for g in expected)
    for (parameter, _), mine, theirs in zip(plain.named_parameters(), gradients, expected, strict=True):
        # a bias in front of a BatchNorm has no gradient but rounding
        assert float((mine - theirs).norm()) < 1e-11 * max(float(theirs.norm()), 1e-2 * largest), parameter
    # running statistics too
    torch.testing.assert_close(dict(plain.named_buffers()), dict(ours.named_buffers()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["celeba-masked", "tuned", "sides", "clipped"])
def test_plain_steps_go_the_way_of_fastles(name: str) -> None:
    start, images = a_start(CONFIGS[name])
    plain = PlainStep(start)
    ours = Trainer(start.config, CPU)
    for _ in range(3):
        torch.testing.assert_close(plain(images), ours(images).total.detach(), rtol=1e-5, atol=0)
    encoder, judge = plain.model.encoder.state_dict(), plain.objective.judge.state_dict()
    for name, weight in judge.items():
        assert torch.equal(weight, encoder[name])
    # a copy, not an alias
    assert judge["stem.weight"].data_ptr() != encoder["stem.weight"].data_ptr()
    assert not any(weight.requires_grad for weight in plain.objective.judge.parameters())
    assert all(torch.isfinite(weight).all() for weight in start.weights.values())


def test_plain_step_refuses_other_objectives() -> None:
    config = make_config("cifar10", judge="ema")
    with pytest.raises(ValueError, match="step-frozen judge and crop-resize"):
        PlainObjective(PlainAutoencoder(config.model), config.objective)
