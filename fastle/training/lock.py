"""The lock of a run directory: one process at a time writes there.

It is an advisory `flock` on a file that names its holder. The kernel frees it when the holder ends, however it ends, so
that no dead process holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from fastle.errors import FastleError

NAME = "fastle.lock"
MAX_BYTES = 4096  # of the holder's description
# what a filesystem without flock answers
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class RunLocked(FastleError):
    """Another process writes to the run directory."""


class RunLock:
    """The lock of a run directory, which must exist. It is held from `acquire` to `release`.

    Args:
        run: The run directory.
        say: Shows a line, if the filesystem has no locks or the last holder was on another machine.
    """

    def __init__(self, run: Path, say: Callable[[str], object]) -> None:
        self._run, self._say = run, say
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RunLocked: Another process holds it. The message says which, on which machine, and since when.
            OSError: The directory cannot be written to.
        """
        while self._file is None:
            file = os.open(self._run / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if not self._try(file):
                    os.close(file)
                    return
                # the last holder may have deleted the file between the two calls: then nobody else would see this lock
                if self._is_at_path(file):
                    self._file = file
                else:
                    os.close(file)
            except RunLocked:
                os.close(file)
                raise
        self._name_holder(self._file)

    def release(self) -> None:
        """Deletes the file and frees the lock; does nothing if the lock is not held."""
        if self._file is None:
            return
        if self._is_at_path(self._file):
            (self._run / NAME).unlink()
        os.close(self._file)
        self._file = None

    def is_lost(self) -> bool:
        """Whether the file that is locked has been deleted, so that another process could take the lock."""
        return self._file is not None and not self._is_at_path(self._file)

    def _try(self, file: int) -> bool:
        """Locks an open file. Returns False if the filesystem has no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(
                f"{self._run} is being written by {_holder(file)}: wait until it ends, stop it, or give another --run"
            ) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            (self._run / NAME).unlink(missing_ok=True)
            self._say(f"{self._run} is on a filesystem without locks: start no second process on it")
            return False
        return True

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), (self._run / NAME).stat())
        except FileNotFoundError:
            return False

    def _name_holder(self, file: int) -> None:
        host, before = socket.gethostname(), _read(file)
        # on some network filesystems a machine does not see the locks of another
        if before and before.get("host") != host:
            self._say(f"{self._run}: took over the lock of {_words(before)}, which this machine cannot see")
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = json.dumps({"host": host, "pid": os.getpid(), "since": since}).encode() + b"\n"
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)


def _read(file: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(file, MAX_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder(file: int) -> str:
    return _words(_read(file))


def _words(holder: dict[str, object]) -> str:
    # the holder writes its name right after it takes the lock
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
