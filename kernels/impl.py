"""Chooses the implementation of an operator, tells whether torch is tracing the call, and makes a device current."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Impl = Literal["auto", "triton", "torch"]
P = ParamSpec("P")
R = TypeVar("R")

# the first release that has all that the kernels use, and the first torch that brings it
MIN_TRITON, WITH_TORCH = (3, 5), "2.9"


def _missing_triton() -> str | None:
    """Why the kernels cannot be compiled on any device, or None."""
    try:
        import triton  # has no wheels for some machines
    except ModuleNotFoundError:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) >= MIN_TRITON:
        return None
    wanted = ".".join(map(str, MIN_TRITON))
    return f"the kernels need Triton {wanted}, which torch {WITH_TORCH} brings, and this is Triton {triton.__version__}"


MISSING_TRITON = _missing_triton()
HAS_TRITON = MISSING_TRITON is None


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compiler.assume_constant_result does, without importing Dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choose(operator: str, impl: str, device: torch.device, obstacle: str | None) -> Literal["triton", "torch"]:
    """The implementation for tensors on `device`.

    Args:
        operator: The operator's name, for messages.
        impl: The caller's choice.
        obstacle: Why Triton's kernels cannot take these tensors on any device, or None.

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


@constant
def _device_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    if MISSING_TRITON:
        return MISSING_TRITON
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton runs on CUDA and ROCm tensors, not on {device} (with TRITON_INTERPRET=1 it is emulated)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter emulates the kernels; it takes tensors on any device."""
    import triton  # not installed everywhere

    return bool(triton.knobs.runtime.interpret)


@constant
def _warn_slow(operator: str, obstacle: str) -> None:
    _warn_once(f"{operator} runs in torch on this GPU, which is slower than its Triton kernels: {obstacle}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current: Triton launches on the current device, wherever the arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def traced(*tensors: Tensor) -> bool:
    """Whether the registered operator must be called: without tracing, its dispatch only costs about 0.2 ms."""
    return (
        torch.compiler.is_compiling()
        or _in_dispatch_mode()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _in_dispatch_mode() -> bool:
    # after a compilation torch 2.4 says so for ever, so its stacks of modes are asked too, the second for make_fx
    return is_in_torch_dispatch_mode() and bool(
        torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch()
    )
