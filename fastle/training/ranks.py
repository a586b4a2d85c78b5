"""The ranks of a run: they agree before they begin and before they stop, and notice when one of them is gone.

They exchange messages through the store in which they met, which waits neither for a device nor for a rank. A
collective would wait for a lost rank, for ten minutes or forever.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastle.errors import FastleError, SaidByAnother
from fastle.machine import package_version

BEAT = 5.0  # seconds between two signs of life
LOST = 40.0  # seconds without a sign of life after which a rank counts as lost
# what a rank adds to its count of signs of life when it ends, and when it fails
ENDED, FAILED = 10**9, 2 * 10**9

Result = TypeVar("Result")


class LostRank(FastleError):
    """Another rank is gone."""


class Ranks:
    """The ranks of a run. Use it in a `with` statement, which all ranks enter.

    In place of the error of a collective that lacks a rank, the statement raises LostRank on one rank and SaidByAnother
    on the others. If no collective notices, a thread ends the process with that line.

    Args:
        rank, world_size: See `Trainer`.
        saved: Says, in words, what is saved.
    """

    def __init__(self, rank: int, world_size: int, saved: Callable[[], str]) -> None:
        self.rank, self.world_size, self._saved = rank, world_size, saved
        self._rounds = 0
        self._ended = threading.Event()

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            # one connection each for the main thread, the watcher and the reporter: a waiting request blocks its
            # connection. open all now, since connecting to a lost rank blocks for half an hour
            store = dist.distributed_c10d._get_default_store()
            # the same processes may train one run after another
            self._run = store.add(f"fastle/runs of {self.rank}", 1)
            self._store, self._watcher_store, self._reporter_store = (store.clone() for _ in range(3))
            self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.world_size == 1:
            return
        self._ended.set()
        lost = self._lost() if isinstance(error, RuntimeError) and says_rank_is_gone(error) else None
        with suppress(RuntimeError):
            if isinstance(error, Exception) and not isinstance(error, SaidByAnother):
                # its command says what went wrong
                self._is_first_to_speak()
            self._store.add(self._key(f"life/{self.rank}"), FAILED if error is not None else ENDED)
        if lost is not None:
            raise lost from None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, which are JSON, in their order. Waits for every rank."""
        if self.world_size == 1:
            return [value]
        self._rounds += 1
        self._store.set(self._key(f"round/{self._rounds}/{self.rank}"), json.dumps(value))
        values = []
        for rank in range(self.world_size):
            key = self._key(f"round/{self._rounds}/{rank}")
            # the watcher ends the process if this rank is lost
            while not self._store.check([key]):
                time.sleep(0.02)
            values.append(json.loads(self._store.get(key)))
        return values

    def together(self, call: Callable[[], Result]) -> Result:
        """Calls a function on every rank. If it fails on one, all of them fail, and only rank 0 says why.

        Raises:
            FastleError: As the function, on rank 0.
            SaidByAnother: On all other ranks.
        """
        result: Result | None = None
        fault: FastleError | None = None
        try:
            result = call()
        except FastleError as error:
            fault = error
        faults = self.gather(None if fault is None else str(fault))
        failed = [rank for rank, text in enumerate(faults) if text is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if self.rank > 0:
            raise SaidByAnother
        if fault is not None:
            raise fault
        raise FastleError(f"rank {failed[0]}: {faults[failed[0]]}")

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Compares what all ranks must have in common.

        Raises:
            FastleError: They disagree. Only rank 0 says in what.
            SaidByAnother: On all other ranks.
        """
        theirs = self.gather(dict(facts))
        for rank, other in enumerate(theirs):
            first = theirs[0]
            names = [name for name in first | other if first.get(name) != other.get(name)]
            different = [f"{name} ({first.get(name)} and {other.get(name)})" for name in names]
            if different:
                if self.rank > 0:
                    raise SaidByAnother
                raise FastleError(
                    f"ranks 0 and {rank} differ in {', '.join(different)}: start all of them on the same files, "
                    "with the same command and the same versions"
                )

    def _lost(self) -> FastleError:
        """What to raise once a collective says that another rank is gone."""
        return LostRank(self._words("another rank is gone")) if self._is_first_to_speak() else SaidByAnother()

    def _watch(self) -> None:
        """Gives signs of life, and looks for those of the others, until the run ends."""
        seen = {rank: (0, time.monotonic()) for rank in range(self.world_size) if rank != self.rank}
        try:
            while not self._ended.wait(BEAT):
                self._watcher_store.add(self._key(f"life/{self.rank}"), 1)
                for rank, (count, at) in seen.items():
                    now = self._watcher_store.add(self._key(f"life/{rank}"), 0)
                    if now != count:
                        seen[rank] = now, time.monotonic()
                    if now >= FAILED:
                        self._leave(f"rank {rank} has ended")
                    elif now < ENDED and time.monotonic() - at > LOST:
                        self._leave(f"rank {rank} has given no sign of life for {LOST:.0f} s")
        except RuntimeError:
            # the store lives in another process
            if not self._ended.is_set():
                self._leave("the store in which the ranks meet is gone")

    def _leave(self, what: str) -> None:
        """Ends the process. The main thread may be waiting for the rank that is gone."""
        # the main thread may notice it too, and then ends the process in good order
        if self._ended.wait(BEAT):
            return
        if self._is_first_to_speak():
            print(f"fastle-train (rank {self.rank}): error: {self._words(what)}", file=sys.stderr, flush=True)
        os._exit(1)

    def _key(self, name: str) -> str:
        return f"fastle/{self._run}/{name}"

    def _is_first_to_speak(self) -> bool:
        """Whether no other rank has said yet what went wrong."""
        try:
            return bool(self._reporter_store.add(self._key("spoken"), 1) == 1)
        # the store ends with the process that holds it; a fault said twice is better than one that nobody says
        except RuntimeError:
            return True

    def _words(self, what: str) -> str:
        return f"{what}; {self._saved()}: run the same command again to go on"


def says_rank_is_gone(error: RuntimeError) -> bool:
    """Whether an error of a collective comes from the connection to another rank."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text or "connection closed" in text


def versions() -> str:
    """The versions of Python and of the packages that compute."""
    packages = ("fastle", "torch", "triton", "torchvision")
    installed = [f"{name} {package_version(name)}" for name in packages if package_version(name)]
    return ", ".join([*installed, f"Python {platform.python_version()}"])


class Agreement:
    """Makes all ranks act on a request at the same step, about a second after one of them has received it.

    Requests reach the ranks at different steps. A rank that stopped alone would leave the others waiting for its
    gradients. Agreeing waits for the device, so it must not happen in every step of a fast run.

    Args:
        device: The device of the collectives.
        world_size: The number of ranks.
    """

    SECONDS = 1.0  # between two agreements

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self._wait = 1

    def __call__(self, request: int, seconds: float | None) -> int:
        """The request that all ranks act on after this step: the greatest of any rank, or 0.

        Args:
            request: That of this rank, at least 0.
            seconds: What a step takes, as far as this rank knows.
        """
        if self._world_size == 1:
            return request
        self._wait -= 1
        if self._wait > 0:
            return 0
        # all ranks must wait for as many steps
        milliseconds = round(1000 * (self.SECONDS if seconds is None else seconds))
        both = torch.tensor([request, milliseconds], device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        agreed, slowest = both.tolist()
        self._wait = max(1, int(1000 * self.SECONDS) // max(1, slowest))
        return int(agreed)
