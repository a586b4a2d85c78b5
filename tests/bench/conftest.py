"""Benchmarks in tests: two rounds a row, no compiler, small matrices and copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from bench import sigreg_bench, views_bench
from bench.common import command
from bench.common.measure import Effort
from fastle.profiling import measure


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(command, "QUICK", Effort(seconds=0, rounds=2))
    monkeypatch.setattr(sigreg_bench, "compiled", lambda function: function)
    monkeypatch.setattr(views_bench, "compiled", lambda function: function)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **flags: None)
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 64, "cuda": 1024})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**31})
    measure.copy_bandwidth.cache_clear()
    measure.matmul_peak.cache_clear()
    yield
    measure.copy_bandwidth.cache_clear()
    measure.matmul_peak.cache_clear()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes, bright and dark."""
    root = tmp_path_factory.mktemp("photographs")
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for name, least in (("bright", 128), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(least, least + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
