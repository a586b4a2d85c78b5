"""The folder in which `scenarios` happen, with images, a run and caches, and the processes that work in it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

# imported here so that the processes, which are forks of this one, start at once
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy as np
import torch._dynamo  # noqa: F401
import torchvision.transforms.v2.functional  # noqa: F401
from PIL import Image

import fastle.commands.check
import fastle.commands.train_run  # noqa: F401
from fastle.commands import main as fastle_command
from fastle.commands import train as train_command

STEPS, BATCH = 12, 8
PATIENCE = 120.0  # seconds until a process counts as hanging


@dataclass
class Process:
    """A fork that runs a command; what it prints goes to a file."""

    pid: int
    output: Path
    status: int | None = None

    def ended(self) -> bool:
        """Whether the process has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, patience: float = PATIENCE) -> int | None:
        """The exit status, negative for a signal; None if it hangs, and is then killed."""
        end = time.monotonic() + patience
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.01)
        if self.status is None:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return self.status

    def kill(self, signum: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")


@dataclass
class Field:
    """The folder in which everything happens.

    Attributes:
        folder: Images, runs, caches and what was printed.
        random: All draws of an event.
        ranks: Of the run that the event happens to.
        untidy: Faults of processes: a traceback, an unexpected status, no word of an error, no end.
    """

    folder: Path
    random: Random = field(default_factory=Random)
    ranks: int = 1
    untidy: list[str] = field(default_factory=list)
    processes: int = 0

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "disk" / "run"

    @property
    def caches(self) -> Path:
        """The folder of the caches."""
        return self.folder / "cache" / "fastle"

    def command(self, run: Path, seed: int = 0) -> list[str]:
        """The arguments of fastle-train."""
        return [
            "folder", "--data", str(self.folder / "images"), "--size", "16", "--hidden", "4", "--map-channels", "4",
            "--latent", "6", "--slices", "8", "--batch-size", str(BATCH), "--steps", str(STEPS), "--seed", str(seed),
            "--device", "cpu", "--decoder", "torchvision", "--cache", "disk", "--run", str(run),
        ]  # fmt: skip

    def start(self, arguments: Sequence[str], *, program: str = "fastle-train", **environment: str) -> Process:
        """Starts a command in a fork."""
        self.processes += 1
        output = self.folder / f"output-{self.processes}.txt"
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return Process(pid, output)
        # nothing of the parent may run in the child, whatever happens
        status = 70
        try:
            os.environ.update(environment)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            status = _run(program, arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def train(self, run: Path) -> list[Process]:
        """Starts fastle-train, in a process for each rank."""
        if self.ranks == 1:
            return [self.start(self.command(run))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(self.command(run), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(self.ranks)
        ]

    def end(self, process: Process, *allowed: int) -> bool:
        """Waits for a process and judges what it said. Whether it ended with 0."""
        status, said = process.wait(), process.said()
        if status is None:
            self.untidy.append(f"hung for {PATIENCE:g} s: {said[-300:]}")
        elif "Traceback" in said:
            self.untidy.append(f"traceback: {said[-600:]}")
        elif status not in (0, 1, *allowed):
            self.untidy.append(f"status {status}: {said[-300:]}")
        elif status == 1 and "error: " not in said:
            self.untidy.append(f"failed without a word: {said[-300:]}")
        process.output.unlink(missing_ok=True)
        return status == 0

    def finish(self, run: Path) -> bool:
        """Runs fastle-train to its end. Whether it has ended with 0."""
        ended = [self.end(process) for process in self.train(run)]
        return all(ended)

    def make_images(self) -> None:
        """A folder of small images with splits of its own."""
        generator = np.random.default_rng(0)
        for split, count in (("train", 40), ("valid", 4), ("test", 4)):
            (self.folder / "images" / split).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.folder / "images" / split / f"{index}.png")


def _run(program: str, arguments: Sequence[str]) -> int:
    try:
        (train_command if program == "fastle-train" else fastle_command).main(list(arguments))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 (as Python would at the top)
        import traceback

        traceback.print_exc()
        return 1
    return 0
