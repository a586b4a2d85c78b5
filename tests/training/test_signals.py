"""Signals: each is answered at once with a line, and ends what it must, also when the main thread does not."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from fastle.training import signals
from fastle.training.signals import NOTHING, SAVE, STOP, STOPPING, Interrupted, Signals, raising_signals


class Lines(list[str]):
    """What was said, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def __call__(self, line: str) -> None:
        self.at.append(time.monotonic())
        self.append(line)

    def wait(self, count: int) -> None:
        deadline = time.monotonic() + 5
        while len(self) < count:
            assert time.monotonic() < deadline, list(self)
            time.sleep(0.002)


# the thread that would have ended the process ends itself
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals for which the process would have ended."""
    ended: list[int] = []

    def leave(signum: int) -> None:
        ended.append(signum)
        raise SystemExit

    monkeypatch.setattr(signals, "_leave", leave)
    return ended


def test_a_signal_that_can_stop_at_once_does(lines: Lines) -> None:
    for signum in STOP:
        with pytest.raises(Interrupted) as stopped, Signals(lines, lambda: "step 7 is saved"):
            signal.raise_signal(signum)
        assert stopped.value.signum == signum and not isinstance(stopped.value, Exception)
        assert lines.pop() == f"{signum.name}: stopping; step 7 is saved" and not lines


def test_a_signal_during_a_step_is_noted(lines: Lines, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with Signals(lines, str) as asked, asked.mode("after the step"):
        assert asked.request == NOTHING
        signal.raise_signal(signal.SIGTERM)
        assert asked.request == STOPPING + signal.SIGTERM
        # what a terminal and torchrun both pass on is one request
        signal.raise_signal(signal.SIGINT)
        assert asked.request == STOPPING + signal.SIGTERM
    assert lines == ["SIGTERM: finishing this step, then saving; once more ends it without"] and not left


def test_a_second_signal_ends_the_process(lines: Lines, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_REQUEST", 0.01)
    with Signals(lines, lambda: "step 7 is saved") as asked, asked.mode("after the step"):
        signal.raise_signal(signal.SIGTERM)
        lines.wait(1)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)
        lines.wait(2)
    assert lines[1] == "SIGINT: stopped without saving; step 7 is saved" and left == [signal.SIGINT]


def test_the_process_ends_though_the_main_thread_does_not(
    lines: Lines, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.05)
    began = time.monotonic()
    with Signals(lines, str) as asked:
        try:
            signal.raise_signal(signal.SIGHUP)
        except Interrupted:
            # a library that catches everything
            while not left:
                assert time.monotonic() - began < 5
                time.sleep(0.01)
        assert asked.request == STOPPING + signal.SIGHUP
    assert left == [signal.SIGHUP]


def test_the_answer_does_not_wait_for_the_main_thread(lines: Lines) -> None:
    with Signals(lines, str) as asked, asked.mode("after the step"):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        # one call, which holds no lock of Python's, and which no signal interrupts
        hashlib.pbkdf2_hmac("sha256", b"long", b"call", 1_500_000)
        ended = time.monotonic()
        lines.wait(1)
    assert lines.at[0] < ended - 0.1


def test_sigusr1_asks_to_save(lines: Lines) -> None:
    with Signals(lines, lambda: "step 7 is saved") as asked:
        signal.raise_signal(signal.SIGUSR1)
        lines.wait(1)
        with asked.mode("after the step"):
            signal.raise_signal(signal.SIGUSR1)
            lines.wait(2)
            before = asked.request
            asked.forget_save()
            assert (before, asked.request) == (SAVE, NOTHING)
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            assert asked.request == STOPPING + signal.SIGTERM
    assert lines[:2] == ["SIGUSR1: step 7 is saved", "SIGUSR1: saving after this step"]


def test_what_can_be_cut_short_is(lines: Lines) -> None:
    with Signals(lines, str) as asked, asked.mode("after the step"):
        with asked.cut_short():
            signal.raise_signal(signal.SIGTERM)
            lines("it goes on")
        assert asked.request == STOPPING + signal.SIGTERM
        with asked.cut_short():
            lines("once more")
    assert "once more" in lines and "it goes on" not in lines


def test_an_ignored_signal_stays_ignored(lines: Lines) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raising_signals(), Signals(lines, str) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.request == NOTHING
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not lines
    finally:
        signal.signal(signal.SIGHUP, before)


def test_everything_is_put_back(lines: Lines) -> None:
    def state() -> list[object]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return [wakeup, threading.active_count(), *map(signal.getsignal, (*STOP, signal.SIGUSR1))]

    before = state()
    with raising_signals(), Signals(lines, str):
        assert state() != before
    assert state() == before


def test_in_another_thread_it_does_nothing(lines: Lines) -> None:
    requests = []

    def run() -> None:
        with raising_signals(), Signals(lines, str) as asked, asked.mode("after the step"):
            requests.append(asked.request)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert requests == [NOTHING]


def test_a_command_without_anything_to_save(lines: Lines) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), raising_signals():
        signal.raise_signal(signal.SIGTERM)
