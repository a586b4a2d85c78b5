"""Compiles Triton kernels to PTX for GPUs that need not be there, as a launch with the given arguments would.

    python -m tests.ptx.compile_server

A request is a line of JSON on stdin: the kernel's `module` and `name`, the `arch` (80 for sm_80) and the `arguments` of
the launch by name, with its options. A tensor among them is {"dtype": "float32", "aligned": true}. The answer is a line
on stdout: the `ptx`, how many bytes of `shared` memory and how many `threads` a CTA has, and which arguments are
`passed` to it at run time, by name.

The compiler has a process of its own because the tests' process may have imported Triton to interpret kernels, which
then cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

WARP = 32


class Target:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self) -> None:
        self.arch = 80

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by the device
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0


class Pointer:
    """What Triton looks at in a tensor: its dtype, and whether its address is a multiple of 16."""

    def __init__(self, dtype: str, aligned: bool) -> None:
        self.dtype = getattr(torch, dtype)
        self.address = 0 if aligned else self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.address


def argument(value: Any) -> Any:
    return Pointer(**value) if isinstance(value, dict) else value


def compiled(module: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    kernel = getattr(importlib.import_module(module), name)
    found = kernel.warmup(grid=(1,), **{key: argument(value) for key, value in arguments.items()})
    return {
        "ptx": found.asm["ptx"],
        "shared": found.metadata.shared,
        "threads": WARP * found.metadata.num_warps,
        "passed": [key for key, kind in found.src.signature.items() if kind != "constexpr"],
    }


def main() -> None:
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    target = Target()
    driver.set_active(target)
    for line in sys.stdin:
        request = json.loads(line)
        target.arch = request.pop("arch")
        try:
            answer = compiled(**request)
        except (triton.TritonError, RuntimeError, TypeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
