"""Batches on the device, decoded ahead of the step that needs them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from .images import Images
from .order import batch_indices

PREFETCH = 2


class Feed:
    """The batches of steps `start_step` to `stop_step - 1`, each uint8 (batch_size // world_size, C, H, W).

    Two background threads decode a batch ahead each, so that one reads files while the other's are decoded, and on a
    GPU copy them there on a stream of their own. What they raise is raised by the step that would have had the batch.
    Use it in a `with` statement, or call `close`.

    Args:
        images: the split.
        batch_size: of all ranks together.
        seed: of the order, see `batch_indices`.
        device: where the batches are handed out.
        start_step: where a resumed run goes on.

    Attributes:
        wait: seconds that the consumer has waited for batches so far.

    Raises:
        FastleError: see `batch_indices`.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        start_step: int = 0,
        stop_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.wait = 0.0
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._device = torch.device(device)
        self._steps = range(start_step, stop_step)
        self._rank = rank
        self._world_size = world_size
        # a batch size that cannot be is the caller's error, now, not a thread's, later
        self._indices(start_step)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(PREFETCH, thread_name_prefix="feed")

    def __iter__(self) -> Iterator[Tensor]:
        steps = iter(self._steps)
        ahead: deque[Future[tuple[Tensor, torch.cuda.Event | None]]] = deque()
        ahead.extend(self._threads.submit(self._load, step) for step in islice(steps, PREFETCH))
        while ahead:
            began = time.perf_counter()
            batch, copied = ahead.popleft().result()
            self.wait += time.perf_counter() - began
            ahead.extend(self._threads.submit(self._load, step) for step in islice(steps, 1))
            if copied is not None:
                # the device waits, not the host; and the memory is not given away before the consumer is done with it
                consumer = torch.cuda.current_stream(self._device)
                consumer.wait_event(copied)
                batch.record_stream(consumer)
            yield batch

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was asked for ahead and ends the threads, after the batches they are at."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _indices(self, step: int) -> Tensor:
        return batch_indices(
            len(self._images),
            step=step,
            batch_size=self._batch_size,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _load(self, step: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """A batch on the device, and when it is complete."""
        indices = self._indices(step).tolist()
        if self._stream is None:
            return self._images.batch(indices), None
        # copied while the step before computes
        with torch.cuda.stream(self._stream):
            batch = self._images.batch(indices)
            if not batch.is_cuda:
                batch = batch.pin_memory().to(self._device, non_blocking=True)
            return batch, self._stream.record_event()
