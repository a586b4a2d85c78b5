"""Tiny runs in this process."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.config import RunConfig
from fastle.presets import make_config
from fastle.training.loop import Execution, train

CPU = torch.device("cpu")
STEPS = 12


def config(**flags: Any) -> RunConfig:
    slices = {} if flags.get("objective") == "pixel" else {"slices": 8}
    whole = make_config(
        "shapes", **{"recipe": "post", "steps": STEPS, "batch_size": 4, "precision": "fp32"} | slices | flags
    )
    model = replace(whole.model, size=16, hidden=8, map_channels=8)
    return replace(whole, model=model, data=replace(whole.data, size=16))


def go(run: Path, run_config: RunConfig | None = None, *, world_size: int = 1, **more: Any) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    execution = Execution(device=CPU, world_size=world_size)
    train(config() if run_config is None else run_config, run, execution, console=console, **more)
    return output.getvalue()


def weights(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(latest_checkpoint(run)).tensors


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def small_folder(root: Path, count: int) -> Callable[..., RunConfig]:
    """Writes splits of small photographs, `count` of them to train; returns what makes configurations of them."""
    for split, number in (("train", count), ("valid", 4), ("test", 4)):
        (root / split).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (20, 24), (i, 255 - i, 90)).save(root / split / f"{i:03d}.png")

    def make(**flags: Any) -> RunConfig:
        whole = make_config("folder", recipe="post", data=root, size=16, batch_size=4, slices=8, **flags)
        return replace(whole, model=replace(whole.model, hidden=8, map_channels=8))

    return make
