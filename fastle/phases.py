"""The named phases of a training step. The code that computes a phase marks it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

# in the order of a step; "step" holds whatever is in no other phase
PHASES = (
    "data wait", "draws", "encode", "decode", "views", "judge", "SIGReg", "loss", "backward", "optimizer", "replay",
    "step", "device wait",
)  # fmt: skip


def phase(name: str) -> AbstractContextManager[object]:
    """A context that names its operations in a profile. Without a profiler, or in compiled code, it costs nothing."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return record_function(name)
