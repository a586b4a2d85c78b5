"""The machine that a process runs on: its devices, its memory, and sizes in words."""

from __future__ import annotations

import os

import torch
from rich.console import Console

from fastle.config import ConfigError


def pick_device(requested: str, console: Console) -> torch.device:
    """The device that --device asks for. Prints which it is, and why it is a CPU if nobody asked for one.

    Args:
        requested: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: "cuda" was asked for, and PyTorch finds no usable GPU.
    """
    reason = None if torch.cuda.is_available() else _why_no_gpu()
    if requested == "cuda" and reason:
        raise ConfigError(f"--device cuda is not available: {reason}; use --device cpu")
    if requested == "cpu" or reason:
        console.print(f"device: cpu, {torch.get_num_threads()} threads", highlight=False)
        if requested == "auto":
            console.print(f"no GPU: {reason}", highlight=False, markup=False, soft_wrap=True)
            console.print("training on a CPU is many times slower than on a GPU", highlight=False)
        return torch.device("cpu")
    device = torch.device("cuda", from_torchrun("LOCAL_RANK", 0))
    console.print(f"device: {device}, {torch.cuda.get_device_name(device)}", highlight=False)
    return device


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].split("\n")[0].strip(" .")
    return "PyTorch finds none"


def from_torchrun(name: str, alone: int) -> int:
    """A number that torchrun gives each process (RANK, WORLD_SIZE, LOCAL_RANK), or `alone` without torchrun."""
    return int(os.environ.get(name, str(alone)))


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_bytes(count: float) -> str:
    """For a message: megabytes, gigabytes from one up."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
