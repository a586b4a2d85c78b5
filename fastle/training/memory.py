"""The memory of a step, estimated from measurements on a CPU, for the error about a batch that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator

from fastle.config import ModelConfig, RunConfig
from fastle.errors import FastleError
from fastle.machine import format_bytes, free_memory, peak_memory
from fastle.method.model import Autoencoder
from fastle.method.objective import make_objective

MEASURED = (2, 4)  # images: the two batches from which the estimate is made
FILLED = 0.9  # share of the free memory that an advised batch takes


class OutOfMemory(FastleError):
    """The model or the batch is too large for the device."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a step takes: a fixed part, and a part for each image of the batch."""

    fixed: float
    per_image: float

    def of(self, batch: int) -> float:
        """Bytes of a step on `batch` images."""
        return self.fixed + batch * self.per_image


def check_fits(config: ModelConfig, device: torch.device) -> None:
    """Checks that a model with its gradients and moments fits in memory, before it is made.

    Raises:
        OutOfMemory: It is larger than the memory that is free.
    """
    # built without memory: only its shapes are asked for
    with torch.device("meta"):
        weights = Autoencoder(config).parameter_count()
    # 4 bytes each for the weight, its gradient and two moments; Muon has one, and makes its directions in as much
    needed = 16 * weights
    free = free_memory(device)
    if needed > free:
        raise OutOfMemory(
            f"the model's {weights:,} weights, with gradients and moments, take {format_bytes(needed)}, and "
            f"{format_bytes(free)} are free; give a smaller {'--hidden' if config.latent is None else '--latent'}"
        )


def estimate(config: RunConfig) -> Estimate:
    """The memory of an eager step: measured on the CPU with a few images, plus weights and moments."""
    model = Autoencoder(config.model)
    objective = make_objective(model, config.objective)

    def loss(batch: int) -> None:
        images = torch.zeros(batch, config.model.channels, *config.model.sides, dtype=torch.uint8)
        draws = objective.draw(images.shape, shared=Generator(), local=Generator())
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            total = objective(images, draws).total
        total.backward()
        model.zero_grad()

    cpu = torch.device("cpu")
    low, high = (peak_memory(partial(loss, batch), cpu) for batch in MEASURED)
    per_image = (high - low) / (MEASURED[1] - MEASURED[0])
    weights = 4 * model.parameter_count()
    return Estimate(fixed=low - MEASURED[0] * per_image + 3 * weights, per_image=per_image)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out.

    PyTorch has an exception of its own for its CUDA allocator only. A driver that loads a kernel, Triton, the handle of
    a library and a CPU run out of memory with other errors.
    """
    said = (
        " error: out of memory",
        "]: out of memory",
        "_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def too_large(config: RunConfig, images: int, device: torch.device) -> str:
    """The message about a step that did not fit: its estimated size, and which flags to change.

    Args:
        config: The run's configuration.
        images: The batch of this process, a part of `--batch-size` under torchrun.
        device: The device whose memory is too small.
    """
    if config.model.own is not None:
        return f"a step of {images} images does not fit in memory; use a smaller --batch-size"
    size, processes = estimate(config), max(1, config.train.batch_size // images)
    takes = f"it takes about {format_bytes(size.of(images))}, by estimate"
    fault = f"a step of {images} images does not fit in memory: {takes}"
    ways = [] if config.train.precision == "bf16" else ["--precision bf16"]
    if device.type != "cuda":
        return f"{fault}; use a smaller --batch-size" + "".join(f" or {way}" for way in ways)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    fits = int((FILLED * free - size.fixed) / size.per_image)
    if fits >= images:
        # the estimate is too low: advise half the batch
        fits = images // 2
    ways = ["a smaller --size" if fits < 2 else f"--batch-size {fits * processes} or less", *ways]
    return f"{fault}, and {format_bytes(free)} of {format_bytes(total)} are free; use {' or '.join(ways)}"
