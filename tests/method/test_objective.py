"""Every row of the method, term by term and gradient by gradient, against the oracle in float64."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import (
    CropResizeConfig,
    DetailConfig,
    IdentityConfig,
    JudgeDepth,
    JudgeName,
    JudgeStatistics,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    TransformConfig,
)
from fastle.method.model import Autoencoder, Encoder
from fastle.method.objective import Draws, Losses, Objective, SelfTeaching, make_objective
from tests import oracle

LR = 0.02
TERMS = {"pixel", "agreement", "full_view", "consistency", "clean", "masked", "sigreg"}


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    batch: int


CASES = {
    "spatial-grey-16": Case(ModelConfig(size=16, channels=1, hidden=3, map_channels=4, latent=None), 3),
    "spatial-rgb-8x16": Case(ModelConfig(size=(8, 16), channels=3, hidden=4, map_channels=2, latent=None), 6),
    "pooled-rgb-16": Case(ModelConfig(size=16, channels=3, hidden=2, map_channels=4, latent=5), 5),
    "pooled-five-8": Case(ModelConfig(size=8, channels=5, hidden=3, map_channels=6, latent=3), 4),
}

TRANSFORMS: dict[str, TransformConfig] = {
    "crop-resize": CropResizeConfig(0.45),
    "pixel-mask": MaskConfig("pixel", 0.7),
    "patch-mask": MaskConfig("patch", 0.5),
    "channel-mask": MaskConfig("channel", 0.4),
    "noise": NoiseConfig(0.2),
    "identity": IdentityConfig(),
    "detail": DetailConfig(),
}


def teaching(
    judge: JudgeName, transform: str, hole_ratio: float | None = None, config: TransformConfig | None = None
) -> ObjectiveConfig:
    """A row with this transformation, as in `TRANSFORMS` or in `config`."""
    return ObjectiveConfig(
        name="self-teaching", judge=judge, transform=config or TRANSFORMS[transform], hole_ratio=hole_ratio,
        sigreg_weight=0.3, slices=7,
    )  # fmt: skip


def rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    yield "row0-pixel", ObjectiveConfig(name="pixel")
    yield "row1-live-identity", teaching("live", "identity")
    yield "row2-live-crop-resize", teaching("live", "crop-resize")
    yield "row3-frozen-crop-resize", teaching("step-frozen", "crop-resize")
    yield "row4-ema-crop-resize", teaching("ema", "crop-resize")
    yield "row5-frozen-detail", teaching("step-frozen", "detail")
    yield "row6-masked-frozen-crop-resize", teaching("step-frozen", "crop-resize", 0.35)
    yield "row7-masked-pixel", ObjectiveConfig(name="pixel", hole_ratio=0.35)
    yield "row7-masked-pixel-clean-branch", ObjectiveConfig(name="pixel", hole_ratio=0.35, clean_branch=True)


def other_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    known = [config for _, config in rows()]
    for judge in get_args(JudgeName):
        for transform in TRANSFORMS:
            for hole, prefix in ((None, ""), (0.35, "masked-")):
                config = teaching(judge, transform, hole)
                if config not in known:
                    yield f"{prefix}{judge}-{transform}", config
    yield from crop_rows()
    yield from target_rows()
    yield from depth_rows()
    yield from joint_rows()
    yield from reach_rows()
    yield from blur_rows()
    yield from holes_rows()


def holes_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Several holes of each image: the baseline, every judge, each statistics of branches, all that is weighted."""
    yield "masked-pixel-two-holes", ObjectiveConfig(name="pixel", hole_ratio=0.35, holes=2)
    yield (
        "masked-pixel-clean-branch-three-holes",
        ObjectiveConfig(name="pixel", hole_ratio=0.35, holes=3, clean_branch=True),
    )
    for judge, joint, full_view in itertools.product(get_args(JudgeName), (False, True), (False, True)):
        config = teaching(judge, "crop-resize", 0.35, CropResizeConfig(0.45, 1.0, 2, full_view))
        name = f"masked-{judge}-{'joint-' if joint else ''}{'full-view-' if full_view else ''}three-holes"
        yield name, dataclasses.replace(
            config, holes=3, branch_statistics="joint" if joint else "own", consistency_weight=0.5, masked_weight=3.0,
            judge_statistics="target", judge_depth="features", judge_reach=1.0 if judge == "live" else 0.3,
        )  # fmt: skip


