"""The order of the images: a pure function of the seed and the step, the same for every loader, rank and restart."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastle.errors import FastleError


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in `n` images; the last, partial one is dropped.

    Raises:
        FastleError: there is not one whole batch.
    """
    if batch_size > n:
        raise FastleError(f"a batch of {batch_size} cannot be drawn from {n} images: use --batch-size {n} or less")
    return n // batch_size


def batch_indices(n: int, *, step: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """The images that one rank takes at one step: int64 (batch_size // world_size,), values in [0, n).

    Every epoch visits the images in a permutation of its own, drawn from (seed, epoch). The ranks' slices, one after
    the other, are the batch of a single process.

    Args:
        n: images in the split.
        step: from 0, counted over the whole run.
        batch_size: of all ranks together.
        seed: of the run, >= 0.

    Raises:
        FastleError: `batch_size` is more than `n`, or does not divide among the ranks.
    """
    if batch_size % world_size:
        raise FastleError(f"--batch-size {batch_size} does not divide among {world_size} ranks: use a multiple of it")
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    share = batch_size // world_size
    start = position * batch_size + rank * share
    # a copy: the permutation is shared by the calls of an epoch
    return _permutation(n, seed, epoch)[start : start + share].clone()


# one for the training set and one for a set that is evaluated meanwhile
@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    # a sum or a product of the two would give neighbouring seeds each other's epochs
    mixed = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(mixed[0])))
