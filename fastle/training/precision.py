"""The arithmetic of a step: resolves `--precision auto`, and lets GPUs multiply in TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastle.checkpoint import has_checkpoint, read_run_config
from fastle.config import Precision, RunConfig
from fastle.errors import FastleError
from fastle.kernels.products import fp32_products
from fastle.machine import is_old


def precision_on(device: torch.device) -> Precision:
    """What "auto" stands for on a device in a new run."""
    return "bf16" if device.type == "cuda" and not is_old(device) else "fp32"


def with_precision(config: RunConfig, device: torch.device, kept: Path | None = None) -> RunConfig:
    """The configuration with a precision in place of "auto".

    Args:
        config: Unchanged if it names a precision.
        device: bf16 is for GPUs that have it; a CPU may emulate it, and is slower with it.
        kept: The directory of a run that is to go on. If it has a checkpoint, its precision is kept.
    """
    if config.train.precision != "auto":
        return config
    chosen = precision_on(device)
    # what is wrong with the run is reported when it is opened
    with contextlib.suppress(FastleError):
        if kept is not None and has_checkpoint(kept):
            chosen = read_run_config(kept).train.precision
    return replace(config, train=replace(config.train, precision=chosen))


def takes_tf32(device: torch.device, precision: Precision) -> bool:
    """Whether a step in fp32 multiplies in TF32: on GPUs that have it, unless cuDNN may not (`allow_tf32`)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return precision == "fp32" and nvidia and not is_old(device) and torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def fast_arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Lets a step be fast on a CUDA GPU. The settings hold for the whole process, and are restored afterwards.

    cuDNN measures its algorithms, since shapes never change, and the fp32 products outside SIGReg take TF32.
    """
    if device.type != "cuda":
        yield
        return
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    raised = takes_tf32(device, precision) and fp32_products() == "highest"
    if raised:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if raised:
            torch.set_float32_matmul_precision("highest")
