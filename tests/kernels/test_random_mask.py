"""kernels.random_mask: masks against their formula in Python integers, images against masks, and statistics."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.random_mask import mask_channels, mask_patches
from tests import oracle
from tests.kernels.image_operators import channel_mask, patch_mask, some_seeds
from tests.kernels.views import DEVICE, every_impl, laid_out, made, needs_gpu

# masks

# rows of patches, patches in a row, side of a patch
GRIDS = [(1, 1, 1), (1, 2, 1), (3, 5, 1), (16, 16, 1), (13, 37, 1), (8, 8, 4), (7, 9, 2)]
every_grid = pytest.mark.parametrize(
    ("rows", "columns", "patch"), GRIDS, ids=[f"{r}x{c}-patch{p}" for r, c, p in GRIDS]
)


@every_grid
def test_patches_follow_the_formula(rows: int, columns: int, patch: int) -> None:
    seeds, patches = some_seeds(4), rows * columns
    position = torch.tensor([[oracle.permuted(seed, p, patches) for p in range(patches)] for seed in seeds.tolist()])
    # exactly one patch at each position
    assert torch.equal(position.sort(1).values, torch.arange(patches).expand(4, patches))
    for ratio in (0.0, 0.29, 0.57, 1.0):
        mask = patch_mask(seeds, (rows * patch, columns * patch), ratio=ratio, patch=patch)
        assert mask.shape == (4, 1, rows * patch, columns * patch) and mask.device == seeds.device
        expected = (position >= int(ratio * patches)).view(4, 1, rows, 1, columns, 1)
        assert torch.equal(
            mask.cpu().view(4, 1, rows, patch, columns, patch), expected.expand(-1, -1, -1, patch, -1, patch)
        )


def test_channels_follow_the_formula() -> None:
    seeds = some_seeds(9)
    for ratio in (0.0, 0.05, 0.4997, 1.0):
        mask = channel_mask(seeds, 24, ratio=ratio)
        expected = [[oracle.keyed(seed, c) >= int(ratio * 2**32) for c in range(24)] for seed in seeds.tolist()]
        assert torch.equal(mask.cpu(), torch.tensor(expected)[:, :, None, None])


def test_counts_of_many_patches_are_exact() -> None:
    for size in ((128, 128), (1, 65537), (257, 255)):
        patches = size[0] * size[1]
        for ratio in (0.37, 1 - 1.5 / patches):
            kept = patch_mask(some_seeds(2), size, ratio=ratio)
            assert ((~kept).sum((1, 2, 3)) == int(ratio * patches)).all(), (size, ratio)


# what the formula is worth. Seeds are fixed, so nothing fails by chance; limits are 5 sigma

SIGMA, CONSECUTIVE = 5.0, torch.arange(4096)


def masked_patches(seeds: Tensor, patches: int, count: int) -> Tensor:
    """(N, P) fp64, 1 where a patch is masked."""
    mask = patch_mask(seeds.to(DEVICE), (1, patches), ratio=min((count + 0.5) / patches, 1.0))
    return (~mask[:, 0, 0]).cpu().double()


def deviations(counts: Tensor, number: int, probability: float) -> Tensor:
    """Counts among `number` trials, in sigma of the binomial distribution."""
    return (counts - number * probability) / math.sqrt(number * probability * (1 - probability))


@pytest.mark.parametrize(("patches", "count"), [(4, 2), (6, 3), (7, 2)])
@pytest.mark.parametrize("first", [0, 2**32 - 4096], ids=["first-seeds", "last-seeds"])
def test_all_sets_of_patches_are_equally_likely(patches: int, count: int, first: int) -> None:
    masked = masked_patches(first + CONSECUTIVE, patches, count)
    sets = torch.tensor([sum(2**p for p in chosen) for chosen in combinations(range(patches), count)])
    counts = (masked @ 2.0 ** torch.arange(patches).double() == sets[:, None]).sum(1)
    assert counts.sum() == 4096 and deviations(counts, 4096, 1 / len(sets)).abs().max() < SIGMA


@pytest.mark.parametrize("distance", [0, 1, 2**16, 0x9E3779B9])
def test_patches_and_seeds_are_unrelated(distance: int) -> None:
    one, other = (masked_patches((CONSECUTIVE + d) % 2**32, 64, 16) for d in (0, distance))
    both = 0.25**2 if distance else 16 * 15 / (64 * 63)
    # patch p with one seed and patch q with the other
    off = deviations((one.T @ other).fill_diagonal_(4096 * both) if not distance else one.T @ other, 4096, both)
    assert off.abs().max() < SIGMA
    assert deviations(one.sum(0), 4096, 0.25).abs().max() < SIGMA


def test_channels_are_independent() -> None:
    masked = (~channel_mask(CONSECUTIVE.to(DEVICE), 24, ratio=0.3)[:, :, 0, 0]).cpu().double()
    pairs = masked.T @ masked
    assert deviations(pairs.diagonal(), 4096, 0.3).abs().max() < SIGMA
    first, second = torch.triu_indices(24, 24, 1)
    assert deviations(pairs[first, second], 4096, 0.09).abs().max() < SIGMA


# images

# batch, channels, rows of patches, patches in a row, side of a patch: one tile and several, and numbers of patches that
# walk cycles
SHAPES = [(1, 1, 1, 1, 1), (1, 5, 2, 3, 4), (2, 1, 37, 41, 1), (2, 6, 4, 16, 3)]


@every_impl
@pytest.mark.parametrize(
    ("b", "c", "rows", "columns", "patch"), SHAPES, ids=["B{}-C{}-{}x{}-patch{}".format(*shape) for shape in SHAPES]
)
def test_masked_values_are_zero_and_others_keep_their_bits(
    b: int, c: int, rows: int, columns: int, patch: int, impl: Any
) -> None:
    images, seeds = made(b, c, rows * patch, columns * patch), some_seeds(b)
    for layout in ("contiguous", "channels-last"):
        kept = patch_mask(seeds, images.shape[2:], ratio=0.6, patch=patch)
        # NaN where masked, in images and in gradients, must not come through
        spoilt = laid_out(torch.where(kept, images, math.nan), layout).requires_grad_()
        masked = mask_patches(spoilt, seeds, ratio=0.6, patch=patch, impl=impl)
        assert torch.equal(masked, torch.where(kept, images, 0))
        (gradient,) = torch.autograd.grad(masked, spoilt, torch.where(kept, images, math.nan))
        assert torch.equal(gradient, torch.where(kept, images, 0))
        kept = channel_mask(seeds, c, ratio=0.6)
        masked = mask_channels(laid_out(torch.where(kept, images, math.nan), layout), seeds, ratio=0.6, impl=impl)
        assert torch.equal(masked, torch.where(kept, images, 0))


@needs_gpu
def test_masks_are_the_same_on_a_gpu() -> None:
    for size, patch in (((37, 41), 1), ((64, 64), 8), ((300, 301), 1)):
        here, there = (patch_mask(x, size, ratio=0.25, patch=patch) for x in (some_seeds(50), some_seeds(50).cpu()))
        assert torch.equal(here.cpu(), there)


# errors


def test_ratios_out_of_range_are_errors() -> None:
    images, seeds = made(2, 1, 6, 8), some_seeds(2)
    for ratio in (-0.1, 1.1, math.nan):
        for call in (
            lambda ratio: mask_patches(images, seeds, ratio=ratio),
            lambda ratio: mask_channels(images, seeds, ratio=ratio),
        ):
            with pytest.raises(ValueError, match=f"ratio .*{ratio}"):
                call(ratio)


@pytest.mark.parametrize("patch", [0, -2, 4, 5, 64])
def test_patches_that_do_not_tile_are_errors(patch: int) -> None:
    # 4 divides the width alone, 5 the height alone
    with pytest.raises(ValueError, match=f"patches of {patch} px do not tile images of 30x32"):
        mask_patches(made(2, 1, 30, 32), some_seeds(2), ratio=0.5, patch=patch)
