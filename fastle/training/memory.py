"""The memory of a step: measured on a CPU, and estimated from that for a batch that does not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator

from fastle.config import RunConfig
from fastle.errors import FastleError
from fastle.machine import format_bytes
from fastle.method.model import Autoencoder
from fastle.method.objective import make_objective

MEASURED = (2, 4)  # images
SPARE = 0.9  # of the free memory that an advised batch fills


class OutOfMemory(FastleError):
    """The batch is too large for the device."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a step: so many at any batch, and so many for each image."""

    fixed: float
    per_image: float

    def of(self, batch: int) -> float:
        """Bytes with so many images."""
        return self.fixed + batch * self.per_image


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator has given out on the CPU at the peak of a call, less what was there before.

    Scratch memory of libraries does not count.
    """
    # the profiler sees the end of what began in it only, and complains of the rest
    gc.collect()
    with torch.autograd.profiler.profile(use_device=None, profile_memory=True) as profiler:
        call()
    assert profiler.kineto_results is not None
    allocations = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def estimate(config: RunConfig) -> Estimate:
    """The memory of an eager step: measured on the CPU over a few images, weights and moments added."""
    model = Autoencoder(config.model)
    objective = make_objective(model, config.objective)

    def loss(batch: int) -> None:
        images = torch.zeros(batch, config.model.channels, config.model.size, config.model.size, dtype=torch.uint8)
        draws = objective.draw(images.shape, shared=Generator(), local=Generator())
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            total = objective(images, draws).total
        total.backward()
        model.zero_grad()

    low, high = (peak_allocated(lambda batch=batch: loss(batch)) for batch in MEASURED)  # type: ignore[misc]
    per_image = (high - low) / (MEASURED[1] - MEASURED[0])
    weights = 4 * model.parameter_count()
    return Estimate(fixed=low - MEASURED[0] * per_image + 3 * weights, per_image=per_image)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what an error says; on a CPU it has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def too_large(config: RunConfig, images: int, device: torch.device) -> str:
    """What to tell whoever asked for a step that did not fit: its estimated size, and what to change.

    Args:
        config: of the run.
        images: of this process.
        device: that is too small.
    """
    size, processes = estimate(config), max(1, config.train.batch_size // images)
    takes = f"it takes about {format_bytes(size.of(images))}, by estimate"
    fault = f"a step of {images} images does not fit in memory: {takes}"
    ways = [] if config.train.precision == "bf16" else ["--precision bf16"]
    if device.type != "cuda":
        return f"{fault}; use a smaller --batch-size" + "".join(f" or {way}" for way in ways)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    fits = int((SPARE * free - size.fixed) / size.per_image)
    if fits >= images:
        # the estimate is short: half is sure to be another batch
        fits = images // 2
    ways = ["a smaller --size" if fits < 2 else f"--batch-size {fits * processes} or less", *ways]
    return f"{fault}, and {format_bytes(free)} of {format_bytes(total)} are free; use {' or '.join(ways)}"
