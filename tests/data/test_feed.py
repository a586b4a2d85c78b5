"""The feed: the batches of the order, loaded ahead by two threads, with their errors in their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastle.data import Feed
from fastle.data import feed as feed_module
from fastle.data.order import batch_indices
from fastle.errors import FastleError

N = 40


class Numbers:
    """Images of one pixel, which is their index. The batch of step `fail_at` raises; a batch takes `delay` seconds."""

    def __init__(self, fail_at: int | None = None, delay: float = 0.0) -> None:
        self.loads = 0
        self.threads: set[str] = set()
        self.error = ValueError("two\nlines")
        self._lock = threading.Lock()
        self._fail_at = fail_at
        self._delay = delay

    def __len__(self) -> int:
        return N

    def batch(self, indices: Sequence[int]) -> Tensor:
        with self._lock:
            self.loads += 1
        self.threads.add(threading.current_thread().name)
        time.sleep(self._delay)
        if self._fail_at is not None and list(indices) == expected(self._fail_at):
            raise self.error
        return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)


def settle(images: Numbers, loads: int) -> None:
    """Waits until the threads have loaded so many batches, and a little longer in case they load more."""
    deadline = time.monotonic() + 600
    while images.loads < loads and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)


def expected(step: int, batch_size: int = 8, seed: int = 3, rank: int = 0, world_size: int = 1) -> list[int]:
    indices = batch_indices(N, step=step, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    return indices.tolist()


@pytest.mark.parametrize(("start", "stop"), [(0, 13), (7, 12), (4, 5), (6, 6)])
def test_batches_are_those_of_the_order_from_any_step(start: int, stop: int) -> None:
    with Feed(Numbers(), batch_size=8, seed=3, device="cpu", start_step=start, stop_step=stop) as feed:
        batches = list(feed)
    assert feed.steps_per_epoch == 5 and feed.stop_step == stop
    assert [batch.flatten().tolist() for batch in batches] == [expected(step) for step in range(start, stop)]
    assert all(batch.shape == (8, 1, 1, 1) and batch.dtype == torch.uint8 for batch in batches)


def test_each_rank_gets_its_share() -> None:
    for rank in range(4):
        with Feed(Numbers(), batch_size=8, seed=3, device="cpu", stop_step=6, rank=rank, world_size=4) as feed:
            batches = [batch.flatten().tolist() for batch in feed]
        assert batches == [expected(step, rank=rank, world_size=4) for step in range(6)]


def test_two_batches_are_loaded_ahead_at_once() -> None:
    images = Numbers(delay=0.01)
    with Feed(images, batch_size=8, seed=3, device="cpu", stop_step=20) as feed:
        for taken, _ in enumerate(feed, start=1):
            settle(images, taken + 2)
            assert images.loads == taken + 2
            if taken == 4:
                break
    assert len(images.threads) == 2
    assert threading.current_thread().name not in images.threads


def test_an_exception_is_raised_in_place_of_its_batch() -> None:
    images = Numbers(fail_at=3)
    with Feed(images, batch_size=8, seed=3, device="cpu", stop_step=20) as feed:
        batches = iter(feed)
        taken = [next(batches).flatten().tolist() for _ in range(3)]
        # a thread has raised it long before the consumer gets there
        settle(images, 5)
        with pytest.raises(ValueError, match="two") as error:
            next(batches)
    assert error.value is images.error
    assert taken == [expected(step) for step in range(3)]


def test_close_ends_the_threads_without_loading_more() -> None:
    images = Numbers(delay=0.1)
    feed = Feed(images, batch_size=8, seed=3, device="cpu", stop_step=1000)
    next(iter(feed))
    feed.close()
    # at most the batch that was taken and the two that were being loaded
    assert images.loads <= 3
    assert not [thread for thread in threading.enumerate() if thread.name in images.threads]


def test_wait_is_the_time_the_consumer_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(Numbers):
        """No batch is there before the consumer waits for it; what it waits, a clock of the test says."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds, self.gate = 0.0, threading.Event()

        def batch(self, indices: Sequence[int]) -> Tensor:
            assert self.gate.wait(60), "nobody waits"
            return super().batch(indices)

        def clock(self) -> float:
            began = self.seconds
            if not self.gate.is_set():
                self.seconds += 5
                self.gate.set()
            return began

    images = Gated()
    monkeypatch.setattr(feed_module, "time", SimpleNamespace(perf_counter=images.clock))
    with Feed(images, batch_size=8, seed=3, device="cpu", stop_step=6) as feed:
        assert feed.wait == 0
        batches = iter(feed)
        next(batches)
        assert feed.wait == 5
        # what the consumer does in the meantime is no waiting
        images.seconds += 100
        next(batches)
        assert feed.wait == 5
        images.gate.clear()
        next(batches)
        assert feed.wait == 10


def test_an_impossible_batch_size_is_refused_at_once() -> None:
    with pytest.raises(FastleError, match="--batch-size"):
        Feed(Numbers(), batch_size=N + 1, seed=3, device="cpu", stop_step=20)
    with pytest.raises(FastleError, match="--batch-size"):
        Feed(Numbers(), batch_size=8, seed=3, device="cpu", stop_step=20, world_size=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_batches_arrive_whole_on_a_busy_gpu() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    with Feed(Numbers(), batch_size=8, seed=3, device="cuda", stop_step=30) as feed:
        batches = []
        for batch in feed:
            busy = (busy @ busy).clamp(-1, 1)
            batches.append(batch)
    assert all(batch.device.type == "cuda" for batch in batches)
    assert [batch.flatten().tolist() for batch in batches] == [expected(step) for step in range(30)]
