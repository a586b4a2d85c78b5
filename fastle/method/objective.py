"""The objectives: every row of docs/method.md, section 1, as pure functions of a batch and its draws.

    x   batch              E, D  encoder and decoder        T  transformation, the same draw for every view of a sample
    z   E(x)               x̂     D(z)                       J  the judge (see judge.py), of one or several features

mse(J(a), J(b)) stands for the mean over the judge's features; with a reach below 1 agreement is taken to first order,
by `_to_first_order`. The consistency term has no target: it compares codes, each normalised by the statistics of its
own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fastle.config import JudgeDepth, ObjectiveConfig
from fastle.phases import phase

from .judge import FrozenFeatures, Judge, compare, make_judge, update_ema
from .model import Autoencoder, Encoder, Features, unit_range
from .sigreg import draw_slices, sigreg
from .transforms import Boxes, Shape, Transform, cut_hole, draw_boxes, hole_side, make_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Everything random in one step.

    Attributes:
        slices: (D, M) of SIGReg.
        view: Of the transformation.
        hole: The corners of the input holes, (holes · B,): those of every image's first hole, then of its second.
    """

    slices: Tensor | None = None
    view: Any = None
    hole: Boxes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The loss, its terms before weighting (None where the row has no such term), and the latent, detached.

    Attributes:
        total: What is minimised.
        pixel: mse(x̂, x).
        agreement: mse(J(T x), J(T x̂)), the mean over the transformation's views.
        full_view: mse(J(x), J(x̂)), where the transformation asks for the whole image too.
        consistency: mse(J(x̂_c), J(x̂_m)), the mean over the holes of an image.
        clean, masked: Agreement of x̂_c and of x̂_m with x; the second is the mean over the holes.
        sigreg: Of z; in the masked setting the mean over z_c and every z_m.
        latent: Z (z_c in the masked setting).
    """

    total: Tensor
    latent: Tensor
    pixel: Tensor | None = None
    agreement: Tensor | None = None
    full_view: Tensor | None = None
    consistency: Tensor | None = None
    clean: Tensor | None = None
    masked: Tensor | None = None
    sigreg: Tensor | None = None

    def terms(self) -> dict[str, Tensor]:
        """The scalars that this row has, `total` first, detached."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latent"}
        return {name: value.detach() for name, value in values.items() if value is not None}


