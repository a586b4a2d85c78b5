"""The judge: which encoder compares, and how its features of a view and of a target are compared.

The weights of a judge are E's at this step, as constants ("step-frozen"), E's own with gradients into them ("live"), or
their exponential moving average, as constants ("ema"). It does not update the running statistics.

A judge of depth "code" compares what E's BatchNorm makes of its input. Deeper comparisons add the outputs of E's
shallower stages, each channel with the mean and variance of a batch instead of a BatchNorm, and average the stages'
mean squared errors. Statistics "own", the author's choice, normalise each batch of views by itself; "target" normalises
J(T x̂) by the mean and variance of J(T x). Own statistics remove a common scale from the comparison: a judge that is
nearly linear in contrast then accepts reconstructions with too little contrast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.config import JudgeDepth, JudgeName, JudgeStatistics

from .model import Encoder, Features

EMA_DECAY = 0.999


def make_judge(name: JudgeName, encoder: Encoder) -> Encoder:
    """The judge of an encoder; see the module's docstring.

    The parameters of the step-frozen judge are detached aliases: they share the encoder's memory, so an in-place
    optimizer step refreshes the judge without a copy. Call this after anything that gives the encoder new memory, such
    as moving it to another device or dtype, or `load_state_dict(assign=True)`.
    """
    if name == "live":
        return encoder
    judge = copy.deepcopy(encoder).requires_grad_(False)
    if name == "step-frozen":
        for alias, parameter in zip(judge.parameters(), encoder.parameters(), strict=True):
            alias.data = parameter.data
    return judge


@torch.no_grad()
def update_ema(judge: Encoder, encoder: Encoder, decay: float = EMA_DECAY) -> None:
    """judge ← decay · judge + (1 − decay) · encoder, for the parameters: a judge uses no running statistics."""
    for average, parameter in zip(judge.parameters(), encoder.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


class FrozenFeatures(nn.Module):
    """`judge.features` for torch.compile, with the weights of the encoder that a step-frozen judge has aliases of.

    A graph takes an alias for another tensor, and would bring every weight into the convolutions' form twice.
    """

    def __init__(self, judge: Encoder, depth: JudgeDepth) -> None:
        super().__init__()
        self.judge, self.depth = judge, depth

    def forward(self, batches: Sequence[Tensor]) -> list[Features]:
        return self.judge.features(batches, self.depth)

    def of(self, encoder: Encoder, batches: Sequence[Tensor]) -> list[Features]:
        """The features of batches, the encoder's weights taken for constants."""
        weights = {f"judge.{name}": parameter.detach() for name, parameter in encoder.named_parameters()}
        features: list[Features] = torch.func.functional_call(self, weights, (batches,))
        return features


class Comparison:
    """Compares views with one target, by a judge's features of both.

    Args:
        judge: its BatchNorm normalises codes.
        target: features of J(T x), from `Encoder.features`.
        statistics: whose mean and variance normalise the views; the target is always normalised by its own.
    """

    def __init__(self, judge: Encoder, target: Features, statistics: JudgeStatistics) -> None:
        self._judge, self._target, self._shared = judge, target, statistics == "target"
        self._code = judge.normalize(target[-1])

    def __call__(self, view: Features) -> Tensor:
        """The mean over the stages of mse(J(T x), J(T x̂)), a scalar."""
        like = self._target[-1] if self._shared else None
        errors = [F.mse_loss(self._judge.normalize(view[-1], like), self._code)]
        for ours, wanted in zip(view[:-1], self._target[:-1], strict=True):
            errors.append(self._error(ours.to(self._code.dtype), wanted.to(self._code.dtype)))
        return errors[0] if len(errors) == 1 else torch.stack(errors).mean()

    def _error(self, view: Tensor, target: Tensor) -> Tensor:
        """The mean squared error of one stage's features, (B, C, h, w), normalised channel by channel."""
        eps = self._judge.norm.eps
        if not self._shared:
            ours, wanted = (F.batch_norm(x, None, None, training=True, eps=eps) for x in (view, target))
            return F.mse_loss(ours, wanted)
        variance = torch.var(target, (0, 2, 3), correction=0)
        # the two means cancel, and a channel's scale can wait until its errors are summed
        return ((view - target).square().mean((0, 2, 3)) / (variance + eps)).mean()
