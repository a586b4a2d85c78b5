"""Chooses the implementation of an operator, and tells whether torch is tracing the call."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Impl = Literal["auto", "triton", "torch"]

# triton has no wheels for some machines
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(operator: str, impl: str, device: torch.device, obstacle: str | None) -> Literal["triton", "torch"]:
    """The implementation for tensors on `device`.

    Args:
        operator: the operator's name, for messages.
        impl: the caller's choice.
        obstacle: why Triton's kernels cannot take these tensors on any device, or None.

    Raises:
        ValueError: `impl` is unknown, or it is "triton" and Triton cannot run here.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'{operator}: impl is "auto", "triton" or "torch", not {impl!r}')
    if impl == "torch" or (impl == "auto" and (device.type != "cuda" or obstacle)):
        return "torch"
    obstacle = obstacle or _device_obstacle(device)
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f'{operator}: impl="triton" cannot run here: {obstacle}; impl="torch" runs everywhere')
    _warn_slow(operator, obstacle)
    return "torch"


def _device_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton runs on CUDA and ROCm tensors, not on {device} (with TRITON_INTERPRET=1 it is emulated)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


# what torch.compiler.assume_constant_result does, without importing Dynamo, which takes seconds
_device_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter emulates the kernels; it takes tensors on any device."""
    import triton  # not installed everywhere

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _warn_slow(operator: str, obstacle: str) -> None:
    warnings.warn(
        f"{operator} runs in torch on this GPU, which is slower than its Triton kernels: {obstacle}", stacklevel=2
    )


def traced(*tensors: Tensor) -> bool:
    """Whether the registered operator must be called: without tracing, its dispatch only costs about 0.2 ms."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )
