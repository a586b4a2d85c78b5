"""Which implementation of an operator runs, and whether somebody traces it."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Impl = Literal["auto", "triton", "torch"]

# there are no wheels of triton for every machine
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(operator: str, impl: str, device: torch.device, unfit: str | None) -> Literal["triton", "torch"]:
    """The implementation for tensors on `device`.

    Args:
        operator: its name, for messages.
        impl: what was asked for.
        unfit: why Triton's kernels cannot take these tensors wherever they are, or None.

    Raises:
        ValueError: an unknown impl, or Triton asked for where it cannot be had.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'{operator}: impl is "auto", "triton" or "torch", not {impl!r}')
    if impl == "torch" or (impl == "auto" and (device.type != "cuda" or unfit)):
        return "torch"
    obstacle = unfit or _obstacle(device)
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f'{operator}: impl="triton" cannot be had: {obstacle}; impl="torch" runs everywhere')
    _say_slow(operator, obstacle)
    return "torch"


@torch.compiler.assume_constant_result
def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton runs on CUDA and ROCm tensors, not on {device} (with TRITON_INTERPRET=1 it is emulated)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, which {torch.cuda.get_device_name(device)} has not"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels are emulated, on tensors of any device."""
    import triton  # where there is one

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _say_slow(operator: str, obstacle: str) -> None:
    warnings.warn(f"{operator} runs in torch on this GPU, slower than its Triton kernels: {obstacle}", stacklevel=2)


def traced(*tensors: Tensor) -> bool:
    """Whether to call the registered operator: where nobody traces, its dispatch takes some 0.2 ms for nothing."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )
