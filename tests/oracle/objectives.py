"""The objectives, term by term."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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


def cut_holes(config: ObjectiveConfig, x: Tensor, hole: Boxes | None) -> list[Tensor]:
    """The images with their first hole, those with their second, ...; nothing without holes."""
    if hole is None or config.hole_ratio is None:
        return []
    corners = zip(hole.top.chunk(config.holes), hole.left.chunk(config.holes), strict=True)
    return [cut_hole(x, replace(hole, top=top, left=left), config.hole_ratio) for top, left in corners]


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


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
    holed = cut_holes(config, x, draws.hole)
    if config.name == "pixel":
        shown = [x, *holed] if config.clean_branch else holed or [x]
        latents = list(encode(state, torch.cat(shown)).chunk(len(shown)))
        loss = mean([mse(decode(state, z), x) for z in latents])
        return Step(loss, {"pixel": loss}, latents[0])

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
        crops_error = mean([compare(target, view) for target, view in pairs])
        crops = config.transform
        full = crops.full_view if isinstance(crops, CropResizeConfig) else isinstance(crops, DetailConfig)
        return crops_error, compare(x, xhat) if full else None

    def combined(crops: Tensor, full: Tensor | None) -> Tensor:
        return crops if full is None else (crops + full) / 2

    if not holed:
        z_clean = encode(state, x)
        xhat_clean = reconstruct(z_clean)
        crops, full = agreement(xhat_clean)
        regularizer = sigreg(z_clean, slices)
        terms = {"agreement": crops, "sigreg": regularizer} | ({} if full is None else {"full_view": full})
        return Step(combined(crops, full) + config.sigreg_weight * regularizer, terms, z_clean)

    if config.branch_statistics == "joint":
        latents = list(encode(state, torch.cat((x, *holed))).chunk(1 + len(holed)))
    else:
        latents = [encode(state, branch) for branch in (x, *holed)]
    xhat_clean, *xhats = (reconstruct(z) for z in latents)
    consistency = mean([mse(judge(weights, xhat_clean), judge(weights, xhat)) for xhat in xhats])
    clean, masked = combined(*agreement(xhat_clean)), mean([combined(*agreement(xhat)) for xhat in xhats])
    regularizer = mean([sigreg(z, slices) for z in latents])
    weighted = config.consistency_weight * consistency + clean + config.masked_weight * masked
    total = weighted / (config.consistency_weight + 1 + config.masked_weight) + config.sigreg_weight * regularizer
    terms = {"consistency": consistency, "clean": clean, "masked": masked, "sigreg": regularizer}
    return Step(total, terms, latents[0])


def update_ema(ema: State, state: State) -> State:
    """After an optimizer step: 0.999 of the old judge and 0.001 of the encoder."""
    return {name: EMA_DECAY * value + (1 - EMA_DECAY) * state[name].detach() for name, value in ema.items()}
