from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastle.data import order
from fastle.data.order import batch_indices, steps_per_epoch
from fastle.errors import FastleError


def of_one_rank(n: int, step: int, batch_size: int, seed: int = 0) -> torch.Tensor:
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
    assert torch.equal(together, of_one_rank(n, step, batch_size, seed))
    assert len(together.unique()) == batch_size
    assert together.min() >= 0
    assert together.max() < n


@pytest.mark.parametrize(("n", "batch_size"), [(23, 5), (24, 6), (7, 7), (10, 1)])
def test_an_epoch_takes_no_image_twice_and_drops_the_partial_batch(n: int, batch_size: int) -> None:
    steps = steps_per_epoch(n, batch_size)
    assert steps == n // batch_size
    epochs = [
        torch.cat([of_one_rank(n, epoch * steps + step, batch_size) for step in range(steps)]) for epoch in range(3)
    ]
    assert all(len(epoch.unique()) == steps * batch_size for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    order._permutation.cache_clear()
    fresh = of_one_rank(100, 47, 10).clone()
    for step in (3, 90, 11, 12):
        of_one_rank(100, step, 10, seed=step)
        assert torch.equal(of_one_rank(100, 47, 10), fresh)


def test_a_caller_may_write_to_what_it_got() -> None:
    first = of_one_rank(100, 2, 10)
    kept = first.clone()
    first.zero_()
    assert torch.equal(of_one_rank(100, 2, 10), kept)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    order._permutation.cache_clear()
    torch.manual_seed(1)
    first, state = of_one_rank(100, 0, 10), torch.get_rng_state()
    order._permutation.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(of_one_rank(100, 0, 10), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_two_pairs_of_seed_and_epoch_share_an_order() -> None:
    orders = {
        tuple(of_one_rank(50, epoch, 50, seed).tolist())
        for seed in [*range(20), 2**32, 2**32 + 1, 2**63 - 1]
        for epoch in range(20)
    }
    assert len(orders) == 23 * 20


def test_the_order_is_uniform() -> None:
    """Every image is as likely early as late: the mean position over 400 epochs is within 5 sigma of the middle."""
    n, epochs = 40, 400
    positions = torch.stack([of_one_rank(n, epoch, n).argsort() for epoch in range(epochs)]).double().mean(0)
    sigma = ((n**2 - 1) / 12 / epochs) ** 0.5
    assert (positions - (n - 1) / 2).abs().max() < 5 * sigma


@pytest.mark.parametrize(("n", "batch_size", "world_size", "words"), [(9, 10, 1, "10 9"), (100, 10, 4, "10 4")])
def test_batch_sizes_that_cannot_be(n: int, batch_size: int, world_size: int, words: str) -> None:
    with pytest.raises(FastleError, match="--batch-size") as error:
        batch_indices(n, step=0, batch_size=batch_size, seed=0, rank=0, world_size=world_size)
    message = str(error.value)
    assert "\n" not in message
    assert set(words.split()) <= set(message.split())
