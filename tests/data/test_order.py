"""The order of the images: a permutation per epoch, split among the ranks, a function of seed and step alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastle.data import order
from fastle.data.order import batch_indices
from fastle.errors import FastleError
from fastle.lengths import steps_per_epoch


def indices(n: int, step: int, batch_size: int, seed: int = 0) -> torch.Tensor:
    return batch_indices(n, step=step, batch_size=batch_size, seed=seed, rank=0, world_size=1)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 300),
    share=st.integers(1, 20),
    world_size=st.integers(1, 5),
    step=st.integers(0, 2000),
    seed=st.integers(0, 2**63 - 1),
)
def test_ranks_together_are_the_global_batch(n: int, share: int, world_size: int, step: int, seed: int) -> None:
    batch_size = share * world_size
    if batch_size > n:
        batch_size, world_size = 1, 1
    ranks = [
        batch_indices(n, step=step, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(rank.dtype == torch.int64 and len(rank) == batch_size // world_size for rank in ranks)
    together = torch.cat(ranks)
    assert torch.equal(together, indices(n, step, batch_size, seed))
    assert len(together.unique()) == batch_size
    assert together.min() >= 0
    assert together.max() < n


@pytest.mark.parametrize(("n", "batch_size"), [(23, 5), (24, 6), (7, 7), (10, 1)])
def test_an_epoch_takes_no_image_twice_and_drops_the_partial_batch(n: int, batch_size: int) -> None:
    steps = steps_per_epoch(n, batch_size)
    assert steps == n // batch_size
    epochs = [torch.cat([indices(n, epoch * steps + step, batch_size) for step in range(steps)]) for epoch in range(3)]
    assert all(len(epoch.unique()) == steps * batch_size for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    order._permutation.cache_clear()
    fresh = indices(100, 47, 10).clone()
    for step in (3, 90, 11, 12):
        indices(100, step, 10, seed=step)
        assert torch.equal(indices(100, 47, 10), fresh)


def test_the_caller_may_write_to_its_indices() -> None:
    first = indices(100, 2, 10)
    kept = first.clone()
    first.zero_()
    assert torch.equal(indices(100, 2, 10), kept)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    states = []
    for seed in (1, 2):
        order._permutation.cache_clear()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        states.append(indices(100, 0, 10))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*states)


def test_no_two_pairs_of_seed_and_epoch_share_an_order() -> None:
    seeds = [*range(12), 2**32, 2**32 + 1, 2**63 - 1]
    orders = {tuple(indices(50, epoch, 50, seed).tolist()) for seed in seeds for epoch in range(12)}
    assert len(orders) == len(seeds) * 12


def test_the_order_never_changes() -> None:
    """A resumed run of an earlier version must go on with the same batches."""
    assert indices(1000, 250, 8, seed=3).tolist() == [33, 187, 563, 345, 484, 797, 904, 396]


@pytest.mark.parametrize(("n", "batch_size", "world_size", "words"), [(9, 10, 1, "10 9"), (100, 10, 4, "10 4")])
def test_impossible_batch_sizes(n: int, batch_size: int, world_size: int, words: str) -> None:
    with pytest.raises(FastleError, match="--batch-size") as error:
        batch_indices(n, step=0, batch_size=batch_size, seed=0, rank=0, world_size=world_size)
    message = str(error.value)
    assert "\n" not in message
    assert set(words.split()) <= set(message.replace(":", " ").split())


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_are_no_matter_of_the_batch_size(n: int) -> None:
    with pytest.raises(FastleError, match=rf"too few training images \({n}\): .*add images") as error:
        batch_indices(n, step=0, batch_size=2, seed=0, rank=0, world_size=1)
    assert "--batch-size" not in str(error.value)
