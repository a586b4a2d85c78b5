"""Enough of a CUDA device mocked for torch.compile to generate code for it where there is none. Nothing is run on it.

Dynamo, AOTAutograd and Inductor ask a device for its properties and cuDNN for the layout of its results. They are
answered here, for an H100, in the whole process and for good: call `mock_cuda` only where nothing else is done.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface
import torch.amp.autocast_mode
import torch.cuda.amp.common
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    gcnArchName="sm_90",
    multi_processor_count=132,
    total_memory=85 * 10**9,
    L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    is_integrated=0,
    uuid="mocked",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def mock_cuda() -> None:
    """Makes this process believe in one H100."""
    answers: dict[str, Any] = {
        "get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY,
        "get_device_name": PROPERTIES.name,
        "current_device": 0,
        "device_count": 1,
        "is_bf16_supported": True,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    interface = torch._dynamo.device_interface.CudaInterface
    answers_to_dynamo = answers | {
        "is_available": True,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "synchronize": None,
    }
    for name, value in answers_to_dynamo.items():
        setattr(interface, name, staticmethod(_always(value)))
    for name in ("get_device_properties", "current_device"):
        setattr(interface.Worker, name, staticmethod(_always(answers[name])))
    triton.runtime.driver.set_active(Driver())
    # autocast switches itself off where it finds no GPU
    for module in (torch.amp.autocast_mode, torch.cuda.amp.common):
        module.amp_definitely_not_available = _always(False)  # type: ignore[attr-defined]
    torch._C._select_conv_backend = _always(torch._C._ConvBackend.Cudnn)  # type: ignore[attr-defined]
    torch._C._conv_determine_backend_memory_format = _cudnn_layout  # type: ignore[assignment]


def _always(value: Any) -> Any:
    return lambda *_, **__: value


def _cudnn_layout(images: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Of a convolution's result: channels-last as soon as one operand is (cudnn_conv_suggest_memory_format)."""
    formats = [torch._prims_common.suggest_memory_format(operand) for operand in (images, weight)]
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format