class PixelBaseline(nn.Module):
    """Rows 0 and 7: mse(D(E(x)), x), or mse(D(E(y)), x) with y the image with a hole; with both, the mean of the two.

    With several holes of each image there is a y for each, and the loss is the mean over all of these.

    Args:
        model: The autoencoder to train.
        config: A row with name "pixel".
    """

    kept_judge: Encoder | None = None  # it has no judge

    def __init__(self, model: Autoencoder, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def draw(self, shape: Shape, *, shared: Generator, local: Generator) -> Draws:
        """The holes of a batch of `shape`, where there are any; see `SelfTeaching.draw`."""
        return Draws(hole=_draw_hole(self.config, shape, local))

    def forward(self, images: Tensor, draws: Draws) -> Losses:
        """The losses of a batch (B, C, H, W), uint8 or in [0, 1]."""
        x = source = target = unit_range(images)
        if draws.hole is not None:
            with phase("views"):
                target = _copies(x, self.config.holes)
                source = _with_holes(x, draws.hole, self.config)
            if self.config.clean_branch:
                source, target = torch.cat((x, source)), torch.cat((x, target))
        with phase("encode"):
            z = self.model.encoder(source)
        with phase("decode"):
            xhat = self.model.decoder(z)
        loss = F.mse_loss(xhat, target)
        return Losses(total=loss, pixel=loss, latent=z[: len(images)].detach())

    def update_judge(self) -> None:
        """Does nothing: the baseline has no judge."""


class SelfTeaching(nn.Module):
    """Rows 1 to 6: agreement of the judge's features, and SIGReg on the latent.

    Args:
        model: The autoencoder to train, already on its device: the step-frozen judge shares its encoder's memory.
        config: A row with name "self-teaching".
        judge: From `fastle.frozen`, on the model's device, in place of the configuration's.
        transform: In place of the configuration's.

    Attributes:
        judge: What judges. Not a submodule: its weights are the encoder's own, the EMA kept beside them, or fixed.

    Raises:
        ValueError: The configuration is the pixel baseline's, or names a judge or a transformation of the caller's own
            that is not given.
    """

    def __init__(
        self,
        model: Autoencoder,
        config: ObjectiveConfig,
        *,
        judge: Judge | None = None,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        if config.transform is None:
            raise ValueError(f"the pixel baseline has no transformation: {config} is PixelBaseline's")
        self.model, self.config = model, config
        self.transform = make_transform(config.transform) if transform is None else transform
        # in tuples, so that nn.Module does not register the judge
        self._judge: tuple[Judge] = (make_judge(config.judge, model.encoder) if judge is None else judge,)
        self._is_live, self._is_ema = (judge is None and config.judge == name for name in ("live", "ema"))
        # the judge's features of the images are then the encoder's, unlike an average's or another network's
        self._has_encoder_weights = judge is None and not self._is_ema
        self._encoder_depth: JudgeDepth = (
            config.judge_depth if self._has_encoder_weights and self.transform.full_view else "code"
        )
        self._frozen: tuple[FrozenFeatures, ...] = ()
        if isinstance(self.judge, Encoder) and self._has_encoder_weights and not self._is_live:
            self._frozen = (FrozenFeatures(self.judge, config.judge_depth),)

    @property
    def judge(self) -> Judge:
        return self._judge[0]

    @property
    def kept_judge(self) -> Encoder | None:
        """The judge if it has weights of its own that training changes, and that a checkpoint must hold: the EMA."""
        return self.judge if isinstance(self.judge, Encoder) and self._is_ema else None

    def draw(self, shape: Shape, *, shared: Generator, local: Generator) -> Draws:
        """Everything random for a batch of `shape`.

        Args:
            shape: (B, C, H, W).
            shared: A generator in the same state on every rank (the slices).
            local: This rank's own (boxes, masks, noise, holes).
        """
        return Draws(
            slices=draw_slices(self.model.config.latent_shape[0], self.config.slices, shared),
            view=self.transform.draw(shape, local),
            hole=_draw_hole(self.config, shape, local),
        )

    def forward(self, images: Tensor, draws: Draws) -> Losses:
        """The losses of a batch (B, C, H, W), uint8 or in [0, 1]."""
        x = unit_range(images)
        if draws.hole is None:
            return self._plain(x, draws)
        with phase("views"):
            holed = _with_holes(x, draws.hole, self.config).chunk(self.config.holes)
        return self._masked(x, holed, draws)

    def update_judge(self) -> None:
        """Moves the EMA judge after the optimizer's step; the other judges share the encoder's memory."""
        if self.kept_judge is not None:
            update_ema(self.kept_judge, self.model.encoder)

    def _plain(self, x: Tensor, draws: Draws) -> Losses:
        """agreement + λ·SIGReg(z); with a full view (agreement + full view) / 2 + λ·SIGReg(z)."""
        with phase("encode"):
            (encoded,) = self.model.encoder.features((x,), self._encoder_depth)
            z = self.model.encoder.latent(encoded[-1])
        with phase("decode"):
            xhat = self.model.decoder(z)
        with phase("views"):
            targets, views = self.transform.views((x, xhat), draws.view)
        branch = (*views, xhat) if self.transform.full_view else views
        wanted, near, seen = self._judged(targets, [branch], x, encoded)
        ((agreement, full_view),) = self._agreements(wanted, near, seen)
        regularizer = self._sigreg(draws, z)
        total = _with_full_view(agreement, full_view) + self.config.sigreg_weight * regularizer
        return Losses(total=total, agreement=agreement, full_view=full_view, sigreg=regularizer, latent=z.detach())

    def _masked(self, x: Tensor, holed: Sequence[Tensor], draws: Draws) -> Losses:
        """The weighted mean of consistency, clean and masked, and λ times the mean of SIGReg over all branches.

        Consistency and masked are means over the holes of each image.

        Args:
            holed: For each of these holes the images with it, a batch like x.
        """
        with phase("encode"):
            encoded = self.model.encoder.features((x, *holed), self._encoder_depth)
            z = self._latents(*(features[-1] for features in encoded))
        with phase("decode"):
            xhats = self.model.decoder(z).chunk(len(encoded))
        with phase("views"):
            targets, *crops = self.transform.views((x, *xhats), draws.view)
        # consistency compares the whole reconstructions, whether or not the images are compared as a whole
        branches = [(*views, xhat) for views, xhat in zip(crops, xhats, strict=True)]
        wanted, near, seen = self._judged(targets, branches, x, encoded[0])
        with phase("judge"):
            code, *others = (self.judge.normalize(whole[-1]) for *_, whole in seen)
            consistency = _mean([F.mse_loss(code, other) for other in others])
        compared = [views[: len(wanted)] for views in seen]
        clean, *of_holes = (_with_full_view(*terms) for terms in self._agreements(wanted, near, compared))
        masked = _mean(of_holes)
        regularizer = self._sigreg(draws, z, branches=len(xhats))
        weights = self.config.consistency_weight, self.config.masked_weight
        agreement = (weights[0] * consistency + clean + weights[1] * masked) / (weights[0] + 1 + weights[1])
        total = agreement + self.config.sigreg_weight * regularizer
        return Losses(
            total=total,
            consistency=consistency,
            clean=clean,
            masked=masked,
            sigreg=regularizer,
            latent=z[: len(x)].detach(),
        )

    def _latents(self, *codes: Tensor) -> Tensor:
        """The latents of all branches, one after the other, which BatchNorm normalises one by one or together."""
        latent = self.model.encoder.latent
        if self.config.branch_statistics == "own":
            return torch.cat([latent(code) for code in codes])
        return latent(torch.cat(codes))

    def _judged(
        self, targets: Sequence[Tensor], branches: Sequence[Sequence[Tensor]], x: Tensor, encoded: Features
    ) -> tuple[list[Features], list[list[Features]] | None, list[list[Features]]]:
        """The judge's features of the targets, of the points near each branch's views, and of each branch's views.

        All but the views' are constants, unless the judge is live. Nothing is near the views with a reach of 1.

        Args:
            targets: T's views of x, to which x is added where T asks for a full view.
            branches: For each branch the views of its reconstructions, in the order of the targets. Views without a
                target may follow.
            x: The images.
            encoded: The encoder's features of x, of its own depth.
        """
        judge, depth, live = self.judge, self.config.judge_depth, self._is_live
        views = [view for branch in branches for view in branch]
        near = self._near((*targets, x) if self.transform.full_view else targets, branches)
        full: list[Features] = []
        if self.transform.full_view and not self._has_encoder_weights:
            targets = (*targets, x)
        elif self.transform.full_view:
            # the judge's weights are the encoder's, and so are its features of the same images
            full = [encoded if live else tuple(feature.detach() for feature in encoded)]
        with phase("judge"):
            if live:
                both = judge.features((*targets, *views), depth)
                constants, seen = both[: len(targets)], both[len(targets) :]
            else:
                # the views first: if the targets had used a bias before them, torch.compile would keep its sums with
                # the views' maps for the backward pass, as further maps
                seen = self._features(views)
                with torch.no_grad():
                    constants = self._features((*targets, *near))
        wanted, points = [*constants[: len(targets)], *full], constants[len(targets) :]
        return wanted, _grouped(points, len(wanted)) or None, _grouped(seen, len(branches[0]))

    def _near(self, targets: Sequence[Tensor], branches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Points on the way from each branch's views to their targets; none with a reach of 1."""
        reach = self.config.judge_reach
        if reach == 1:
            return []
        with phase("views"), torch.no_grad():
            return [
                torch.lerp(view, target, reach)
                for views in branches
                for view, target in zip(views, targets, strict=False)
            ]

    def _features(self, batches: Sequence[Tensor]) -> list[Features]:
        """The judge's features of batches."""
        if self._frozen and torch.compiler.is_compiling():
            return self._frozen[0].of(self.model.encoder, batches)
        return self.judge.features(batches, self.config.judge_depth)

    def _agreements(
        self,
        wanted: Sequence[Features],
        near: Sequence[Sequence[Features]] | None,
        seen: Sequence[Sequence[Features]],
    ) -> list[tuple[Tensor, Tensor | None]]:
        """For each branch mse(J(T x), J(T x̂)), the mean over T's views, and mse(J(x), J(x̂)) where T asks for it.

        Args:
            wanted: Features of the targets, the full view last.
            near: For each branch those that stand for the targets', in that order.
            seen: Features of each branch's views, in that order.
        """
        with phase("judge"):
            branches: list[tuple[Tensor, Tensor | None]] = []
            for compared in compare(self.judge, wanted, seen, self.config.judge_statistics, near):
                errors = [_to_first_order(error, self.config.judge_reach) for error in compared]
                full_view = errors.pop() if self.transform.full_view else None
                branches.append((torch.stack(errors).mean(), full_view))
        return branches

    def _sigreg(self, draws: Draws, z: Tensor, branches: int = 1) -> Tensor:
        """The mean of SIGReg over the branches' latents, which lie one after the other in `z`."""
        assert draws.slices is not None
        with phase("SIGReg"):
            samples = z.unflatten(0, (branches, -1))
            if z.ndim == 4:
                # a spatial latent is tested position by position: (branches, B, c, h, w) → (branches, h·w, B, c)
                samples = samples.flatten(3).permute(0, 3, 1, 2)
            return sigreg(samples, draws.slices)


Objective = PixelBaseline | SelfTeaching


def make_objective(
    model: Autoencoder, config: ObjectiveConfig, *, judge: Judge | None = None, transform: Transform | None = None
) -> Objective:
    """The objective that `config` describes, around a model that is already on its device; see `SelfTeaching`."""
    if config.name == "pixel":
        return PixelBaseline(model, config)
    return SelfTeaching(model, config, judge=judge, transform=transform)


def _draw_hole(config: ObjectiveConfig, shape: Shape, generator: Generator) -> Boxes | None:
    """The corners of all first holes of the images, then those of all second holes, and so on; None without holes."""
    if config.hole_ratio is None:
        return None
    shape = (config.holes * shape[0], *shape[1:])
    return draw_boxes(shape, hole_side(config.hole_ratio, shape), generator)


def _with_holes(x: Tensor, hole: Boxes, config: ObjectiveConfig) -> Tensor:
    """(holes · B, C, H, W): all images with their first hole, then all with their second, and so on."""
    assert config.hole_ratio is not None
    return cut_hole(_copies(x, config.holes), hole, config.hole_ratio)


def _copies(x: Tensor, count: int) -> Tensor:
    """(count · B, C, H, W) in the memory format of x: the batch again and again."""
    return x if count == 1 else torch.cat([x] * count)


def _grouped(features: Sequence[Features], size: int) -> list[list[Features]]:
    """The features in groups of `size`, in their order."""
    return [list(features[i : i + size]) for i in range(0, len(features), size)]


def _mean(terms: Sequence[Tensor]) -> Tensor:
    """The mean of scalars."""
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).mean()


def _with_full_view(agreement: Tensor, full_view: Tensor | None) -> Tensor:
    return agreement if full_view is None else (agreement + full_view) / 2


def _to_first_order(error: Tensor, reach: float) -> Tensor:
    """mse(J(v), J(n)) / r² for n = v + r · (t - v): to first order the mean square of J's derivative times t - v.

    J(n) is a constant, so the gradient at v lacks a factor 1 / r, and the value a factor 1 / r².
    """
    if reach == 1:
        return error
    gradient = error / reach
    return gradient + (error / reach**2 - gradient).detach()
