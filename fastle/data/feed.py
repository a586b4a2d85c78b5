"""The feed: batches on the device, decoded ahead of the steps that need them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from fastle.lengths import steps_per_epoch

from .images import Images
from .order import batch_indices

PREFETCH = 2  # batches, and threads


class Feed:
    """Iterates over the batches of steps `start_step` to `stop_step - 1`, each (batch_size // world_size, C, H, W).

    Two background threads decode one batch ahead each, so that one reads files while the other decodes. For a GPU they
    also copy the batches there, on a stream of their own. An exception in a thread is raised in the consumer, in place
    of the batch it belongs to. Use a feed in a `with` statement, or call `close`.

    Args:
        images: The split.
        batch_size: The batch size of all ranks together.
        seed: The seed of the order; see `batch_indices`.
        device: The device of the batches.
        start_step: The first step, which is 0 unless a run resumes.
        stop_step: The step after the last.
        rank, world_size: See `batch_indices`.

    Attributes:
        wait: Seconds the consumer has spent waiting for batches.
        stop_step: As given.
        steps_per_epoch: See the function of that name.

    Raises:
        FastleError: See `batch_indices`.
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
        self.stop_step = stop_step
        self.steps_per_epoch = steps_per_epoch(len(images), batch_size)
        # an impossible batch size must raise here rather than in a thread later
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
                # the device waits for the copy, not the host, and the memory is not reused while the consumer reads it
                consumer = torch.cuda.current_stream(self._device)
                consumer.wait_event(copied)
                batch.record_stream(consumer)
            yield batch

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the batches that have not been started, and ends the threads once they finish their current ones."""
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
        """A batch on the device, and the event of its copy, which the consumer must wait for (None without CUDA)."""
        indices = self._indices(step).tolist()
        if self._stream is None:
            return self._images.batch(indices).to(self._device), None
        # copies overlap with the computation of earlier steps
        with torch.cuda.stream(self._stream):
            batch = self._images.batch(indices)
            if not batch.is_cuda:
                batch = batch.pin_memory().to(self._device, non_blocking=True)
            return batch, self._stream.record_event()
