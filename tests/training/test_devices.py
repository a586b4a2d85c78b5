"""GPUs that are not there: which one is found, what is said of it, and that nothing makes fp64 on it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastle.config import ConfigError
from fastle.fitting import pick_mode, process_group
from fastle.machine import find_device, pick_device
from fastle.presets import make_config
from fastle.training import trainer
from fastle.training.optimizer import Muon
from fastle.training.precision import precision_on

META = torch.device("meta")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of GPUs that PyTorch finds; none at first."""
    found: set[str] = set()
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in found)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Arc B580")
    return found


def test_auto_takes_cuda_then_xpu_then_mps(gpus: set[str]) -> None:
    assert find_device("auto").type == "cpu"
    for kind in ("mps", "xpu", "cuda"):
        with pytest.raises(ConfigError, match=f"--device {kind} is not available: .+; use --device cpu"):
            find_device(kind)
        gpus.add(kind)
        assert find_device("auto").type == find_device(kind).type == kind
    assert find_device("cpu").type == "cpu" and find_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_gpu_without_kernels_says_so_and_takes_the_plain_ways(gpus: set[str], kind: str) -> None:
    gpus.add(kind)
    console = Console(record=True, quiet=True, width=200)
    with console.capture() as said:
        console.quiet = False
        device = pick_device("auto", console)
    first, second = said.get().splitlines()
    assert first.startswith(f"device: {kind}, ") and (kind == "mps" or "Arc B580" in first)
    assert second.startswith(f"SIGReg and views run in torch on {kind}")
    assert (precision_on(device), pick_mode("auto", device, 1)) == ("fp32", "eager")
    assert trainer._why_no_capture(device, 1) == f"a {kind} device has no CUDA graphs"
    with pytest.raises(ConfigError, match=f"not on {kind}: start one"), process_group(device, 2):
        pass


class WithoutDouble(TorchDispatchMode):
    """Refuses fp64 on META, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device == META and value.dtype == torch.float64:
                raise TypeError(f"{func} makes fp64")
        return result


class MetaGenerator(Generator):
    device = META


@pytest.mark.parametrize("latent", [None, 16], ids=["spatial", "pooled"])
def test_a_step_makes_no_fp64_on_a_gpu(monkeypatch: pytest.MonkeyPatch, latent: int | None) -> None:
    def muon(model: nn.Module, *_: object) -> Muon:
        # a fused AdamW knows no such device
        return Muon(torch.optim.AdamW(model.parameters()), [weight for weight in model.parameters() if weight.ndim > 1])

    monkeypatch.setattr(trainer, "make_optimizer", muon)
    monkeypatch.setattr(trainer, "Generator", lambda device: MetaGenerator())
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    config = make_config(
        "shapes", size=16, hidden=4, batch_size=4, steps=5, masked=latent is not None, latent=latent, clip=0.1,
        averages=(0.05,), crop_ratio_max=0.9,
    )  # fmt: skip
    with WithoutDouble():
        losses = trainer.Trainer(config, META)(torch.zeros(4, 1, 16, 16, dtype=torch.uint8, device=META))
    assert losses.total.device == META
