"""What a run computes in, where nobody says."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from fastle.checkpoint import has_checkpoint, read_run_config
from fastle.config import Precision, RunConfig
from fastle.errors import FastleError
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
    # whoever opens the run says what is wrong with it
    with contextlib.suppress(FastleError):
        if kept is not None and has_checkpoint(kept):
            chosen = read_run_config(kept).train.precision
    return replace(config, train=replace(config.train, precision=chosen))
