"""Signals: a request to stop or to save is answered with a line at once, whatever the run is doing.

SIGINT, SIGTERM and SIGHUP stop a run, and SIGUSR1 makes it save and go on. A signal that was ignored when the process
started, as SIGHUP is under nohup, stays ignored.

Python runs a handler only between two operations of the main thread, which may wait long for a device, for other ranks
or for a compiler. So a thread of its own gives the answer. It also ends the process if the main thread does not.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Literal

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# requests; a greater one takes precedence. a request to stop is STOPPING plus its signal
NOTHING, SAVE, STOPPING = 0, 1, 128
# seconds: a terminal and torchrun may pass the same signal on to a process; a person's second one comes later
ONE_REQUEST = 2.0
PROMPT = 0.2  # seconds after which the main thread counts as busy
GRACE = 4.0  # seconds that the main thread has to end where nothing can be saved

# what a stop ends: the run at once, the run after the step, or also a measurement between two steps
Mode = Literal["at once", "after the step", "cut short"]


class Interrupted(KeyboardInterrupt):
    """A signal has stopped a run or a command. It is no Exception, so that nothing takes it for a failure.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class _CutShort(Interrupted):
    """Ends what `Signals.cut_short` surrounds."""


class Signals:
    """Answers signals in a `with` statement, and raises Interrupted in the main thread where a run can stop at once.

    In another thread than the main one, it does nothing: Python gives signals to the main thread alone.

    Args:
        say: Shows a line.
        saved: Says, in words, what is saved.
    """

    def __init__(self, say: Callable[[str], object], saved: Callable[[], str]) -> None:
        self._say, self._saved = say, saved
        self._mode: Mode = "at once"
        self._stop: int | None = None
        self._save = False
        self._handlers: dict[int, Any] = {}
        # the mode in which a stop has reached the main thread
        self._stopped_in: Mode | None = None
        self._met = threading.Event()

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in (*STOP, signal.SIGUSR1):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._handlers[signum] = signal.signal(signum, self._act)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    @property
    def request(self) -> int:
        """What this process was asked for: NOTHING, SAVE, or STOPPING plus the signal."""
        if self._stop is not None:
            return STOPPING + self._stop
        return SAVE if self._save else NOTHING

    def forget_save(self) -> None:
        """Notes that a request to save has been met."""
        self._save = False

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """Sets what a stop ends while the block runs."""
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    @contextmanager
    def cut_short(self) -> Iterator[None]:
        """Lets a stop end the block early, so that the run can save."""
        try:
            with self.mode("cut short"):
                yield
        except _CutShort:
            pass

    def _act(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the main thread."""
        if signum == signal.SIGUSR1:
            self._save = True
        elif self._stop is None:
            self._stop, self._stopped_in = signum, self._mode
            self._met.set()
            if self._mode == "cut short":
                raise _CutShort(signum, "stopped")
            if self._mode == "at once":
                raise Interrupted(signum, "stopped: run the same command again to go on")

    def _answer(self) -> None:
        """Runs in a thread of its own, until the pipe is closed."""
        stop, stopped_at = 0, 0.0
        deadline: float | None = None
        while True:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], timeout)[0]:
                _leave(stop)
            received = os.read(self._read, 1)
            if not received:
                return
            signum = received[0]
            if signum == signal.SIGUSR1:
                self._say_of(signum, "saving after this step" if self._mode != "at once" else self._saved())
            elif signum not in self._handlers:
                continue
            elif not stop:
                stop, stopped_at = signum, time.monotonic()
                self._met.wait(PROMPT)
                if (self._stopped_in or self._mode) == "at once":
                    deadline = stopped_at + GRACE
                    self._say_of(signum, f"stopping; {self._saved()}")
                else:
                    self._say_of(signum, "finishing this step, then saving; once more ends it without")
            elif time.monotonic() - stopped_at > ONE_REQUEST:
                self._say_of(signum, f"stopped without saving; {self._saved()}")
                _leave(signum)

    def _say_of(self, signum: int, text: str) -> None:
        # whoever reads the output may have ended
        with suppress(OSError):
            self._say(f"{signal.Signals(signum).name}: {text}")


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raises Interrupted for the signals that stop a command which has nothing to save."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, f"stopped by {signal.Signals(signum).name}")

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signum in STOP:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                handlers[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _leave(signum: int) -> None:
    """Ends the process, whatever its other threads are doing, with the shell's status for a signal."""
    if os.isatty(1):
        # the cursor, which a progress bar has hidden
        os.write(1, b"\x1b[?25h")
    os._exit(128 + signum)
