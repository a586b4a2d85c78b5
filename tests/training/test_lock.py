"""The lock of a run directory: one holder, named to the others, and none once the holder is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import pytest

from fastle.training.lock import NAME, RunLock, RunLocked


def lock(run: Path, lines: list[str] | None = None) -> RunLock:
    return RunLock(run, (lines if lines is not None else []).append)


def test_the_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    first = lock(tmp_path)
    first.acquire()
    with pytest.raises(RunLocked) as refused:
        lock(tmp_path).acquire()
    message = str(refused.value)
    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in message and "\n" not in message
    first.release()
    second = lock(tmp_path)
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_holder_s_lock_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        lock(tmp_path).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / NAME).read_bytes())["pid"] == child
    lines: list[str] = []
    heir = lock(tmp_path, lines)
    heir.acquire()
    assert json.loads((tmp_path / NAME).read_bytes())["pid"] == os.getpid() and not lines


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 4000, b"3", b'"text"', b"\xff\x00"])
def test_a_damaged_lock_file_is_in_nobody_s_way(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    first = lock(tmp_path)
    first.acquire()
    with pytest.raises(RunLocked):
        lock(tmp_path).acquire()


def test_a_holder_on_another_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"host": "elsewhere", "pid": 7, "since": "2020"}')
    lines: list[str] = []
    lock(tmp_path, lines).acquire()
    assert len(lines) == 1 and "process 7 on elsewhere since 2020" in lines[0]


def test_a_lock_whose_file_is_deleted_is_lost(tmp_path: Path) -> None:
    first = lock(tmp_path)
    first.acquire()
    assert not first.is_lost()
    (tmp_path / NAME).unlink()
    assert first.is_lost()
    second = lock(tmp_path)
    second.acquire()
    # the file of another holder stays
    first.release()
    with pytest.raises(RunLocked):
        lock(tmp_path).acquire()


def test_a_file_deleted_while_it_is_being_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, [0]

    def flock(file: int, operation: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            # the last holder releases it between our opening and our locking
            (tmp_path / NAME).unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path).acquire()
    assert calls[0] == 2 and (tmp_path / NAME).exists()


def test_a_filesystem_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lines: list[str] = []
    held = lock(tmp_path, lines)
    held.acquire()
    assert len(lines) == 1 and "without locks" in lines[0]
    held.release()
    assert list(tmp_path.iterdir()) == []
