"""SIGReg: how far a batch of codes is from an isotropic Gaussian, by random slices (LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from .kernels.sigreg import cf_sums, statistic


def sigreg(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """The SIGReg loss of samples on given slices: the mean statistic over slices and leading axes.

    Under an initialised `torch.distributed` process group it is the loss of the concatenated batch, on every rank. Each
    rank's gradient is then world size times its part of that batch's, so that DistributedDataParallel's average over
    the ranks is right. Ranks may differ in N.

    Args:
        z: (..., N, D) samples; a leading axis is one test each.
        slices: (D, M), unit columns, the same on every rank.
        t_max, knots: the K = `knots` points of the test lie on [0, t_max].

    Returns:
        A scalar, fp32 (float64 for float64). About 1.05 for standard normal samples.

    Raises:
        ValueError: shapes that do not fit or no samples.
    """
    sums = cf_sums(z, slices, t_max=t_max, knots=knots)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return statistic(sums, z.shape[-2], t_max=t_max, knots=knots).mean()
    count = torch.tensor(float(z.shape[-2]), device=z.device, dtype=sums.dtype)
    dist.all_reduce(count)
    return statistic(_SumOverRanks.apply(sums), count, t_max=t_max, knots=knots).mean()


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks. Its adjoint is the sum of the gradients over all ranks.

    Without that adjoint the gradient would be short by a factor of the world size. torch.distributed.nn has the same
    function, deprecated since 2.15 in favour of a private one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def draw_slices(dim: int, num_slices: int, generator: Generator) -> Tensor:
    """Random directions: (dim, num_slices) fp32 on the generator's device, Gaussian columns scaled to unit norm."""
    slices = torch.randn(dim, num_slices, generator=generator, device=generator.device)
    return slices / slices.norm(dim=0, keepdim=True).clamp_min(torch.finfo(slices.dtype).tiny)


class SIGReg(nn.Module):
    """SIGReg for any training loop: fresh slices each call, from the module's own generator.

    The state dict holds the generator, so that a resumed run goes on with the same slices. Give every rank the same
    seed and the slices agree without communication.

    Args:
        num_slices: M.
        knots, t_max: see `sigreg`.
        seed: of the slices.

    Example:
        >>> regularizer = SIGReg(num_slices=256)
        >>> loss = prediction_loss + 0.03 * regularizer(z)  # z (..., N, D)
    """

    def __init__(self, num_slices: int = 256, knots: int = 17, t_max: float = 3.0, seed: int = 0) -> None:
        super().__init__()
        self.num_slices, self.knots, self.t_max, self.seed = num_slices, knots, t_max, seed
        self._generator: Generator | None = None
        self._resumed: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """The loss of z (..., N, D), a scalar."""
        slices = draw_slices(z.shape[-1], self.num_slices, self._generator_on(z.device))
        return sigreg(z, slices, t_max=self.t_max, knots=self.knots)

    def get_extra_state(self) -> Tensor | None:
        return self._resumed if self._generator is None else self._generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        # the device, and so the kind of generator, is known at the first call only
        self._generator, self._resumed = None, state

    def _generator_on(self, device: torch.device) -> Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._resumed is not None:
                self._generator.set_state(self._resumed.cpu())
                self._resumed = None
        return self._generator
