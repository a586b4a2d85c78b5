"""SIGReg: the distance of a batch of latents from an isotropic Gaussian, on random slices.

Source: LeJEPA (arXiv 2511.08544); docs/method.md, section 2.
"""

from __future__ import annotations

import warnings
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
        knots: The default K.
        over_ranks: Whether the statistic is of the samples of all ranks together, or of this rank's alone.
        symmetric: Whether the K knots lie on [−t_max, t_max] instead of [0, t_max].
        times_count: Whether the mean squared deviation is multiplied by N, as in the Epps-Pulley statistic.
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
        t_max: The largest knot, > 0.
        knots: K ≥ 2; by default the convention's, 17 (10 for "eb_jepa").
        convention: A key of `CONVENTIONS`, named after a package. In one process all but "eb_jepa" agree.
        group: The ranks that share one batch; by default all.
        impl: See `fastle.kernels.sigreg.sigreg`.

    Returns:
        A scalar, fp32 (fp64 for fp64). Its mean for standard normal samples is about 1.05 (1.05/N for "eb_jepa").

    Raises:
        ValueError: The convention is unknown; and the errors of `fastle.kernels.sigreg.sigreg`.
    """
    rules = _rules(convention)
    knots = rules.knots if knots is None else knots
    over_ranks = rules.over_ranks and _ranks(group) > 1
    if not over_ranks and rules.times_count and not rules.symmetric:
        return operator.sigreg(z, slices, weights=weights, t_max=t_max, knots=knots, impl=impl)
    sums, count = _deviations(z, slices, weights, t_max, knots, impl, group, over_ranks)
    statistics = operator.statistic(sums, count, t_max=t_max, knots=knots, symmetric=rules.symmetric)
    if not rules.times_count:
        statistics = statistics / count.clamp_min(1e-30)[..., None]
    return statistics.mean()


def two_sample_sigreg(
    x: Tensor,
    y: Tensor,
    slices: Tensor,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    t_max: float = 3.0,
    knots: int = 17,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The distance between the distributions of two batches: SIGReg with the second batch in place of the Gaussian.

        statistic_m = N·N' / (N + N') · Σ_k w_k |mean_n exp(i t_k x_nm) − mean_n exp(i t_k y_nm)|²

    The mean over slices and leading axes, with the knots and weights of `sigreg`. Both batches get gradients; detach
    one that is only to be matched. If a process group is initialised, the batches of all ranks count together, and
    gradients are as in `sigreg`.

    Args:
        x, y: (..., N, D) and (..., N', D) samples with equal leading axes.
        slices: (D, M), unit columns, the same on every rank.
        x_weights, y_weights: (..., N) and (..., N'), a mask or real numbers ≥ 0, as in `sigreg`.
        t_max, knots, group, impl: See `sigreg`.

    Returns:
        A scalar, fp32 (fp64 for fp64). Its mean for standard normal samples, of whatever N and N', is about 1.05.

    Raises:
        ValueError: The leading axes differ; and the errors of `fastle.kernels.sigreg.sigreg`.
    """
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"SIGReg: the leading axes of {tuple(x.shape)} and {tuple(y.shape)} differ")
    over_ranks = _ranks(group) > 1
    (x_sums, x_count), (y_sums, y_count) = (
        _deviations(z, slices, weights, t_max, knots, impl, group, over_ranks)
        for z, weights in ((x, x_weights), (y, y_weights))
    )
    # φ is in both, and cancels
    x_mean, y_mean = (
        sums / count.clamp_min(1e-30)[..., None, None, None] for sums, count in ((x_sums, x_count), (y_sums, y_count))
    )
    effective = x_count * y_count / (x_count + y_count).clamp_min(1e-30)
    difference = effective[..., None, None, None] * (x_mean - y_mean)
    return operator.statistic(difference, effective, t_max=t_max, knots=knots).mean()


