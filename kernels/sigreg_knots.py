"""The knots of SIGReg's quadrature, and the basis from which cos kθ and sin kθ at all of them follow, θ = Δ·P.

Each of the K − 1 live knots t_k = kΔ is k = q ± j, with centres q = H, 3H, 5H, … (one for each of A `blocks`) and
j = 0..H, where H is the `reach`. By the addition theorems

    cos (q ± j)θ = cos qθ cos jθ ∓ sin qθ sin jθ        sin (q ± j)θ = sin qθ cos jθ ± cos qθ sin jθ

so every cosine and sine is a linear combination, with coefficients 0 and ±1, of A·(4H + 2) products, the `basis`:

    for each q:  cos qθ,  sin qθ,  and for each j ≥ 1:  cos qθ cos jθ,  sin qθ sin jθ,  sin qθ cos jθ,  cos qθ sin jθ

The forward pass sums the basis over samples, one multiply-add for each function. The backward pass needs one linear
combination of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# with a larger reach, the harmonics of one angle would fill the registers of a GPU thread
MAX_REACH = 6


@dataclass(frozen=True)
class Knots:
    """K = `knots` equally spaced points on [0, t_max]. t = 0 contributes nothing, so K − 1 knots are live.

    Raises:
        ValueError: Knots < 2, or t_max is not positive and finite.
    """

    t_max: float
    knots: int

    def __post_init__(self) -> None:
        if self.knots < 2 or not 0 < self.t_max < math.inf:
            raise ValueError(f"SIGReg needs knots >= 2 and t_max > 0, not knots={self.knots} and t_max={self.t_max}")

    @property
    def live(self) -> int:
        return self.knots - 1

    @property
    def blocks(self) -> int:
        return _layout(self.live)[0]

    @property
    def reach(self) -> int:
        return _layout(self.live)[1]

    @property
    def basis_size(self) -> int:
        return self.blocks * (4 * self.reach + 2)

    def step(self, dtype: torch.dtype) -> float:
        """Δ rounded to `dtype`. Angles and φ must use the same bits of it: an error from a difference grows with √N."""
        step = self.t_max / self.live
        return step if dtype == torch.float64 else _in_fp32(step)

    def points(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """t_1..t_{K−1} for samples of `dtype`: (K − 1,), in the dtype and on the device of `like`."""
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            return _points(self.live, self.step(dtype)).to(like.dtype)
        # computed on the device, because a CUDA graph cannot capture a copy from the host
        return torch.arange(1, self.knots, dtype=like.dtype, device=like.device) * self.step(dtype)

    def weights(self, like: Tensor) -> Tensor:
        """w_1..w_{K−1} of the trapezoidal rule on [0, t_max]: (K − 1,), in the dtype and on the device of `like`."""
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            return _weights(self.live, self.step(like.dtype)).to(like.dtype)
        return _trapezoid(self.points(like.dtype, like), self.step(like.dtype))

    def table(self, like: Tensor) -> Tensor:
        """The cosines, then the sines, at the live knots as combinations of the basis: (2(K − 1), basis_size)."""
        return _placed(_table, (self.live,), like.dtype, like.device)

    def derivative_table(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """The same table for the derivatives with respect to P: −t sin tP for cos tP and t cos tP for sin tP."""
        return _placed(_derivative_table, (self.live, self.step(dtype)), like.dtype, like.device)

    def expected(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The expectation of the basis over standard normal samples of `dtype`: (basis_size,), in `sum_dtype`."""
        return _placed(_expected, (self.live, self.step(dtype)), sum_dtype(device), device)


def _in_fp32(number: float) -> float:
    """The nearest number of 24 bits. Not by `struct`, which Dynamo of torch 2.4 to 2.6 does not know."""
    exponent = math.frexp(number)[1]
    return math.ldexp(round(math.ldexp(number, 24 - exponent)), exponent - 24)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over chunks, deviations and coefficients, which are few: fp64, which not all GPUs have."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def phi(k: int, step: float) -> float:
    """φ_k, the expectation of cos kθ over standard normal samples."""
    return math.exp(-0.5 * (k * step) ** 2)


def basis_mean(function: int, block: int, reach: int, step: float) -> float:
    """The expectation of a block's function over standard normal samples; `function` counts in the basis's order."""
    q = (2 * block + 1) * reach
    j, kind = (function + 2) // 4, (function + 2) % 4
    # Triton calls this when it compiles, and then it may call no other function of ours
    lower, upper = math.exp(-0.5 * ((q - j) * step) ** 2), math.exp(-0.5 * ((q + j) * step) ** 2)
    if function == 0 or kind == 0:
        return (lower + upper) / 2
    return (lower - upper) / 2 if kind == 1 else 0.0


@functools.lru_cache(maxsize=64)
def _placed(
    make: Callable[..., Tensor], arguments: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A table on a device. It is kept there: every copy from the host's memory would make the host wait."""
    # the dtype first, since a GPU without fp64 cannot even receive it
    return make(*arguments).to(dtype).to(device)


def _trapezoid(points: Tensor, step: float) -> Tensor:
    weights = 2 * step * torch.exp(-0.5 * points.square())
    return torch.cat((weights[:-1], 0.5 * weights[-1:]))


@functools.lru_cache(maxsize=64)
def _points(live: int, step: float) -> Tensor:
    return torch.arange(1, live + 1, dtype=torch.float64) * step


@functools.lru_cache(maxsize=64)
def _weights(live: int, step: float) -> Tensor:
    return _trapezoid(_points(live, step), step)


@functools.lru_cache(maxsize=64)
def _derivative_table(live: int, step: float) -> Tensor:
    points = _points(live, step)[:, None]
    cosine, sine = _table(live).chunk(2)
    return torch.cat((-points * sine, points * cosine))


@functools.lru_cache(maxsize=64)
def _expected(live: int, step: float) -> Tensor:
    blocks, reach = _layout(live)
    means = [basis_mean(i, block, reach, step) for block in range(blocks) for i in range(4 * reach + 2)]
    return torch.tensor(means, dtype=torch.float64)


@functools.cache
def _layout(live: int) -> tuple[int, int]:
    """(blocks A, reach H), with 2AH ≥ live, that need the fewest operations for each angle."""

    def operations(layout: tuple[int, int]) -> int:
        blocks, reach = layout
        return blocks * (4 * reach + 2) + 3 * reach + 5 * (blocks - 1)

    reaches = range(1, min(live, MAX_REACH) + 1)
    return min(((math.ceil(live / (2 * reach)), reach) for reach in reaches), key=operations)


@functools.cache
def _table(live: int) -> Tensor:
    blocks, reach = _layout(live)
    table = torch.zeros(2, 2 * blocks * reach + 1, blocks * (4 * reach + 2), dtype=torch.float64)
    cosine, sine = table
    column = 0
    for block in range(blocks):
        q = (2 * block + 1) * reach
        cosine[q, column] = sine[q, column + 1] = 1
        column += 2
        for j in range(1, reach + 1):
            # the lowest knot of a block is the highest of the block before it
            signs = (1, -1) if j < reach else (1,)
            for sign in signs:
                cosine[q + sign * j, column], cosine[q + sign * j, column + 1] = 1, -sign
                sine[q + sign * j, column + 2], sine[q + sign * j, column + 3] = 1, sign
            column += 4
    return table[:, 1 : live + 1].flatten(0, 1)
