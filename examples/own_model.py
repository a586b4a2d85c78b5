"""Trains an encoder and a decoder of one's own: here a ResNet of torchvision, in ten lines.

python examples/own_model.py
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastle


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to features, from shallow to deep; the last, (B, 32, H/8, W/8), is the code."""

    def __init__(self) -> None:
        super().__init__()
        # the judge's views would spoil the statistics of a BatchNorm
        net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 8))
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3])
        self.code = nn.Conv2d(256, 32, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [self.stem(2 * images - 1)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return [*features[2:], self.code(features[-1])]


class Decoder(nn.Sequential):
    """Latents (B, 32, h, w) to images (B, 3, 8 h, 8 w) in [0, 1]."""

    def __init__(self) -> None:
        widths = (32, 128, 64, 32)
        stages: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            stages += [nn.Conv2d(inside, 4 * outside, 3, padding=1), nn.PixelShuffle(2), nn.SiLU()]
        super().__init__(*stages, nn.Conv2d(widths[-1], 3, 3, padding=1), nn.Sigmoid())


def main(images: Tensor, run: str | Path = "runs/own-model", **settings: Any) -> fastle.Result:
    """Trains on images (N, 3, H, W), or goes on where the last call stopped."""
    torch.manual_seed(0)
    return fastle.fit(data=images, model=(Encoder(), Decoder()), run=run, **({"steps": 400, "lr": 1e-3} | settings))


if __name__ == "__main__":
    photographs = torch.nn.functional.interpolate(torch.rand(2000, 3, 4, 4), size=32, mode="bicubic").clamp(0, 1)
    result = main(photographs)
    print(f"latents {tuple(result.model.encode(photographs[:8]).shape)}, {result.metrics[-1]['valid_psnr']:.2f} dB")
    # elsewhere, the modules are given again
    again = fastle.Autoencoder.from_pretrained(result.run, model=(Encoder(), Decoder()))
    print(fastle.evaluate(again, photographs[:100])["clean"])
