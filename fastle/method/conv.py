"""Convolutions in the form that a GPU computes best. Parameters, initial values and state dicts are `nn.Conv2d`'s.

torch.compile cannot fuse the bias of a convolution that it calls from a library: the sum is written back in a pass of
its own, or beside the activation as one more map to keep for the backward pass. A bias added outside is part of the
activation, and what is kept is the result of the convolution. Eager libraries add the bias on the way out, for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding, its bias outside the convolution when compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with another bias, or with none."""
        if bias is None or not torch.compiler.is_compiling():
            return F.conv2d(x, self.weight, bias, self.stride, self.padding)
        return add_bias(F.conv2d(x, self.weight, None, self.stride, self.padding), bias)


def add_bias(maps: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) plus (C,), in the maps' dtype."""
    return maps + bias.to(maps.dtype)[:, None, None]
