"""Benchmarks in tests: two rounds a row, no compiler, small matrices and copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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
