"""The knots of SIGReg's quadrature, and how cos kθ and sin kθ at all of them come from a few harmonics of θ = Δ·P.

The K − 1 live knots t_k = kΔ are written as k = q ± j, with centres q = H, 3H, 5H, … (A of them, the `blocks`) and
j = 0..H (the `reach`). By the addition theorems

    cos (q ± j)θ = cos qθ cos jθ ∓ sin qθ sin jθ        sin (q ± j)θ = sin qθ cos jθ ± cos qθ sin jθ

so every cosine and sine is a combination, with coefficients 0 and ±1, of A·(4H + 2) products, the `basis`:

    for each q:  cos qθ,  sin qθ,  and for each j ≥ 1:  cos qθ cos jθ,  sin qθ sin jθ,  sin qθ cos jθ,  cos qθ sin jθ

Forward needs the sums of the basis over samples, at one multiply-add each. Backward needs one combination of it.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

# a greater reach would fill a GPU thread's registers with the harmonics of one angle
MAX_REACH = 6


@dataclass(frozen=True)
class Knots:
    """K = `knots` equally spaced points on [0, t_max]; t = 0 contributes nothing, so K − 1 of them are live.

    Raises:
        ValueError: knots < 2, or t_max not a positive number.
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
        """Δ, as a number of `dtype`: angles and φ must agree on it to the last bit, or the difference grows with √N."""
        step = self.t_max / self.live
        return step if dtype == torch.float64 else struct.unpack("f", struct.pack("f", step))[0]

    def points(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """t_1..t_{K−1} for samples of `dtype`, with the dtype and on the device of `like`: (K − 1,)."""
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            return _points(self.live, self.step(dtype)).to(like.dtype)
        # made there, since a copy from the host could not be captured in a CUDA graph
        return torch.arange(1, self.knots, dtype=like.dtype, device=like.device) * self.step(dtype)

    def weights(self, like: Tensor) -> Tensor:
        """w_1..w_{K−1} of the trapezoidal rule on [0, t_max], with the dtype and on the device of `like`: (K − 1,)."""
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            return _weights(self.live, self.step(like.dtype)).to(like.dtype)
        return _trapezoid(self.points(like.dtype, like), self.step(like.dtype))

    def table(self, like: Tensor) -> Tensor:
        """(2(K − 1), basis_size): the cosines, then the sines, at the live knots, as combinations of the basis."""
        return _table(self.live).to(like)

    def slopes(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """The same for the derivatives to P, for samples of `dtype`: −t sin tP for cos tP, t cos tP for sin tP."""
        return _slopes(self.live, self.step(dtype)).to(like)

    def expected(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The basis's expectation over standard normal samples of `dtype`: (basis_size,), in the `wide` dtype."""
        return _expected(self.live, self.step(dtype)).to(device, wide(device))


def wide(device: torch.device) -> torch.dtype:
    """The dtype of what is small: sums over runs, deviations, coefficients. Apple's GPUs have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


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
def _slopes(live: int, step: float) -> Tensor:
    points = _points(live, step)[:, None]
    cosine, sine = _table(live).chunk(2)
    return torch.cat((-points * sine, points * cosine))


@functools.lru_cache(maxsize=64)
def _expected(live: int, step: float) -> Tensor:
    blocks, reach = _layout(live)
    phi = [math.exp(-0.5 * (k * step) ** 2) for k in range(2 * blocks * reach + 1)]
    found: list[float] = []
    for block in range(blocks):
        q = (2 * block + 1) * reach
        found += [phi[q], 0]
        for j in range(1, reach + 1):
            found += [(phi[q - j] + phi[q + j]) / 2, (phi[q - j] - phi[q + j]) / 2, 0, 0]
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def _layout(live: int) -> tuple[int, int]:
    """(blocks A, reach H) with 2AH ≥ live that cost the fewest operations for each angle."""

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
            # the least knot of a block is the greatest of the one before
            signs = (1, -1) if j < reach else (1,)
            for sign in signs:
                cosine[q + sign * j, column], cosine[q + sign * j, column + 1] = 1, -sign
                sine[q + sign * j, column + 2], sine[q + sign * j, column + 3] = 1, sign
            column += 4
    return table[:, 1 : live + 1].flatten(0, 1)
