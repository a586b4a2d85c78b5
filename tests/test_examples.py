"""The programs in examples/ run, at toy size."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastle
import fastle.training.loop
from examples import frozen_judge, own_dataset, own_model, own_transformation, sigreg_in_lejepa
from fastle.training.run import RunDirectory

TOY: dict[str, Any] = {"steps": 1, "batch_size": 4, "slices": 8, "device": "cpu"}
SMALL: dict[str, Any] = {"hidden": 8, "map_channels": 8}


@pytest.fixture(autouse=True)
def small_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)


def test_own_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = own_dataset.main(tmp_path, **TOY, **SMALL)
    assert result.metrics[-1]["step"] == 1 and "step 1: " in capsys.readouterr().out


def test_own_model(tmp_path: Path) -> None:
    result = own_model.main(torch.rand(8, 3, 16, 16), tmp_path, **TOY)
    assert result.model.encode(torch.rand(2, 3, 16, 16)).shape == (2, 32, 2, 2)


def test_own_transformation(tmp_path: Path) -> None:
    result = own_transformation.main(tmp_path, **TOY, **SMALL)
    assert result.metrics[-1]["full_view"] > 0
    # turned by nothing, an image is itself
    image, turned = torch.rand(1, 1, 8, 8), own_transformation.Turned(degrees=0)
    ((same,),) = turned.views([image], (torch.zeros(1), torch.ones(1)))
    torch.testing.assert_close(same, image)


def test_frozen_judge(tmp_path: Path) -> None:
    net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 8))
    assert frozen_judge.main(net, tmp_path, **TOY, **SMALL).metrics[-1]["agreement"] > 0


def test_a_network_of_timm_judges_as_it_is(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    # a ConvNeXt of 0.3 million parameters; the weights are random
    net = timm.create_model("test_convnext", features_only=True, in_chans=1)
    result = fastle.fit("shapes", judge=fastle.frozen(net), run=tmp_path, **TOY, **SMALL)
    assert result.metrics[-1]["agreement"] > 0


def test_sigreg_in_lejepa() -> None:
    losses = sigreg_in_lejepa.main(steps=30, batch_size=32)
    assert losses[-1] < 0.8 * losses[0]


def test_sigreg_in_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from examples import sigreg_in_lightning

    module = sigreg_in_lightning.main(
        images=256, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    assert math.isfinite(module.trainer.callback_metrics["loss"])
    # which slices come next is in the checkpoint
    assert any(name.startswith("regularizer.") for name in module.state_dict())
