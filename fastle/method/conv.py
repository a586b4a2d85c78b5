"""Convolutions in the form that a GPU computes best. Parameters, initial values and state dicts are `nn.Conv2d`'s.

torch.compile cannot fuse the bias of a convolution that it calls from a library: the sum is written back in a pass of
its own, or beside the activation as one more map to keep for the backward pass. A bias added outside is part of the
activation, and what is kept is the result of the convolution. Eager libraries add the bias for free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.kernels.halving_conv import halving_conv

# bf16 channels that a tensor core reads at once
ALIGNED = 8


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding and a bias, which is outside the convolution when compiled."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with another bias, or with none."""
        if bias is None or not torch.compiler.is_compiling():
            return F.conv2d(x, self.weight, bias, self.stride, self.padding)
        return add_bias(F.conv2d(x, self.weight, None, self.stride, self.padding), bias)


class HalvingConv2d(nn.Conv2d):
    """A 4×4 convolution of stride 2 and padding 1 with a SiLU, as a 2×2 convolution on blocks of 2×2 pixels.

    Batches of (B, C_in, H, W), H and W divisible by 4 → (ΣB, C_out, H/2, W/2), and the `shortcut` of that to twice the
    channels. Tensor cores read channels in eights, and an image has three: a block of 2×2 pixels makes twelve of
    them, and ones fill these up to sixteen. The first of the ones carries the bias, whose gradient is thus computed
    with the weight's.
    """

    bias: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1)

    def forward(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not torch.compiler.is_compiling() and len(batches) > 1:
            # compiled, joining the images first would copy them once more; eager, joining the blocks would
            batches = (torch.cat(list(batches)),)
        blocks = [self._blocks(images) for images in batches]
        # channels-last too: (C_out, 2, 2, channels of a block)
        taps = self.weight.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        # the bias at one of the four taps, zeros for the other ones
        bias = F.pad(self.bias[:, None, None, None], (0, self._ones - 1, 0, 1, 0, 1))
        weight = torch.cat((taps, bias), dim=3).permute(0, 3, 1, 2)
        return halving_conv(blocks[0] if len(blocks) == 1 else torch.cat(blocks), _autocast(weight))

    @property
    def _ones(self) -> int:
        """Channels of ones in a block."""
        return ALIGNED - 4 * self.in_channels % ALIGNED

    def _blocks(self, images: Tensor) -> Tensor:
        """(B, C_in, H, W) → channels-last (B, channels of a block, H/2 + 1, W/2 + 1)."""
        padded = F.pad(_autocast(images), (1, 1, 1, 1)).permute(0, 2, 3, 1)
        # (B, H/2 + 1, W/2 + 1, row in the block, column in the block, C_in)
        squares = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        return F.pad(squares.flatten(3), (0, self._ones), value=1.0).permute(0, 3, 1, 2)


def shortcut(maps: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) → (B, channels, H/2, W/2): the pixels of each 2×2 square as channels, averaged to `channels`."""
    # groups of neighbouring channels; unshuffling puts the four pixels of one channel next to each other
    return F.pixel_unshuffle(maps, 2).unflatten(1, (channels, -1)).mean(2)


def add_bias(maps: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) plus (C,), in the maps' dtype."""
    return maps + bias.to(maps.dtype)[:, None, None]


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast gives a convolution's operands; autocast itself knows torch's operators only."""
    kind = x.device.type
    return (
        x if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind) else x.to(torch.get_autocast_dtype(kind))
    )
