"""SIGReg: the distance of a batch of codes from an isotropic Gaussian, on random slices.

Source: LeJEPA (arXiv 2511.08544); docs/method.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from fastle.kernels import sigreg as operator
from fastle.kernels.sigreg import Impl

ConventionName = Literal["lejepa", "lightly", "leautoencoder", "minimal", "eb_jepa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """The rules by which published packages differ, given the same samples and slices.

    Attributes:
        knots: the default K.
        over_ranks: whether the statistic is of the samples of all ranks together, or of this rank's alone.
        symmetric: whether the K knots lie on [−t_max, t_max] instead of [0, t_max].
        times_count: whether the mean squared deviation is multiplied by N, as in the Epps-Pulley statistic.
    """

    knots: int = 17
    over_ranks: bool = True
    symmetric: bool = False
    times_count: bool = True


_ONE_RANK = Convention(over_ranks=False)
CONVENTIONS: dict[str, Convention] = {
    "lejepa": Convention(),
    "lightly": Convention(),
    "leautoencoder": _ONE_RANK,
    "minimal": _ONE_RANK,
    "eb_jepa": Convention(knots=10, symmetric=True, times_count=False),
}


def sigreg(
    z: Tensor,
    slices: Tensor,
    *,
    weights: Tensor | None = None,
    t_max: float = 3.0,
    knots: int | None = None,
    convention: ConventionName = "lejepa",
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The SIGReg loss of samples on given slices: the mean of the statistic over slices and leading axes.

    If a `torch.distributed` process group is initialised, every rank gets the loss of the concatenated batch, except
    with the conventions "leautoencoder" and "minimal". Each rank's gradient is then the world size times its part of
    that batch's gradient, so that DistributedDataParallel's average over ranks is right. Ranks may differ in N only.

    Args:
        z: (..., N, D) samples; each leading index is one test.
        slices: (D, M), unit columns, the same on every rank.
        weights: (..., N), a mask or real numbers ≥ 0; see `fastle.kernels.sigreg.sigreg`.
        t_max: the largest knot, > 0.
        knots: K ≥ 2; by default the convention's, 17 (10 for "eb_jepa").
        convention: a key of `CONVENTIONS`, named after a package. In one process all but "eb_jepa" agree.
        group: the ranks that share one batch; by default all.
        impl: see `fastle.kernels.sigreg.sigreg`.

    Returns:
        A scalar, fp32 (fp64 for fp64). Its mean for standard normal samples is about 1.05 (1.05/N for "eb_jepa").

    Raises:
        ValueError: the convention is unknown; and the errors of `fastle.kernels.sigreg.sigreg`.
    """
    rules = _rules(convention)
    knots = rules.knots if knots is None else knots
    over_ranks = rules.over_ranks and _ranks(group) > 1
    if not over_ranks and rules.times_count and not rules.symmetric:
        return operator.sigreg(z, slices, weights=weights, t_max=t_max, knots=knots, impl=impl)
    sums = operator.cf_deviations(z, slices, weights=weights, t_max=t_max, knots=knots, impl=impl)
    if weights is None:
        count = torch.full(z.shape[:-2], z.shape[-2], dtype=sums.dtype, device=z.device)
    else:
        count = weights.detach().to(sums.dtype).sum(-1)
    if over_ranks:
        # one tensor, so that there is one collective in each direction
        total = _SumOverRanks.apply(torch.cat((sums.flatten(-3), count[..., None]), dim=-1), group)
        sums, count = total[..., :-1].view_as(sums), total[..., -1]
    statistics = operator.statistic(sums, count, t_max=t_max, knots=knots, symmetric=rules.symmetric)
    if not rules.times_count:
        statistics = statistics / count.clamp_min(1e-30)[..., None]
    return statistics.mean()


def _rules(convention: str) -> Convention:
    if convention not in CONVENTIONS:
        raise ValueError(f"SIGReg: convention must be one of {', '.join(CONVENTIONS)}, not {convention!r}")
    return CONVENTIONS[convention]


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; the gradient is the sum of the gradients over all ranks.

    With the rank's own gradient alone, the result would lack a factor of the world size. torch.distributed.nn has the
    same function, but since torch 2.15 it is deprecated in favour of a private one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def draw_slices(dim: int, num_slices: int, generator: Generator) -> Tensor:
    """Random directions: (dim, num_slices) fp32 on the generator's device, Gaussian columns scaled to unit norm."""
    slices = torch.randn(dim, num_slices, generator=generator, device=generator.device)
    return slices / slices.norm(dim=0, keepdim=True).clamp_min(torch.finfo(slices.dtype).tiny)


class SIGReg(nn.Module):
    """SIGReg for any training loop. Each call draws new slices from the module's own generator on the samples' device.

    The state dict holds the generator's state, so that a resumed run continues with the same slices. If every rank has
    the same seed, the slices agree without communication.

    Args:
        num_slices: M, the slices drawn at each call.
        knots, t_max, convention, group, impl: see `sigreg`.
        seed: the seed of the slices.

    Raises:
        ValueError: the convention is unknown.

    Example:
        >>> regularizer = SIGReg(num_slices=256)
        >>> loss = prediction_loss + 0.03 * regularizer(z)  # z (..., N, D)
    """

    def __init__(
        self,
        num_slices: int = 256,
        knots: int | None = None,
        t_max: float = 3.0,
        convention: ConventionName = "lejepa",
        *,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.knots = _rules(convention).knots if knots is None else knots
        self.num_slices, self.t_max, self.convention, self.seed = num_slices, t_max, convention, seed
        self.group, self.impl = group, impl
        self._generator: Generator | None = None
        self._resumed: Tensor | None = None

    def forward(self, z: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of z (..., N, D), a scalar; weights (..., N) as in `sigreg`."""
        slices = draw_slices(z.shape[-1], self.num_slices, self._generator_on(z.device))
        return sigreg(
            z,
            slices,
            weights=weights,
            t_max=self.t_max,
            knots=self.knots,
            convention=self.convention,
            group=self.group,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, convention={self.convention!r}"

    def get_extra_state(self) -> Tensor | None:
        return self._resumed if self._generator is None else self._generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        # the device, and with it the kind of generator, is known at the first call only
        self._generator, self._resumed = None, state

    def _generator_on(self, device: torch.device) -> Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._resumed is not None:
                self._generator.set_state(self._resumed.cpu())
                self._resumed = None
        return self._generator
