"""Files that are written: whole, or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastle.files import CannotWrite, write_atomic


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite) as error:
        write_atomic(path, b"after", "give another name")
    fault = f"cannot write {path}: No space left on device; give another name (what was saved before is intact)"
    assert str(error.value) == fault
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