def crop_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Crop-resize with several crops, and with sides that are drawn."""
    judges: tuple[JudgeName, ...] = ("step-frozen", "live")
    for judge, hole, (ratio_max, crops) in itertools.product(judges, (None, 0.35), ((None, 2), (1.0, 1), (1.0, 2))):
        name = f"{'masked-' if hole else ''}{judge}-{crops}-{'varying' if ratio_max else 'fixed'}-crops"
        yield name, teaching(judge, "crop-resize", hole, CropResizeConfig(0.45, ratio_max, crops))


def blur_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Blurred views beside one crop or two, with the whole image and without, every judge."""
    for judge, hole, full_view in itertools.product(get_args(JudgeName), (None, 0.35), (False, True)):
        transform = CropResizeConfig(0.45, crops=1 + full_view, full_view=full_view, blur_views=(3, 5)[: 2 - full_view])
        name = f"{'masked-' if hole else ''}{judge}{'-full-view' if full_view else ''}-blur-views"
        yield name, dataclasses.replace(
            teaching(judge, "crop-resize", hole, transform), judge_depth="features", judge_statistics="target",
            judge_reach=0.3 if judge == "ema" else 1.0,
        )  # fmt: skip


def target_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Reconstructions normalised as their targets are: both kinds of branches, one view and several, every judge."""
    transforms = ("crop-resize", "detail")
    for judge, transform, hole in itertools.product(get_args(JudgeName), transforms, (None, 0.35)):
        config = teaching(judge, transform, hole)
        name = f"{'masked-' if hole else ''}{judge}-{transform}-target-statistics"
        yield name, dataclasses.replace(config, judge_statistics="target")


def depth_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Judges that compare several stages, of crops and of crops beside the whole image, with both statistics."""
    depths: tuple[JudgeDepth, ...] = ("features", "all")
    variants: tuple[tuple[JudgeStatistics, bool], ...] = (("target", True), ("own", True), ("target", False))
    for judge, hole, depth in itertools.product(get_args(JudgeName), (None, 0.35), depths):
        for statistics, full_view in variants:
            config = teaching(judge, "crop-resize", hole, CropResizeConfig(0.45, full_view=full_view))
            name = f"{'masked-' if hole else ''}{judge}-{depth}-{statistics}{'-full-view' if full_view else ''}"
            yield name, dataclasses.replace(config, judge_depth=depth, judge_statistics=statistics)


def joint_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Both branches' latents normalised together: the code alone, and several stages."""
    for judge, several in itertools.product(get_args(JudgeName), (False, True)):
        config = teaching(judge, "crop-resize", 0.35, CropResizeConfig(0.45, full_view=several))
        config = dataclasses.replace(config, branch_statistics="joint")
        if several:
            config = dataclasses.replace(
                config, judge_depth="features", judge_statistics="target", consistency_weight=0.5, masked_weight=3.0
            )
        yield f"masked-{judge}-{config.judge_depth}-joint-branches", config


def reach_rows() -> Iterator[tuple[str, ObjectiveConfig]]:
    """Targets near the reconstructions: frozen judges, every depth, crops with and without the whole image, detail."""
    judges: tuple[JudgeName, ...] = ("step-frozen", "ema")
    for judge, hole, full_view in itertools.product(judges, (None, 0.35), (False, True)):
        for depth in get_args(JudgeDepth):
            transform = DetailConfig() if full_view and depth == "code" else CropResizeConfig(0.45, 1.0, 2, full_view)
            name = f"{'masked-' if hole else ''}{judge}-{depth}{'-full-view' if full_view else ''}-near"
            yield name, dataclasses.replace(
                teaching(judge, "crop-resize", hole, transform), judge_reach=0.3, judge_statistics="target",
                judge_depth=depth,
            )  # fmt: skip


