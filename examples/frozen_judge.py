"""Lets a pretrained network judge in place of the encoder: the comparison that a perceptual loss asks for.

python examples/frozen_judge.py    # fetches torchvision's weights of a ResNet-18
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.resnet import ResNet

import fastle

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(nn.Module):
    """A ResNet's features of images (B, 1 or 3, H, W) in [0, 1], brought to what it was trained with."""

    def __init__(self, net: ResNet, size: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3])
        self.size = size

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.interpolate(images.expand(-1, 3, -1, -1), size=self.size, mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = self.stem((x - mean) / std)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def main(net: ResNet, run: str | Path = "runs/frozen-judge", **settings: Any) -> fastle.Result:
    """Trains on drawn shapes, or goes on where the last call stopped."""
    return fastle.fit("shapes", judge=fastle.frozen(Features(net)), run=run, **settings)


if __name__ == "__main__":
    print(f"{main(resnet18(weights=ResNet18_Weights.DEFAULT)).metrics[-1]['valid_psnr']:.2f} dB")
