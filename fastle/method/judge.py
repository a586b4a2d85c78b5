"""The judge: which encoder compares, and how its features of a view and of a target are compared.

The weights of a judge are E's at this step, as constants ("step-frozen"), E's own with gradients into them ("live"), or
their exponential moving average, as constants ("ema"). It does not update the running statistics.

A judge of depth "code" compares what E's BatchNorm makes of the code. Deeper comparisons add the features before it,
which are the outputs of E's shallower stages. Each of their channels is normalised by the mean and variance of a batch
instead of a BatchNorm, and the mean squared errors of all features are averaged.

Statistics "own", the author's choice, normalise each batch of views by itself; "target" normalises J(T x̂) by the mean
and variance of J(T x). Own statistics remove a common scale from the comparison: a judge that is nearly linear in
contrast then accepts reconstructions with too little contrast.

With a reach r below 1 a reconstruction is not compared with its image but with a point near itself, r of the way to the
image. To first order in r, J is then a linear map about each reconstruction, and the mean of all images that are
possible is a best guess. It is not the one whose J comes nearest to the mean of their J: texture or contrast that
nobody can know comes nearer.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.config import JudgeDepth, JudgeName, JudgeStatistics, OwnConfig

from .model import Encoder, Features, normalize_channels, unit_range

EMA_DECAY = 0.999


def make_judge(name: JudgeName | OwnConfig, encoder: Encoder) -> Encoder:
    """The judge of an encoder; see the module's docstring.

    The parameters of the step-frozen judge are detached aliases: they share the encoder's memory, so an in-place
    optimizer step refreshes the judge without a copy. Call this after anything that gives the encoder new memory, such
    as moving it to another device or dtype, or `load_state_dict(assign=True)`.

    Raises:
        ValueError: It is the name of a judge that only the caller can make.
    """
    match name:
        case "live":
            return encoder
        case "ema":
            return copy.deepcopy(encoder).requires_grad_(False)
        case "step-frozen":
            judge = copy.deepcopy(encoder).requires_grad_(False)
            for alias, parameter in zip(judge.parameters(), encoder.parameters(), strict=True):
                alias.data = parameter.data
            return judge
        case OwnConfig():
            raise ValueError(f"the judge {name} is the caller's own: give it as judge=")


@torch.no_grad()
def update_ema(judge: Encoder, encoder: Encoder) -> None:
    """Moves the EMA judge's parameters towards the encoder's by 1 − `EMA_DECAY`; no judge uses running statistics."""
    for weight, followed in zip(judge.parameters(), encoder.parameters(), strict=True):
        weight.lerp_(followed, 1 - EMA_DECAY)


class FrozenFeatures(nn.Module):
    """`judge.features` for torch.compile, with the weights of the encoder that a step-frozen judge has aliases of.

    A graph sees an alias as another tensor, and would convert every weight to the convolutions' layout twice.
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


class FrozenJudge(nn.Module):
    """A network that never changes, as the judge; see `frozen`."""

    eps: float = 1e-5

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def features(self, batches: Sequence[Tensor], depth: JudgeDepth = "code") -> list[Features]:
        """All that the network returns of several batches of one shape, whatever the depth."""
        made = [feature.to(batches[0].dtype) for feature in network_features(self.network, batches)]
        return list(zip(*(feature.chunk(len(batches)) for feature in made), strict=True))

    def normalize(self, code: Tensor, statistics_of: Tensor | None = None) -> Tensor:
        """The code, each channel with mean 0 and variance 1 by its own statistics or those of another code."""
        return normalize_channels(code, statistics_of, self.eps)

    def name(self) -> str:
        """The class of the network and a digest of its weights, by which a resumed run recognises it."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{type(self.network).__name__} {digest.hexdigest()}"


# an encoder, or a network in its place
Judge = Encoder | FrozenJudge


def network_features(network: nn.Module, batches: Sequence[Tensor]) -> Features:
    """What a network of the caller's own makes of several batches together, the code last."""
    images = [unit_range(batch) for batch in batches]
    made = network(images[0] if len(images) == 1 else torch.cat(images))
    return (made,) if isinstance(made, Tensor) else tuple(made)