def parametrise() -> list[object]:
    """The method's rows on every model; every other combination on one model, in turn."""
    parameters = [
        pytest.param(config, case, id=f"{row}-{name}") for row, config in rows() for name, case in CASES.items()
    ]
    names = list(CASES)
    for index, (row, config) in enumerate(other_rows()):
        name = names[index % len(names)]
        parameters.append(pytest.param(config, CASES[name], id=f"{row}-{name}"))
    return list(parameters)


def build(case: Case, dtype: torch.dtype = torch.float64) -> Autoencoder:
    """A model with codes that spread and a BatchNorm not in its initial state, so that nothing about it goes unseen."""
    torch.manual_seed(0)
    model = Autoencoder(case.model).to(dtype).train()
    norm = model.encoder.norm
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.add_(torch.rand_like(tensor))
    return model


def images_of(case: Case, seed: int) -> Tensor:
    shape = (case.batch, case.model.channels, *case.model.sides)
    return torch.rand(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def state_of(model: Autoencoder) -> oracle.State:
    """A copy for the oracle, in float64: parameters as leaves, buffers as they are."""
    parameters = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
    return parameters | {name: b.detach().clone() for name, b in model.named_buffers()}


def encoder_of(state: oracle.State) -> oracle.State:
    return {name: t.detach().clone() for name, t in state.items() if name.startswith("encoder.") and t.requires_grad}


def oracle_gradients(step: oracle.Step, state: oracle.State) -> dict[str, Tensor]:
    names = [name for name, tensor in state.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(step.total, [state[name] for name in names], materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def model_gradients(model: Autoencoder) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients[name] = parameter.grad
    return gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, rel: float) -> None:
    """Each tensor within `rel` of its own greatest value."""
    assert ours.keys() == theirs.keys()
    greatest = max(float(t.abs().max()) for t in theirs.values())
    for name, expected in theirs.items():
        error = float((ours[name].double() - expected).abs().max())
        # a bias in front of the BatchNorm has no gradient but rounding
        bound = rel * (greatest if name == "encoder.pool.bias" else float(expected.abs().max()))
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


def present(losses: Losses) -> dict[str, Tensor]:
    return {name: value for name in TERMS if (value := getattr(losses, name)) is not None}


def drawn(objective: Objective, images: Tensor, seed: int) -> Draws:
    return objective.draw(images.shape, shared=Generator().manual_seed(seed), local=Generator().manual_seed(seed + 1))


def judge_of(objective: Objective) -> Encoder:
    assert isinstance(objective, SelfTeaching) and isinstance(objective.judge, Encoder)
    return objective.judge


@pytest.mark.parametrize(("config", "case"), parametrise())
def test_two_steps_equal_the_oracle(config: ObjectiveConfig, case: Case) -> None:
    model = build(case)
    objective = make_objective(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    state = state_of(model)
    ema = encoder_of(state)

    for seed in (10, 20):
        images = images_of(case, seed)
        draws = drawn(objective, images, seed)
        losses = objective(images, draws)
        step = oracle.objective(config, state, ema, images, draws)

        torch.testing.assert_close(losses.total, step.total, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(losses.latent, step.latent.detach(), rtol=1e-9, atol=1e-10)
        assert present(losses).keys() == step.terms.keys()
        for name, expected in step.terms.items():
            torch.testing.assert_close(getattr(losses, name), expected, rtol=1e-10, atol=1e-13, msg=name)

        optimizer.zero_grad()
        losses.total.backward()
        gradients = oracle_gradients(step, state)
        assert_same(model_gradients(model), gradients, rel=1e-9)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, state[name], rtol=1e-10, atol=1e-11, msg=name)

        optimizer.step()
        objective.update_judge()
        for name, gradient in gradients.items():
            state[name] = (state[name].detach() - LR * gradient).requires_grad_()
        ema = oracle.update_ema(ema, state)

    separate = config.masked and config.name != "pixel" and config.branch_statistics == "own"
    assert int(state["encoder.norm.num_batches_tracked"]) == (2 * (1 + config.holes) if separate else 2)
    if config.judge == "ema":
        judge = {f"encoder.{name}": p.detach() for name, p in judge_of(objective).named_parameters()}
        assert_same(judge, ema, rel=1e-12)


def test_uint8_images_equal_their_float_form() -> None:
    case = CASES["spatial-rgb-8x16"]
    for _, config in rows():
        shape = (case.batch, 3, 8, 8)
        raw = torch.randint(0, 256, shape, generator=Generator().manual_seed(5), dtype=torch.uint8)
        totals = []
        for images in (raw, raw.float() / 255):
            objective = make_objective(build(case, torch.float32), config)
            totals.append(objective(images, drawn(objective, images, 5)).total)
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)


# fp32 rounding through about 20 layers and two BatchNorms: ten times what is observed
FP32_LOSS, FP32_GRADIENT = 1e-5, 2e-4


@pytest.mark.parametrize("name", ["spatial-grey-16", "pooled-rgb-16"])
def test_fp32_is_close_to_the_oracle(name: str) -> None:
    case, config = CASES[name], teaching("step-frozen", "crop-resize", 0.35)
    model = build(case, torch.float32)
    objective = make_objective(model, config)
    state = state_of(model)
    images = images_of(case, 7)
    draws = drawn(objective, images, 7)
    step = oracle.objective(config, state, None, images.float().double(), draws)
    losses = objective(images.float(), draws)
    losses.total.backward()
    for term, expected in (step.terms | {"total": step.total}).items():
        torch.testing.assert_close(getattr(losses, term).double(), expected, rtol=FP32_LOSS, atol=0, msg=term)
    assert_same(model_gradients(model), oracle_gradients(step, state), rel=FP32_GRADIENT)


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("hole", [None, 0.35], ids=["plain", "masked"])
def test_bf16_autocast_is_finite_and_keeps_sigreg_in_fp32(transform: str, hole: float | None) -> None:
    case = CASES["spatial-rgb-8x16"]
    model = build(case, torch.float32)
    objective = make_objective(model, teaching("step-frozen", transform, hole))
    images = images_of(case, 8).float()
    draws = drawn(objective, images, 8)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(images, draws)
    losses.total.backward()
    assert all(t.dtype == torch.float32 and t.isfinite() for t in losses.terms().values())
    assert all(g.isfinite().all() for g in model_gradients(model).values())
    assert losses.latent.dtype == torch.float32 and losses.sigreg is not None
    if hole is None:
        # bf16 inside the statistic would be off by about 1e-2
        expected = oracle.sigreg(losses.latent.double(), draws.slices.double())  # type: ignore[union-attr]
        torch.testing.assert_close(losses.sigreg.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("hole", [None, 0.35], ids=["plain", "masked"])
@pytest.mark.parametrize("ratio_max", [None, 1.0], ids=["fixed", "varying"])
def test_agreement_of_two_crops_is_the_mean_of_each_alone(ratio_max: float | None, hole: float | None) -> None:
    case = CASES["pooled-rgb-16"]
    two, one = (
        teaching("step-frozen", "crop-resize", hole, CropResizeConfig(0.45, ratio_max, crops)) for crops in (2, 1)
    )
    images = images_of(case, 9)
    objective = make_objective(build(case), two)
    draws = drawn(objective, images, 9)
    assert isinstance(draws.view, tuple)
    both = objective(images, draws)
    alone = [make_objective(build(case), one)(images, dataclasses.replace(draws, view=boxes)) for boxes in draws.view]
    for name, value in present(both).items():
        singles = [present(losses)[name] for losses in alone]
        torch.testing.assert_close(value, (singles[0] + singles[1]) / 2, rtol=1e-12, atol=0, msg=name)
        depends = name in ("agreement", "clean", "masked")
        assert torch.equal(*singles) != depends, name


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.skipif(torch.__version__ < "2.11", reason="only training compiles an objective, which needs torch 2.11")
def test_crops_of_drawn_sides_compile_once_to_the_same() -> None:
    case = CASES["spatial-rgb-8x16"]
    config = teaching("step-frozen", "crop-resize", 0.35, CropResizeConfig(0.2, 1.0, 2, full_view=True))
    config = dataclasses.replace(config, judge_statistics="target", judge_reach=0.3, judge_depth="features")
    eager, compiled = (make_objective(build(case), config) for _ in range(2))
    # whether graphs are shared is Dynamo's business, before any code is generated
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    sides = set()
    for seed in range(4):
        images = images_of(case, seed)
        draws = drawn(eager, images, seed)
        assert isinstance(draws.view, tuple)
        sides |= {int(boxes.side) for boxes in draws.view if boxes.side is not None}
        # a graph for each side would be compiled anew in nearly every step
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            ours, theirs = compiled(images, draws), eager(images, draws)
        torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
        for objective, losses in ((compiled, ours), (eager, theirs)):
            objective.zero_grad()
            losses.total.backward()
        assert_same(model_gradients(compiled.model), model_gradients(eager.model), rel=1e-9)
    assert len(sides) > 2


def test_terms_are_total_first_and_detached() -> None:
    case = CASES["spatial-rgb-8x16"]
    objective = make_objective(build(case), teaching("step-frozen", "detail"))
    images = images_of(case, 1)
    terms = objective(images, drawn(objective, images, 1)).terms()
    assert next(iter(terms)) == "total" and set(terms) == {"total", "agreement", "full_view", "sigreg"}
    assert all(not t.requires_grad and t.dim() == 0 for t in terms.values())


def test_slices_come_from_the_shared_generator_and_the_rest_from_the_local_one() -> None:
    case = CASES["pooled-rgb-16"]
    objective = make_objective(build(case), teaching("step-frozen", "crop-resize", 0.35))
    shape = (case.batch, 3, 16, 16)

    def draw(shared: int, local: int) -> Draws:
        return objective.draw(shape, shared=Generator().manual_seed(shared), local=Generator().manual_seed(local))

    def local_part(draws: Draws) -> list[Tensor]:
        assert draws.hole is not None
        return [draws.hole.top, draws.hole.left, draws.view.top, draws.view.left]

    one, same, other_rank, other_slices = draw(1, 2), draw(1, 2), draw(1, 3), draw(4, 2)
    assert one.slices is not None and one.slices.shape == (5, 7)
    torch.testing.assert_close(one.slices.norm(dim=0), torch.ones(7))
    assert torch.equal(one.slices, other_rank.slices) and not torch.equal(one.slices, other_slices.slices)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(local_part(one)), torch.cat(local_part(same)))
    assert torch.equal(torch.cat(local_part(one)), torch.cat(local_part(other_slices)))
    assert not torch.equal(torch.cat(local_part(one)), torch.cat(local_part(other_rank)))
    # a view's box is not its hole's
    assert not torch.equal(one.hole.top, one.view.top)  # type: ignore[union-attr]


def test_every_hole_of_an_image_has_its_own_place() -> None:
    config = dataclasses.replace(teaching("step-frozen", "crop-resize", 0.35), holes=3)
    for row in (config, ObjectiveConfig(name="pixel", hole_ratio=0.35, holes=3)):
        shape, generators = (16, 3, 16, 16), (Generator().manual_seed(seed) for seed in (1, 2))
        hole = (
            make_objective(build(CASES["pooled-rgb-16"]), row)
            .draw(shape, **dict(zip(("shared", "local"), generators, strict=True)))
            .hole
        )
        assert hole is not None
        corners = torch.stack((hole.top, hole.left)).unflatten(1, (3, 16))
        assert all(not torch.equal(corners[:, one], corners[:, other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_draws_hold_only_what_the_row_uses() -> None:
    case = CASES["spatial-rgb-8x16"]
    for name, config in (*rows(), *other_rows()):
        objective = make_objective(build(case), config)
        draws = drawn(objective, images_of(case, 1), 1)
        assert (draws.slices is None) == (config.name == "pixel"), name
        assert (draws.hole is None) == (config.hole_ratio is None), name
        assert (draws.view is None) == (isinstance(config.transform, IdentityConfig | DetailConfig | None)), name
