"""Lets the launchers in kernels/ run on CPU tensors as on a GPU: what they launch is compiled to PTX and executed.

    with executed(90) as launched:
        loss = sigreg(z, slices, impl="triton")

A launch is compiled by Triton itself with the arguments that the launcher gave, so that grids, tiles and argument lists
are the real ones, and the tests know none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastle.kernels
from fastle.kernels import impl
from tests.ptx.executor import execute
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Kernel, parse

ROOT = Path(__file__).resolve().parents[2]

marks = [
    pytest.mark.skipif(not impl.HAS_TRITON, reason=str(impl.MISSING_TRITON)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU that is here"),
]
# Ampere and Hopper, for which every kernel is compiled, and an older and a newer GPU
every_arch = pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
other_archs = pytest.mark.parametrize("arch", [75, 100], ids=["sm_75", "sm_100"])


@contextlib.contextmanager
def executed(arch: int) -> Iterator[list[str]]:
    """Kernels run as compiled for sm_`arch`; yields the names of those that were launched so far.

    What a launcher leaves uninitialised for them is filled with NaN.
    """
    launched: list[str] = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "interpreted", lambda: True)
        for module in kernel_modules():
            for name, kernel in kernels_of(module).items():
                patch.setattr(module, name, _Launched(kernel, arch, launched))
        torch.use_deterministic_algorithms(True)
        try:
            yield launched
        finally:
            torch.use_deterministic_algorithms(deterministic)


def kernel_modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(fastle.kernels.__path__)]
    return [importlib.import_module(f"fastle.kernels.{name}") for name in names if name.endswith("_triton")]


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """What is launched, not what kernels call."""
    return {
        name: value for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


class _Launched:
    """Stands in for a Triton kernel: `kernel[grid](…)` executes it."""

    def __init__(self, kernel: Any, arch: int, launched: list[str]) -> None:
        self._kernel, self._arch, self._launched = kernel, arch, launched

    def __getitem__(self, grid: Sequence[int]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *arguments: Any, **named: Any) -> None:
        values = dict(zip(self._kernel.arg_names, arguments, strict=False)) | named
        function = self._kernel.fn
        request = {"module": function.__module__, "name": function.__name__, "arch": self._arch}
        answer, kernel = _compiled(json.dumps(request | {"arguments": {k: _described(v) for k, v in values.items()}}))
        memory = GlobalMemory()
        passed = [values[name] for name in answer["passed"]]
        numbers = [memory.place(value) if isinstance(value, Tensor) else value for value in passed]
        execute(kernel, memory, grid=grid, threads=answer["threads"], shared=answer["shared"], arguments=numbers)
        self._launched.append(function.__name__)


def _described(value: Any) -> Any:
    """A tensor as far as the compiler looks at it."""
    if not isinstance(value, Tensor):
        return value
    return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}


@functools.cache
def _compiled(request: str) -> tuple[dict[str, Any], Kernel]:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(request + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    assert line, f"the compiler's process has ended with {server.wait()}"
    answer: dict[str, Any] = json.loads(line)
    assert "error" not in answer, answer["error"]
    return answer, parse(answer["ptx"])


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # lines of the source only make the PTX longer
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.ptx.compile_server"],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    # it ends when its input does
    atexit.register(server.communicate)
    return server
