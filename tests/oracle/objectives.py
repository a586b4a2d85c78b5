"""The objectives, term by term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastle.config import CropResizeConfig, DetailConfig

if TYPE_CHECKING:
    from fastle.config import ObjectiveConfig
    from fastle.method.objective import Draws
    from fastle.method.transforms import Boxes

from .model import State, decode, encode, judge, mse, stage_error, stages
from .sigreg_formulas import sigreg
from .transforms import box_of, fill_rectangle, views

EMA_DECAY = 0.999


@dataclass
class Step:
    """What one evaluation of an objective gives: the loss and its terms by fastle's names."""

    total: Tensor
    terms: dict[str, Tensor]
    latent: Tensor


def detached(state: State) -> State:
    return {name: value.detach() for name, value in state.items()}


def cut_hole(x: Tensor, hole: Boxes, ratio: float) -> Tensor:
    side = round(math.sqrt(ratio) * min(x.shape[2:]))
    return fill_rectangle(x, hole.top, hole.left, *box_of(side, x))


def objective(
    config: ObjectiveConfig, state: State, ema: State | None, images: Tensor, draws: Draws, *, cut_path: bool = False
) -> Step:
    """Any row of docs/method.md, section 1. The running statistics in `state` are updated in place.

    Args:
        state: The model's state dict, its parameters leaves that require a gradient.
        ema: The weights of the EMA judge.
        images: (B, C, H, W) float64 in [0, 1].
        cut_path: Detach the reconstructions before they are judged, which the method does not do.
    """
    x = images
    y = cut_hole(x, draws.hole, config.hole_ratio) if draws.hole is not None and config.hole_ratio else None
    if config.name == "pixel":
        if y is not None and config.clean_branch:
            z, z_masked = encode(state, torch.cat((x, y))).chunk(2)
            loss = (mse(decode(state, z), x) + mse(decode(state, z_masked), x)) / 2
        else:
            z = encode(state, x if y is None else y)
            loss = mse(decode(state, z), x)
        return Step(loss, {"pixel": loss}, z)

    assert draws.slices is not None
    live = config.judge == "live"
    weights = state if live else detached(state) if config.judge == "step-frozen" else detached(ema or {})
    slices = draws.slices.to(x.dtype)

    def reconstruct(z: Tensor) -> Tensor:
        return decode(state, z).detach() if cut_path else decode(state, z)

    def compare(target: Tensor, view: Tensor) -> Tensor:
        like = target if config.judge_statistics == "target" else None
        # the view and what it is compared with, both within r of the reconstruction as it is
        r, here = config.judge_reach, view.detach()
        near, moved = here + r * (target - here), here + r * (view - here)
        if r == 1:
            near, moved = target, view
        representation = judge(weights, near, like)
        errors = [mse(representation if live else representation.detach(), judge(weights, moved, like))]
        if config.judge_depth != "code":
            first = 0 if config.judge_depth == "all" else 1
            triples = zip(*(stages(weights, image)[first:-1] for image in (near, moved, target)), strict=True)
            errors += [stage_error(wanted, ours, None if like is None else true) for wanted, ours, true in triples]
        return torch.stack(errors).mean() / r**2

    def agreement(xhat: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = list(
            zip(views(config.transform, x, draws.view), views(config.transform, xhat, draws.view), strict=True)
        )
        mean = torch.stack([compare(target, view) for target, view in pairs]).mean()
        crops = config.transform
        full = crops.full_view if isinstance(crops, CropResizeConfig) else isinstance(crops, DetailConfig)
        return mean, compare(x, xhat) if full else None

    def combined(mean: Tensor, full: Tensor | None) -> Tensor:
        return mean if full is None else (mean + full) / 2

    if y is None:
        z_clean = encode(state, x)
        xhat_clean = reconstruct(z_clean)
        mean, full = agreement(xhat_clean)
        regularizer = sigreg(z_clean, slices)
        terms = {"agreement": mean, "sigreg": regularizer} | ({} if full is None else {"full_view": full})
        return Step(combined(mean, full) + config.sigreg_weight * regularizer, terms, z_clean)

    if config.branch_statistics == "joint":
        z_clean, z_masked = encode(state, torch.cat((x, y))).chunk(2)
    else:
        z_clean, z_masked = encode(state, x), encode(state, y)
    xhat_clean, xhat_masked = reconstruct(z_clean), reconstruct(z_masked)
    consistency = mse(judge(weights, xhat_clean), judge(weights, xhat_masked))
    clean, masked = combined(*agreement(xhat_clean)), combined(*agreement(xhat_masked))
    regularizer = (sigreg(z_clean, slices) + sigreg(z_masked, slices)) / 2
    weighted = config.consistency_weight * consistency + clean + config.masked_weight * masked
    total = weighted / (config.consistency_weight + 1 + config.masked_weight) + config.sigreg_weight * regularizer
    terms = {"consistency": consistency, "clean": clean, "masked": masked, "sigreg": regularizer}
    return Step(total, terms, z_clean)


def update_ema(ema: State, state: State) -> State:
    """After an optimizer step: 0.999 of the old judge and 0.001 of the encoder."""
    return {name: EMA_DECAY * value + (1 - EMA_DECAY) * state[name].detach() for name, value in ema.items()}
