"""Compiles sigreg_cpu.cpp for this machine, which takes a second, and calls it.

The library stays in $XDG_CACHE_HOME/fastle/kernels, or ~/.cache/fastle/kernels, under a name that depends on the
source, the compiler and the processor. Where that folder cannot be written to, each process compiles its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .sigreg_knots import Knots

SOURCE = Path(__file__).with_name("sigreg_cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# what makes it fast; the first that the compiler takes
MACHINE_FLAGS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], ["-mcpu=native"], []]
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Uncompiled(Exception):
    """Why there is no library, in one line."""


def available(knots: Knots) -> bool:
    """Whether the kernels run here for these knots. If not, one warning has said why."""
    return _library(knots.blocks, knots.reach) is not None


def sums(
    p: Tensor, weights: Tensor | None, expected: Tensor, step: float, knots: Knots
) -> tuple[Tensor, Tensor, Tensor]:
    """Sine and cosine of step·P, and the sums over C of the basis minus its expectation.

    Args:
        p: (M, Q, C), contiguous fp32 on the CPU, as all tensors here.
        weights: (Q, C).
        expected: (F,).

    Returns:
        Sine and cosine, as p, and fp64 sums (M, Q, F).
    """
    sine, cosine = torch.empty_like(p), torch.empty_like(p)
    results = p.new_empty(*p.shape[:2], len(expected), dtype=torch.float64)
    _loaded(knots).sigreg_sums(
        p.data_ptr(), _pointer(weights), expected.data_ptr(), step, p.shape[0] * p.shape[1], *p.shape[1:],
        torch.get_num_threads(), sine.data_ptr(), cosine.data_ptr(), results.data_ptr(),
    )  # fmt: skip
    return sine, cosine, results


def gradient(sine: Tensor, cosine: Tensor, factors: Tensor, weights: Tensor | None, knots: Knots) -> Tensor:
    """The combination of the basis with these factors, times the weights: (M, Q, C).

    Args:
        sine, cosine: Those of `sums`.
        factors: (M, Q, F), contiguous.
        weights: (Q, C).
    """
    result = torch.empty_like(sine)
    _loaded(knots).sigreg_gradient(
        sine.data_ptr(), cosine.data_ptr(), factors.data_ptr(), _pointer(weights), sine.shape[0] * sine.shape[1],
        *sine.shape[1:], torch.get_num_threads(), result.data_ptr(),
    )  # fmt: skip
    return result


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loaded(knots: Knots) -> ctypes.CDLL:
    library = _library(knots.blocks, knots.reach)
    assert library is not None
    return library


@functools.cache
def _library(blocks: int, reach: int) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_built(blocks, reach)))
    except (_Uncompiled, OSError) as error:
        _warn_slow("uncompiled", f"{error}. It needs GCC or Clang; CXX=/path/to/c++ names one")
        return None
    if not library.sigreg_has_threads() and torch.get_num_threads() > 1:
        _warn_slow("on one thread", "the compiler has no OpenMP")
    library.sigreg_sums.argtypes = [*[POINTER] * 3, REAL, *[INTEGER] * 3, ctypes.c_int, *[POINTER] * 3]
    library.sigreg_gradient.argtypes = [*[POINTER] * 4, *[INTEGER] * 3, ctypes.c_int, POINTER]
    library.sigreg_sums.restype = library.sigreg_gradient.restype = None
    return library


def _built(blocks: int, reach: int) -> Path:
    """The library's path; it is compiled if no earlier process has.

    Raises:
        _Uncompiled: There is no compiler, or it fails.
    """
    compiler = _compiler()
    flags = [*FLAGS, f"-DBLOCKS={blocks}", f"-DREACH={reach}"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    identity = [SOURCE.read_text(encoding="utf-8"), *compiler, version, *flags, str(MACHINE_FLAGS), _processor()]
    name = f"sigreg-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastle" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            return folder / name
        # processes that compile at the same time do not see each other's
        built = Path(tempfile.mkdtemp(dir=folder)) / name
    except (OSError, RuntimeError):  # no room, no right, no home
        return _compile(compiler, flags, Path(tempfile.mkdtemp()) / name)
    try:
        return _compile(compiler, flags, built).replace(folder / name)
    finally:
        shutil.rmtree(built.parent)


def _compile(compiler: list[str], flags: list[str], to: Path) -> Path:
    for machine in MACHINE_FLAGS:
        command = [*compiler, *flags, *machine, str(SOURCE), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return to
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise _Uncompiled(f"{compiler[0]} failed: {lines[0] if lines else f'status {done.returncode}'}")


def _compiler() -> list[str]:
    """The command that CXX names, or the first usual one that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise _Uncompiled(f"there is no {named[0] if named else 'c++, g++ or clang++'}")


def _processor() -> str:
    """What the compiler may use of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{sys.platform} {platform.machine()} {platform.processor()}"


@functools.cache
def _warn_slow(how: str, reason: str) -> None:
    warnings.warn(f"SIGReg runs {how} on this CPU, which is several times slower: {reason}", stacklevel=2)
