"""Where the commands begin: a signal during the imports, which take seconds, ends them with a line, not a traceback.

This module imports nothing slow, and nor does the package that holds it.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

from fastle.extras import missing_extra


def fastle_train() -> None:
    """Starts fastle-train."""
    _start("fastle-train", "train")


def fastle() -> None:
    """Starts fastle."""
    _start("fastle", "main")


def _start(program: str, module: str) -> None:
    def stop(signum: int, frame: FrameType | None) -> None:
        # no exception, which could leave a module half imported
        os.write(2, f"{program}: stopped by {signal.Signals(signum).name}\n".encode())
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # under nohup, SIGHUP stays ignored
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)
    if program == "fastle-train" and signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
        # it asks a run to save, and ends a process that has no handler
        signal.signal(signal.SIGUSR1, lambda *_: os.write(2, f"{program}: SIGUSR1: no step is under way\n".encode()))
    try:
        import_module(f"fastle.commands.{module}").main()
    except ModuleNotFoundError as error:
        if missing := missing_extra(error, program):
            sys.exit(f"{program}: error: {missing}")
        raise
