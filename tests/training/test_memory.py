"""What a step is estimated to take, and what somebody is told whose batch does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import RunConfig
from fastle.machine import peak_memory
from fastle.presets import make_config
from fastle.training import trainer as trainer_module
from fastle.training.memory import Estimate, OutOfMemory, estimate, out_of_memory, too_large
from fastle.training.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(**flags: Any) -> RunConfig:
    whole = make_config("shapes", **{"steps": 2, "batch_size": 24, "slices": 8, "masked": True} | flags)
    return replace(whole, model=replace(whole.model, hidden=16, map_channels=16))


@pytest.mark.parametrize(
    "flags", [{}, {"masked": False}, {"precision": "bf16"}, {"masked": False, "judge": "ema"}], ids=str
)
def test_estimate_is_what_an_eager_step_takes(flags: dict[str, Any]) -> None:
    step = Trainer(config(**flags), CPU)
    images = torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8, generator=Generator().manual_seed(0))
    step(images)
    step.model.zero_grad()
    weights = 4 * step.model.parameter_count()
    measured = peak_memory(lambda: step(images), CPU) + 3 * weights
    assert estimate(step.config).of(24) == pytest.approx(measured, rel=0.1)


def test_peak_is_the_most_that_is_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(1_000_000)
        kept = torch.ones(500_000)
        torch.ones(250_000)
        del kept

    assert peak_memory(call, CPU) == 4_000_000


def test_batch_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastle.training.memory.estimate", lambda config: Estimate(fixed=1e9, per_image=1e8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3e9, 12e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2e9)
    fault = "a step of 128 images does not fit in memory: it takes about 13.8 GB, by estimate"
    wanted = f"{fault}, and 5.0 GB of 12.0 GB are free; use "
    assert too_large(config(batch_size=128), 128, GPU) == wanted + "--batch-size 35 or less or --precision bf16"
    assert too_large(config(batch_size=128, precision="bf16"), 128, GPU) == wanted + "--batch-size 35 or less"
    # --batch-size is that of all processes
    shared = too_large(config(batch_size=512, precision="bf16"), 128, GPU)
    assert shared == wanted + "--batch-size 140 or less"
    # the estimate says that it fits, which it did not
    assert "--batch-size 10 or less" in too_large(config(batch_size=20), 20, GPU)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9, 12e9))
    assert "use a smaller --size or --precision bf16" in too_large(config(batch_size=128), 128, GPU)


def test_cpu_is_told_less() -> None:
    message = too_large(config(), 24, CPU)
    assert message.startswith("a step of 24 images does not fit in memory: it takes about ")
    assert message.endswith("use a smaller --batch-size or --precision bf16")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:131] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
    ],
)
def test_step_that_does_not_fit_says_what_to_change(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def full(self: Trainer, images: Tensor) -> None:
        raise error

    monkeypatch.setattr(trainer_module.Trainer, "_update", full)
    step = Trainer(config(), CPU)
    with pytest.raises(OutOfMemory, match="use a smaller --batch-size"):
        step(torch.zeros(24, 1, 32, 32, dtype=torch.uint8))
    assert step.done == 0


def test_memory_of_a_cpu_really_runs_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    # the driver's, which PyTorch passes on as it is, and Triton's
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the docs."))
    assert out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not out_of_memory(RuntimeError("another fault"))
