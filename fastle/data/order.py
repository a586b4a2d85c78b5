"""The order of the images: a pure function of the seed and the step, the same for every decoder and resumed run."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastle.errors import FastleError
from fastle.lengths import steps_per_epoch


def rank_share(batch_size: int, world_size: int) -> int:
    """The number of images of a batch that each rank takes.

    Raises:
        FastleError: The ranks cannot take equally many.
    """
    if batch_size % world_size:
        raise FastleError(
            f"--batch-size {batch_size} cannot be divided among {world_size} ranks: use a multiple of {world_size}"
        )
    return batch_size // world_size


def batch_indices(n: int, *, step: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """The indices of the images in one rank's batch at one step: int64 (batch_size // world_size,), in [0, n).

    Every epoch visits the images in its own random permutation, drawn from (seed, epoch). The batches of the ranks, one
    after the other, are the batch of a single process.

    Args:
        n: The number of images in the split.
        step: The step, counted from 0 over the whole run.
        batch_size: The batch size of all ranks together.
        seed: The seed of the run, at least 0.
        rank, world_size: The rank of the process and the number of processes.

    Raises:
        FastleError: `batch_size` exceeds `n`, or is not a multiple of `world_size`.
    """
    share = rank_share(batch_size, world_size)
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    start = position * batch_size + rank * share
    # a copy, because all calls of an epoch share the permutation
    return _permutation(n, seed, epoch)[start : start + share].to(torch.int64, copy=True)


# two epochs, because near the end of one the feed's threads are already in the next
@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    # with a sum or product of the two, neighbouring seeds would share epochs
    mixed = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(int(mixed[0])))
    # two epochs of a hundred million images are kept
    return permutation.to(torch.int32) if n < 2**31 else permutation
