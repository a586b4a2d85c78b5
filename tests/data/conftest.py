"""What the tests of the data share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastle.data.decode import DiskFile
from tests.data.caches import MANY, write_splits


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes, str], DiskFile]:
    """write(data, name) puts a file into a folder of the test."""

    def write(data: bytes, name: str) -> DiskFile:
        (tmp_path / name).write_bytes(data)
        return DiskFile(str(tmp_path / name))

    return write


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("many"), MANY)
