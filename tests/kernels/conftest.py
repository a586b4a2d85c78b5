"""Where kernels.sigreg is tested, and in what tiles."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.sigreg_cases import INTERPRETED


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def larger_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter a tile takes a tenth of a second whatever its size: larger and fewer ones, but not one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    # one or two samples are one tile anyway, and much padding would cost figures that are asked for there
    if INTERPRETED and parameters.get("impl") == "triton":
        kernels = pytest.importorskip("fastle.kernels.sigreg_triton")
        sizes = {"BM": 128, "FINISH_BM": 128} | ({"BN": 64} if parameters.get("n", 65) > 2 else {})
        for name, size in sizes.items():
            monkeypatch.setattr(kernels, name, size)
