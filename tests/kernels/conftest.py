"""What makes Triton's interpreter faster: no checks of what compiled kernels do not check, and larger tiles."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from fastle.kernels.impl import HAS_TRITON, MISSING_TRITON
from tests.kernels.sigreg_cases import INTERPRETED

if INTERPRETED and HAS_TRITON:
    from triton.runtime.interpreter import interpreter_builder

    # every sum and product of integers would be done again in 64 bits, for half of the time. one that overflows is
    # as wrong in the interpreter as on a GPU, and the tests compare results
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


@pytest.fixture
def larger_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a tenth of a second for a tile of any size: larger and fewer tiles, but more than one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("impl") == "triton" and MISSING_TRITON:
        pytest.skip(MISSING_TRITON)
    # one or two samples are one tile in any case, and padding them would cost precision
    if INTERPRETED and parameters.get("impl") == "triton":
        kernels, launch = (importlib.import_module(f"fastle.kernels.sigreg_{name}") for name in ("triton", "launch"))
        if parameters.get("n", 65) > 2:
            monkeypatch.setattr(launch, "BN", 64)
            for module in (kernels, launch):
                monkeypatch.setattr(module, "CHUNK", 64)
