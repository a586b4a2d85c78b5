"""Averages of the weights over a run, kept beside the model.

The averages have the power-function profile of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics
of Diffusion Models", section 3): after step t the average moves to the weights by 1 − (1 − 1/t)^(γ+1). Its length is
then a share of the steps so far, and the first weights leave no trace. A length is given as the profile's relative
standard deviation, σ_rel = (γ+1)^(1/2) (γ+2)^(-1) (γ+3)^(-1/2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastle.method.model import Autoencoder


class WeightAverage:
    """One average of a model's parameters and running statistics.

    Args:
        model: The model to follow, on its device.
        length: σ_rel, in (0, 0.28).

    Attributes:
        name: Of the checkpoint section, "ema-050" for a length of 0.05.
        model: The averaged model.
    """

    def __init__(self, model: Autoencoder, length: float) -> None:
        self.name = f"ema-{round(1000 * length):03d}"
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._exponent = power(length) + 1
        # a captured step reads it anew in every replay
        self._rate = torch.ones((), device=next(model.parameters()).device)

    def prepare(self, step: int) -> None:
        """Sets the rate of the update after `step` steps; the update itself may be part of a captured step."""
        self._rate.fill_(1 - (1 - 1 / step) ** self._exponent)

    @torch.no_grad()
    def update(self, model: Autoencoder) -> None:
        """Moves the average to the weights of the model."""
        for average, value in zip(self.tensors(), _tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(value, self._rate)
            else:
                average.copy_(value)

    def tensors(self) -> Iterator[Tensor]:
        """The averaged parameters, then the buffers."""
        return _tensors(self.model)


def make_averages(model: Autoencoder, lengths: Sequence[float]) -> list[WeightAverage]:
    """One average for each length."""
    return [WeightAverage(model, length) for length in lengths]


def power(length: float) -> float:
    """γ of a profile whose relative standard deviation is `length`, in (0, 0.28): the inverse of the formula above."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def _tensors(model: Autoencoder) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