def compare(
    judge: Judge,
    targets: Sequence[Features],
    branches: Sequence[Sequence[Features]],
    statistics: JudgeStatistics,
    near: Sequence[Sequence[Features]] | None = None,
) -> list[list[Tensor]]:
    """The mean over the judge's features of mse(J(T x), J(T x̂)): for each branch a scalar for each target.

    With `near` J(T x) only normalises, and `near` is what views are compared with; see `SelfTeaching`.

    Args:
        judge: Normalises codes.
        targets: Features of each T x, from `Encoder.features`.
        branches: Of each branch the features of its views, one for each target.
        statistics: Whose mean and variance normalise the views: their own, or those of J(T x). The targets are always
            normalised by their own.
        near: For each branch the features that its views are compared with instead of J(T x), normalised by the mean
            and variance of J(T x); with statistics "target" only.
    """
    if statistics == "target" and torch.compiler.is_compiling() and isinstance(judge, Encoder):
        return [list(errors) for errors in errors_in_two_passes(judge, targets, branches, near)]
    comparisons = [_Comparison(judge, target, statistics) for target in targets]
    wanted = [[None] * len(targets)] * len(branches) if near is None else near
    return [
        [compared(view, target) for compared, view, target in zip(comparisons, views, nearer, strict=True)]
        for views, nearer in zip(branches, wanted, strict=True)
    ]


class _Comparison:
    """Compares views with one target, or with what lies near them; see `compare`."""

    def __init__(self, judge: Judge, target: Features, statistics: JudgeStatistics) -> None:
        self._judge, self._target, self._by_target = judge, target, statistics == "target"
        self._code = judge.normalize(target[-1])

    def __call__(self, view: Features, near: Features | None = None) -> Tensor:
        """The mean over the features of mse(J(T x), J(T x̂)), a scalar."""
        like = self._target[-1] if self._by_target else None
        code = self._code if near is None else self._judge.normalize(near[-1], like)
        errors = [F.mse_loss(self._judge.normalize(view[-1], like), code)]
        wanted = self._target if near is None else near
        for ours, theirs, target in zip(view[:-1], wanted[:-1], self._target[:-1], strict=True):
            errors.append(self._error(*(feature.to(self._code.dtype) for feature in (ours, theirs, target))))
        return errors[0] if len(errors) == 1 else torch.stack(errors).mean()

    def _error(self, view: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
        """The mean squared error of one feature, (B, C, ...), normalised channel by channel."""
        eps = self._judge.eps
        if not self._by_target:
            ours, theirs = (F.batch_norm(x, None, None, training=True, eps=eps) for x in (view, target))
            return F.mse_loss(ours, theirs)
        dims = [d for d in range(target.ndim) if d != 1]
        variance = torch.var(target, dims, correction=0)
        # the target's mean, subtracted from both, cancels; a channel's errors are averaged before they are scaled
        return (_squares(view, wanted).mean(dims) / (variance + eps)).mean()


def errors_in_two_passes(
    judge: Encoder,
    targets: Sequence[Features],
    branches: Sequence[Sequence[Features]],
    near: Sequence[Sequence[Features]] | None = None,
) -> Tensor:
    """`compare` with the targets' statistics, in the form of a graph: (branches, targets).

    A graph reduces the maps of a batch in several passes, and would do so for every feature, target and branch. Here
    the first pass is over the pixels of each image, and leaves so little that one more is enough for all of them.
    """
    norm, count = judge.norm, len(targets[0])
    shared = [_as_map(feature, norm) for target in targets for feature in target]
    moments = [torch.var_mean(maps, (2, 3), correction=0) for maps in shared]
    # a channel's variance is the mean of its variances within images, plus the variance of its means
    within = torch.cat([variance for variance, _ in moments], 1).mean(0)
    between = torch.var(torch.cat([mean for _, mean in moments], 1), 0, correction=0)
    squares = []
    for branch, views in enumerate(branches):
        seen = [_as_map(feature, norm) for view in views for feature in view]
        wanted = shared if near is None else [_as_map(feature, norm) for target in near[branch] for feature in target]
        for index, (ours, theirs) in enumerate(zip(seen, wanted, strict=True)):
            # the BatchNorm's weights scale the code, and nothing scales the features before it
            scale = norm.weight.square() if index % count == count - 1 else 1.0
            squares.append(_squares(ours, theirs).mean((2, 3)) * scale / (count * ours.shape[1]))
    errors = torch.cat(squares, 1).mean(0) / (within + between + norm.eps).repeat(len(branches))
    return errors.unflatten(0, (len(branches), len(targets), -1)).sum(2)


def _as_map(feature: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """(B, C, h, w) of a feature of any number of dimensions, in the precision of the statistics."""
    return (feature if feature.ndim == 4 else feature.reshape(*feature.shape[:2], -1, 1)).to(norm.weight.dtype)


def _squares(view: Tensor, target: Tensor) -> Tensor:
    """The squared differences. Their gradient has the memory format of view and target; that of `square` has not."""
    return F.mse_loss(view, target, reduction="none")
