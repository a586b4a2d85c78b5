"""Larger tiles for kernels.sigreg in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.sigreg_cases import INTERPRETED


@pytest.fixture
def larger_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a tenth of a second for a tile of any size: larger and fewer tiles, but more than one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    # one or two samples are one tile in any case, and padding them would cost precision
    if INTERPRETED and parameters.get("impl") == "triton":
        kernels = pytest.importorskip("fastle.kernels.sigreg_triton")
        sizes = {"CHUNK": 64, "BN": 64} if parameters.get("n", 65) > 2 else {}
        for name, size in sizes.items():
            monkeypatch.setattr(kernels, name, size)
