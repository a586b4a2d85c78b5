"""The named phases of a step, marked where they are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

# in the order of a step; "step" is what is in no other phase
PHASES = (
    "data wait", "draws", "encode", "decode", "views", "judge", "SIGReg", "loss", "backward", "optimizer", "replay",
    "step", "device wait",
)  # fmt: skip


def phase(name: str) -> AbstractContextManager[object]:
    """Names what happens in it, in a profile. Without one it costs nothing, and a compiled graph does not see it."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return record_function(name)
