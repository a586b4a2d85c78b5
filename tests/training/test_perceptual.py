"""LPIPS and FID with networks whose weights are drawn: those of ImageNet would have to be fetched."""

from __future__ import annotations

import sys
from copy import deepcopy
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from fastle.config import ModelConfig
from fastle.data.images import ArrayImages
from fastle.method.model import Autoencoder
from fastle.training.evaluate import evaluate
from fastle.training.perceptual import NoWeights, Perceptual, TooSmall

SIZE, FEATURES = 32, 64  # of torchmetrics' sizes the smallest: the matrices of 2,048 take seconds
CPU = torch.device("cpu")


class Inception(nn.Module):
    """Takes what torchmetrics' InceptionV3 takes; its features are weighted sums of the bytes."""

    def __init__(self, name: str, features_list: list[str], *_: Any, **__: Any) -> None:
        super().__init__()
        assert features_list == [str(FEATURES)]
        self.weights = torch.randn(3 * SIZE**2, FEATURES, generator=torch.Generator().manual_seed(0)) / 1000

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, SIZE, SIZE)
        return x.flatten(1).float() @ self.weights


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.image.fid
    import torchvision

    torch.manual_seed(0)
    # LPIPS takes the convolutions alone, and the other layers' weights would take a second to draw
    monkeypatch.setattr(nn, "Linear", lambda *_: nn.Identity())
    alexnet = torchvision.models.alexnet(weights=None)
    monkeypatch.undo()
    monkeypatch.setattr("fastle.training.perceptual.FEATURES", FEATURES)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: deepcopy(alexnet))
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Inception)


def pairs(channels: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.rand(6, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x, (x + 0.2 * torch.linspace(0, 1, 6)[:, None, None, None]).clamp(0, 1)


def of_all(xhat: Tensor, x: Tensor, batch: int) -> dict[str, float]:
    judge = Perceptual(SIZE, CPU)
    for start in range(0, len(x), batch):
        judge.update(xhat[start : start + batch], x[start : start + batch])
    return judge.figures()


def test_fid_is_its_formula(networks: None) -> None:
    x, xhat = pairs()
    mean, covariance = [], []
    for images in (x, xhat):
        features = Inception("", [str(FEATURES)])((images * 255).round().byte()).double()
        mean.append(features.mean(0))
        covariance.append(features.T.cov())
    root = torch.linalg.eigvals(covariance[0] @ covariance[1]).real.clamp_min(0).sqrt().sum()
    expected = (mean[0] - mean[1]).square().sum() + covariance[0].trace() + covariance[1].trace() - 2 * root
    assert of_all(xhat, x, 4)["fid"] == pytest.approx(float(expected), rel=1e-3)


def test_lpips_is_a_mean_over_images_and_zero_for_equal_ones(networks: None) -> None:
    x, xhat = pairs()
    each = [of_all(xhat[i : i + 1], x[i : i + 1], 1) for i in range(6)]
    assert of_all(xhat, x, 4)["lpips"] == pytest.approx(sum(figures["lpips"] for figures in each) / 6, rel=1e-4)
    assert each[0]["lpips"] == 0 < each[5]["lpips"]
    # one image has no covariance
    assert "fid" not in each[0]


def test_grey_images_are_judged_as_grey_colours(networks: None) -> None:
    x, xhat = pairs(channels=1)
    assert of_all(xhat, x, 6) == of_all(xhat.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1), 6)


def test_whole_images_and_those_with_a_hole_are_judged_apart(networks: None) -> None:
    model = Autoencoder(ModelConfig(size=SIZE, channels=3, hidden=8, map_channels=8, latent=None))
    images = ArrayImages((255 * pairs()[0]).byte())
    figures = evaluate(model, images, hole_ratio=0.35, device=CPU, perceptual=True)
    assert figures["clean"]["fid"] > 0 and figures["clean"]["fid"] != figures["masked"]["fid"]
    assert figures["clean"]["lpips"] > 0 and figures["clean"]["lpips"] != figures["masked"]["lpips"]


def test_what_cannot_be_judged_is_one_line(networks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def unreachable(weights: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "alexnet", unreachable)
    with pytest.raises(NoWeights, match=r"AlexNet and InceptionV3.*no network.*copy the folder"):
        Perceptual(SIZE, CPU)
    with pytest.raises(TooSmall, match="32 px"):
        Perceptual(24, CPU)