def _deviations(
    z: Tensor,
    slices: Tensor,
    weights: Tensor | None,
    t_max: float,
    knots: int,
    impl: Impl,
    group: dist.ProcessGroup | None,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """The deviations (..., 2, K − 1, M) of a batch, or of the ranks' batches together, and its N or Σω (...)."""
    sums = operator.cf_deviations(z, slices, weights=weights, t_max=t_max, knots=knots, impl=impl)
    if weights is None:
        count = torch.full(z.shape[:-2], z.shape[-2], dtype=sums.dtype, device=z.device)
    else:
        count = weights.detach().to(sums.dtype).sum(-1)
    if over_ranks:
        # one tensor, so that there is one collective in each direction
        total = _SumOverRanks.apply(torch.cat((sums.flatten(-3), count[..., None]), dim=-1), group)
        sums, count = total[..., :-1].view_as(sums), total[..., -1]
    return sums, count


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


def _next_slices(state: Tensor, dim: int, num_slices: int, device: torch.device) -> Tensor:
    """The slices of a module's next call, (dim, num_slices) fp32 on the device. `state` counts the call.

    Args:
        state: (2,) int64 on the CPU: the seed and the calls so far. Slices depend on them and on the kind of device.
    """
    # a forward pass inside of a backward pass is a repeated one
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "SIGReg is called a second time for one step, by activation checkpointing, and would draw other slices. "
            "Call it outside of what is checkpointed, or pass slices of your own to fastle.sigreg"
        )
    seed, calls = state.tolist()
    state[1] += 1
    # 63 bits, because torch takes a signed integer
    generator = Generator(device).manual_seed(_mix_bits(_mix_bits(seed) + calls) >> 1)
    return draw_slices(dim, num_slices, generator)


# an operator, because torch.compile cannot trace the making of a generator
_next_slices_op = torch.library.custom_op(
    "fastle::next_slices",
    _next_slices,
    mutates_args={"state"},
    schema="(Tensor(a!) state, SymInt dim, SymInt num_slices, Device device) -> Tensor",
)


@_next_slices_op.register_fake
def _(state: Tensor, dim: int, num_slices: int, device: torch.device) -> Tensor:
    return torch.empty(dim, num_slices, device=device)


def _mix_bits(number: int) -> int:
    """64 bits, each of which depends on every bit of the number: SplitMix64's output function."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


class SIGReg(nn.Module):
    """SIGReg for any training loop. Each call draws new slices on the samples' device.

    The slices depend on the seed, the number of calls before, and the kind of device (CPU or GPU). The state dict holds
    seed and number, so that a resumed run continues with the same slices. If every rank has the same seed, the slices
    agree without communication.

    Args:
        num_slices: M ≥ 1, the slices drawn at each call.
        knots, t_max, convention, group, impl: See `sigreg`.
        seed: The seed of the slices, a signed 64-bit integer.

    Raises:
        ValueError: The convention or `impl` is unknown, or num_slices, knots or t_max is out of range.

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
        operator.check_options(knots=self.knots, t_max=t_max, impl=impl)
        if num_slices < 1:
            raise ValueError(f"SIGReg needs num_slices >= 1, not {num_slices}")
        self.num_slices, self.t_max, self.convention = num_slices, t_max, convention
        self.group, self.impl = group, impl
        # not a buffer, and on the CPU whatever the default device is: reading it must not wait for a GPU
        self._state = torch.tensor([seed, 0], device="cpu")

    def forward(self, z: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of z (..., N, D), a scalar; weights (..., N) as in `sigreg`.

        Raises:
            RuntimeError: Activation checkpointing runs it again.
            ValueError: See `sigreg`.
        """
        draw = _next_slices_op if torch.compiler.is_compiling() else _next_slices
        return sigreg(
            z,
            draw(self._state, z.shape[-1], self.num_slices, z.device),
            weights=weights,
            t_max=self.t_max,
            knots=self.knots,
            convention=self.convention,
            group=self.group,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, convention={self.convention!r}"

    def get_extra_state(self) -> Tensor:
        return self._state.clone()

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.dtype == torch.uint8:
            warnings.warn(
                "this state of SIGReg was saved by fastle 0.1, which drew other slices; fresh ones follow", stacklevel=2
            )
        elif state.shape != (2,) or state.dtype != torch.int64:
            raise ValueError(f"no state of SIGReg: {tuple(state.shape)} of {state.dtype}")
        else:
            self._state = state.cpu().clone()
