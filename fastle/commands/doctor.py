"""fastle doctor: what fastle finds on this machine, what it will use and why, and what would be slow."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastle.data.cache import cache_folder, first_existing
from fastle.data.dali import why_no_dali
from fastle.errors import FastleError
from fastle.extras import EXTRAS
from fastle.fitting import pick_mode
from fastle.kernels.impl import choose
from fastle.kernels.sigreg_cpu import available
from fastle.kernels.sigreg_knots import Knots
from fastle.machine import environment, find_device, format_bytes, package_version, why_no_gpu, why_untested
from fastle.training.precision import precision_on

from .cli import Output, wrapped

PACKAGES = ("fastle", "torch", "triton", "torchvision", "nvidia-dali-cuda130", "numpy", "safetensors")
LEAST_FREE = 10**9  # bytes on a disk
NVIDIA = Path("/dev/nvidiactl")  # is there while NVIDIA's driver is loaded


@dataclass
class Diagnosis:
    """What to print: lines by their label, what is slow, and what does not work."""

    lines: dict[str, list[str]] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def run(flags: argparse.Namespace, console: Output) -> None:
    """Prints the diagnosis. Raises FastleError, with a count, if something does not work."""
    diagnosis = Diagnosis()
    device = find_device("auto")
    for look in (_versions, _device, _operators, _images, _steps, _disks, _extras):
        look(diagnosis, device)
    for label, items in diagnosis.lines.items():
        console.say(wrapped(label, items))
    for label, sentences in (("slow", diagnosis.slow), ("broken", diagnosis.broken)):
        for sentence in sentences:
            console.say(wrapped(label, sentence.split(), gap=" "))
    if diagnosis.broken:
        raise FastleError(f"{len(diagnosis.broken)} of what fastle needs does not work here: see the lines above")
    console.say("fastle works here" + ("; what is slow is above" if diagnosis.slow else ""))


def _versions(diagnosis: Diagnosis, device: torch.device) -> None:
    versions = [f"{name} {package_version(name) or 'missing'}" for name in PACKAGES]
    diagnosis.lines["versions"] = [f"python {platform.python_version()}", *versions]


def _device(diagnosis: Diagnosis, device: torch.device) -> None:
    diagnosis.lines["device"] = [str(device), str(environment(device)["device"]), f"{torch.get_num_threads()} threads"]
    if reason := why_untested(device):
        diagnosis.slow.append(reason)
    elif device.type == "cuda":
        return
    elif NVIDIA.exists():
        diagnosis.broken.append(f"there is an NVIDIA driver, and torch cannot use a GPU: {why_no_gpu()}")
    else:
        diagnosis.slow.append(f"everything: it runs on the CPU, because there is no GPU ({why_no_gpu()})")


def _operators(diagnosis: Diagnosis, device: torch.device) -> None:
    with _warned(diagnosis.slow):
        if device.type == "cuda":
            diagnosis.lines["SIGReg"] = [choose("sigreg", "auto", device, None)]
            diagnosis.lines["views"] = [choose("crop_resize", "auto", device, None)]
        elif device.type != "cpu":
            diagnosis.lines["SIGReg"] = diagnosis.lines["views"] = ["torch"]
        else:
            compiled = available(Knots(t_max=3.0, knots=17))
            diagnosis.lines["SIGReg"] = ["C++, compiled for this CPU" if compiled else "torch"]
            diagnosis.lines["views"] = ["torch (Triton's kernels are for GPUs)"]


def _images(diagnosis: Diagnosis, device: torch.device) -> None:
    if importlib.util.find_spec("torchvision") is None:
        diagnosis.broken.append('images cannot be decoded: pip install "fastle[train]"')
        return
    reason = why_no_dali()
    diagnosis.lines["decoder"] = ["DALI", "grey images by torchvision"] if reason is None else ["torchvision"]
    if reason is not None:
        diagnosis.slow.append(f"decoding JPEG, about half as fast without DALI: {reason}")
    if importlib.util.find_spec("pillow_heif") is None:
        diagnosis.lines["decoder"].append('no HEIC (pip install "fastle[heic]")')


def _steps(diagnosis: Diagnosis, device: torch.device) -> None:
    mode = pick_mode("auto", device, 1)
    diagnosis.lines["steps"] = [f"{mode} and {precision_on(device)} by default"]
    if mode == "eager":
        diagnosis.lines["steps"].append("--step compiled is faster in a long run")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        diagnosis.slow.append("steps: --step compiled needs a C++ compiler, and there is none")


def _disks(diagnosis: Diagnosis, device: torch.device) -> None:
    for label, folder in (("cache", cache_folder()), ("runs", Path.cwd())):
        free = shutil.disk_usage(first_existing(folder.absolute())).free
        diagnosis.lines[label] = [str(folder), f"{format_bytes(free)} free"]
        if free < LEAST_FREE:
            diagnosis.broken.append(f"{folder} has {format_bytes(free)} free, too little for a run: make room")


def _extras(diagnosis: Diagnosis, device: torch.device) -> None:
    missing = {extra for package, extra in EXTRAS.items() if importlib.util.find_spec(package) is None}
    names = ",".join(sorted(missing))
    diagnosis.lines["extras"] = [f'missing: pip install "fastle[{names}]"' if missing else "all there"]
    if "train" in missing:
        diagnosis.broken.append('fastle-train needs packages that are missing: pip install "fastle[train]"')


@contextmanager
def _warned(lines: list[str]) -> Iterator[None]:
    """Adds the messages of warnings to the lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lines += [str(warning.message) for warning in caught]
