"""The judge: who learns, what it follows, what it sees, and what its statistics hide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor

from fastle.config import CropResizeConfig, JudgeDepth, JudgeName, ModelConfig, ObjectiveConfig
from fastle.method.judge import compare, errors_in_two_passes
from fastle.method.model import Autoencoder, Encoder, Features
from fastle.method.objective import SelfTeaching, make_objective
from tests import oracle
from tests.method.test_objective import (
    CASES,
    assert_same,
    build,
    drawn,
    encoder_of,
    images_of,
    judge_of,
    model_gradients,
    oracle_gradients,
    state_of,
    teaching,
)

FROZEN = [
    pytest.param(teaching(judge, "crop-resize", hole), id=f"{judge}-{'masked' if hole else 'plain'}")
    for judge in ("step-frozen", "ema")
    for hole in (None, 0.35)
]


@pytest.mark.parametrize("config", FROZEN)
def test_judge_weights_get_no_gradient(config: ObjectiveConfig) -> None:
    case = CASES["pooled-rgb-16"]
    model = build(case)
    objective = make_objective(model, config)
    images = images_of(case, 1)
    objective(images, drawn(objective, images, 1)).total.backward()
    judges = list(judge_of(objective).parameters())
    assert len(judges) == len(list(model.encoder.parameters()))
    assert all(not p.requires_grad and p.grad is None for p in judges)
    trained = {id(p) for p in objective.parameters()}
    assert trained == {id(p) for p in model.parameters()}, "the judge's weights must not reach the optimizer"


@pytest.mark.parametrize("config", FROZEN)
def test_encoder_learns_through_the_reconstruction(config: ObjectiveConfig) -> None:
    # without SIGReg the judged reconstruction is the only way into the encoder
    config = dataclasses.replace(config, sigreg_weight=0.0)
    case = CASES["spatial-rgb-8x16"]
    model = build(case)
    objective = make_objective(model, config)
    images = images_of(case, 1)
    draws = drawn(objective, images, 1)
    state = state_of(model)
    expected = oracle_gradients(oracle.objective(config, state, encoder_of(state), images, draws), state)
    objective(images, draws).total.backward()
    gradients = model_gradients(model)

    assert_same(gradients, expected, rel=1e-9)
    assert all(float(gradients[f"encoder.{layer}.weight"].abs().max()) > 1e-6 for layer in ("stem", "down.0.reduce"))
    # cut at D's output, nothing is left but the SIGReg of weight 0
    severed_state = state_of(model)
    severed = oracle.objective(config, severed_state, encoder_of(state), images, draws, cut_path=True)
    assert all(not g.any() for g in oracle_gradients(severed, severed_state).values())
    model.zero_grad()
    model.decoder.register_forward_hook(lambda module, inputs, output: output.detach())
    objective(images, draws).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_step_frozen_judge_follows_without_a_copy(optimizer: type[torch.optim.Optimizer]) -> None:
    case = CASES["spatial-grey-16"]
    model = build(case)
    objective = make_objective(model, teaching("step-frozen", "crop-resize"))
    before = [p.detach().clone() for p in model.encoder.parameters()]
    images = images_of(case, 1)
    stepper = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    objective(images, drawn(objective, images, 1)).total.backward()
    stepper.step()
    for judged, own in zip(judge_of(objective).parameters(), model.encoder.parameters(), strict=True):
        assert judged.data_ptr() == own.data_ptr()
        assert torch.equal(judged, own)
    assert any(not torch.equal(p, old) for p, old in zip(model.encoder.parameters(), before, strict=True))
    # a checkpoint loaded into the model is judged by at once, too
    model.load_state_dict({name: torch.rand_like(t.float()).to(t) for name, t in model.state_dict().items()})
    assert all(
        torch.equal(a, b) for a, b in zip(judge_of(objective).parameters(), model.encoder.parameters(), strict=True)
    )


def test_ema_judge_by_hand() -> None:
    model = build(CASES["spatial-rgb-8x16"])
    objective = make_objective(model, teaching("ema", "crop-resize"))
    weight = model.encoder.stem.weight
    first = weight.detach().clone()
    assert torch.equal(judge_of(objective).stem.weight, first)
    assert judge_of(objective).stem.weight.data_ptr() != weight.data_ptr()
    expected = first
    for change in (1.0, -3.0):
        with torch.no_grad():
            weight += change
        objective.update_judge()
        expected = 0.999 * expected + 0.001 * weight.detach()
    torch.testing.assert_close(judge_of(objective).stem.weight, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(expected, first + 0.001 * 0.999 - 0.002, rtol=1e-12, atol=1e-12)


@dataclass
class Judged:
    """What an encoder saw, and its features."""

    encoder: Encoder
    view: Tensor
    features: Features


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Judged]:
    """Everything that encoders saw, in order: the encoder itself too, which is no judge but the live one."""
    calls: list[Judged] = []
    find = Encoder.features

    def recorded(encoder: Encoder, batches: Sequence[Tensor], depth: JudgeDepth = "code") -> list[Features]:
        features = find(encoder, batches, depth)
        calls.extend(Judged(encoder, view, of_view) for view, of_view in zip(batches, features, strict=True))
        return features

    monkeypatch.setattr(Encoder, "features", recorded)
    return calls


def test_masked_row_judges_the_same_boxes_of_all_three(judged: list[Judged]) -> None:
    config = teaching("step-frozen", "crop-resize", 0.35)
    case = CASES["pooled-rgb-16"]
    model = build(case)
    objective = make_objective(model, config)
    images = images_of(case, 3)
    draws = drawn(objective, images, 3)
    objective(images, draws)
    state = oracle.detached(state_of(model))
    assert draws.hole is not None
    clean = oracle.decode(state, oracle.encode(state, images))
    masked = oracle.decode(state, oracle.encode(state, oracle.cut_hole(images, draws.hole, 0.35)))
    for image in (images, clean, masked):
        view = oracle.views(config.transform, image, draws.view)[0]
        assert any(torch.allclose(call.view, view, rtol=1e-9, atol=1e-11) for call in judged)
    for image in (clean, masked):
        assert any(torch.allclose(call.view, image, rtol=1e-9, atol=1e-11) for call in judged)


@pytest.mark.parametrize("depth", ["code", "all"])
@pytest.mark.parametrize("hole", [None, 0.35], ids=["plain", "masked"])
@pytest.mark.parametrize("judge", ["step-frozen", "ema", "live"])
def test_clean_target_carries_no_graph(
    judge: JudgeName, hole: float | None, depth: JudgeDepth, judged: list[Judged]
) -> None:
    case = CASES["spatial-rgb-8x16"]
    objective = make_objective(
        build(case), dataclasses.replace(teaching(judge, "crop-resize", hole), judge_depth=depth)
    )
    images = images_of(case, 2)
    objective(images, drawn(objective, images, 2))
    judged = [call for call in judged if call.encoder is judge_of(objective)]
    targets = [call for call in judged if not call.view.requires_grad]
    assert targets and len(targets) < len(judged)
    assert all(f.requires_grad == (judge == "live") for call in targets for f in call.features)
    assert all(f.requires_grad for call in judged if call.view.requires_grad for f in call.features)


@pytest.mark.parametrize("hole", [None, 0.35], ids=["plain", "masked"])
@pytest.mark.parametrize("judge", ["step-frozen", "ema", "live"])
def test_whole_images_are_judged_once(judge: JudgeName, hole: float | None, judged: list[Judged]) -> None:
    # a judge with the encoder's weights finds in x what the encoder found
    case = CASES["spatial-rgb-8x16"]
    config = teaching(judge, "crop-resize", hole, CropResizeConfig(0.45, full_view=True))
    objective = make_objective(build(case), dataclasses.replace(config, judge_depth="features"))
    images = images_of(case, 2)
    objective(images, drawn(objective, images, 2))
    assert sum(torch.equal(call.view, images) for call in judged) == (2 if judge == "ema" else 1)


def test_own_statistics_hardly_see_contrast_and_the_targets_do() -> None:
    """Why there are both: to a judge as it begins, pooled, images at half their contrast are nearly the same."""
    torch.manual_seed(0)
    encoder = Autoencoder(ModelConfig(size=32, channels=3, hidden=32, map_channels=64, latent=128)).double().encoder
    coarse = torch.rand(64, 3, 5, 5, dtype=torch.float64)
    x = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    mean = x.mean((0, 2, 3), keepdim=True)
    (whole,), (faded,) = encoder.features((x, mean + (x - mean) / 2))
    wanted = encoder.normalize(whole)
    own, target = encoder.normalize(faded), encoder.normalize(faded, statistics_of=whole)
    assert (own - wanted).square().mean().item() < 0.05
    assert (target - wanted).square().mean().item() > 0.2


@pytest.mark.parametrize("depth", get_args(JudgeDepth))
@pytest.mark.parametrize("name", ["pooled-rgb-16", "spatial-rgb-8x16"])
@pytest.mark.parametrize("reach", [1.0, 0.3])
def test_a_graph_compares_in_another_form_to_the_same(reach: float, name: str, depth: JudgeDepth) -> None:
    encoder = build(CASES[name]).encoder
    batches = [images_of(CASES[name], seed) for seed in range(6)]
    batches += [torch.lerp(view, target, reach) for view, target in zip(batches[2:], batches[:2] * 2, strict=True)]
    # the BatchNorm's bias cancels
    learnt = {f"encoder.{key}": parameter for key, parameter in encoder.named_parameters() if key != "norm.bias"}

    def result(graph: bool) -> tuple[Tensor, dict[str, Tensor]]:
        features = encoder.features(batches, depth)
        targets, *branches = features[:2], features[2:4], features[4:6]
        near = None if reach == 1 else (features[6:8], features[8:])
        if graph:
            errors = errors_in_two_passes(encoder, targets, branches, near)
        else:
            errors = torch.stack([torch.stack(row) for row in compare(encoder, targets, branches, "target", near)])
        # each weighs differently, and the targets have gradients too, as with a live judge
        weighted = errors * torch.arange(1, 5, dtype=errors.dtype).view(2, 2)
        gradients = torch.autograd.grad(weighted.sum(), list(learnt.values()))
        return errors.detach(), dict(zip(learnt, gradients, strict=True))

    (ours, our_gradients), (theirs, their_gradients) = result(graph=True), result(graph=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_same(our_gradients, their_gradients, rel=1e-9)


@pytest.mark.parametrize("reach", [1.0, 0.01])
def test_a_short_reach_reconstructs_what_is_uncertain_as_its_mean(reach: float) -> None:
    """Why there is a reach: of two images that are equally likely, the mean is best only to first order."""
    case = CASES["pooled-rgb-16"]
    transform = CropResizeConfig(1.0)  # the whole image
    config = dataclasses.replace(
        teaching("step-frozen", "crop-resize", config=transform), judge_statistics="target", judge_depth="all",
        judge_reach=reach, sigreg_weight=0.0,
    )  # fmt: skip
    model = build(case)
    pair = images_of(case, 0)[:2]
    guess = pair.mean(0).expand_as(pair).clone().requires_grad_()
    # a decoder that answers with the guess for both
    model.decoder.forward = lambda z: guess + 0 * z.sum()  # type: ignore[method-assign]
    objective = SelfTeaching(model, config)
    torch.autograd.backward(objective(pair, drawn(objective, pair, 0)).total)
    assert guess.grad is not None
    pull, of_each = guess.grad.sum(0).norm(), guess.grad.flatten(1).norm(dim=1).sum()
    assert pull < 0.05 * of_each if reach < 1 else pull > 0.5 * of_each
