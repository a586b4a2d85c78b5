"""The machine that a process runs on: its devices, its memory, the facts that a measurement depends on, byte counts."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

from fastle.config import ConfigError

# the makers of GPUs by torch's names; "auto" takes the first kind that can be used
GPUS = {"cuda": "NVIDIA or AMD", "xpu": "Intel", "mps": "Apple"}


def find_device(requested: str) -> torch.device:
    """The device that a flag asks for: "auto" takes the first GPU of CUDA or ROCm, XPU and MPS that there is.

    Args:
        requested: "auto", "cpu", "cuda" (ROCm too), "xpu" (Intel) or "mps" (Apple).

    Raises:
        ConfigError: A GPU is requested that PyTorch cannot use.
    """
    kind = next((gpu for gpu in GPUS if _is_usable(gpu)), "cpu") if requested == "auto" else requested
    device = torch.device(kind)
    if device.type != "cpu" and not _is_usable(device.type):
        reason = why_no_gpu() if device.type == "cuda" else f"PyTorch finds no {GPUS[device.type]} GPU"
        raise ConfigError(f"--device {requested} is not available: {reason}; use --device cpu")
    return torch.device(kind, from_torchrun("LOCAL_RANK", 0)) if kind == "cuda" else device


def _is_usable(gpu: str) -> bool:
    if gpu == "mps":
        return torch.backends.mps.is_available()
    return torch.xpu.is_available() if gpu == "xpu" else torch.cuda.is_available()


def pick_device(requested: str, console: Console) -> torch.device:
    """As `find_device`. Prints the device, and what is slow on it or why no GPU can be used."""
    device = find_device(requested)
    if device.type == "cpu":
        console.print(f"device: cpu, {torch.get_num_threads()} threads", highlight=False)
        if requested == "auto":
            console.print(f"no GPU: {why_no_gpu()}", highlight=False, markup=False, soft_wrap=True)
            console.print("a CPU is many times slower than a GPU", highlight=False)
        return device
    console.print(f"device: {device}, {device_name(device)}", highlight=False, markup=False, soft_wrap=True)
    if reason := why_untested(device):
        console.print(reason, highlight=False, soft_wrap=True)
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU; for a CPU, and for Apple's GPUs, which are part of it, the name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else _cpu_name()


def why_untested(device: torch.device) -> str | None:
    """What to expect of a GPU that fastle has no kernels for, or None."""
    if device.type not in ("xpu", "mps"):
        return None
    return f"SIGReg and views run in torch on {device.type}, slower than their kernels on CUDA; nobody has tested it"


def why_no_gpu() -> str:
    """Why PyTorch cannot use a GPU, in words that follow a colon."""
    try:
        torch.cuda.init()
    # a PyTorch that was built without CUDA raises AssertionError, one that finds no driver or no GPU RuntimeError
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].split("\n")[0].strip(" .")
    return "PyTorch finds none"


def is_old(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU from before 2020: it has no bf16, and Triton compiles no kernels for it."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def from_torchrun(name: str, alone: int) -> int:
    """A number that torchrun gives each process (RANK, WORLD_SIZE, LOCAL_RANK), or `alone` without torchrun."""
    return int(os.environ.get(name, str(alone)))


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all its work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("xpu", "mps"):
        torch.accelerator.synchronize(device)


def allocated_memory(device: torch.device) -> int:
    """Bytes of a CUDA GPU that live tensors hold, after garbage was collected; 0 elsewhere, where none are counted."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still allocate, after garbage was collected: of a CUDA GPU, or else of the host."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # outside Linux nothing says it: assume half of what the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak, its results included, beyond what was held before.

    On a GPU PyTorch's caching allocator reports them. On a CPU they are the running sum of the allocations that
    PyTorch's profiler records, compiled code included; it does not see the scratch memory of libraries.
    """
    # the profiler complains about memory that was allocated before it started and is freed while it runs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    quiet_profiler()
    with torch.autograd.profiler.profile(use_device=None, profile_memory=True) as profiler:
        call()
    assert profiler.kineto_results is not None
    allocations = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def quiet_profiler() -> None:
    """Keeps PyTorch's profiler from reporting its starts and stops on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a measurement depends on besides the command: device, driver, versions, threads, commit and date."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "fp32_products": torch.get_float32_matmul_precision(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    # an installed package may lie inside somebody else's repository
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    """What a program prints; None if it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def format_bytes(count: float) -> str:
    """A number of bytes for a message: in megabytes, from 1 GB up in gigabytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
