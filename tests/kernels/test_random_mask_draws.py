"""kernels.random_mask: what is masked, counted and held to the statistics of draws.

Seeds are fixed, so nothing here fails by chance. Limits are 5 sigma of the binomial distribution, or what is as
unlikely of the largest of many such numbers and of χ²: masks that are as good as random stay far within.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.random_mask import channel_mask, patch_mask
from tests.kernels.random_mask_cases import some
from tests.kernels.views import DEVICE

SIGMA = 5.0
SEEDS = {
    "consecutive": torch.arange(4096),
    "last": torch.arange(2**32 - 4096, 2**32),
    "multiples": torch.arange(4096) << 20,
    "golden": torch.arange(4096) * 0x9E3779B9 % 2**32,
    "random": torch.randint(2**32, (4096,), generator=Generator().manual_seed(0)),
}
# the golden ratio, and the multipliers of well-known hashes, are steps that an implementation may take itself
DISTANCES = [1, 2, 3, 17, 256, 2**16, 2**24, 2**31, 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35]
every_seed = pytest.mark.parametrize("seeds", list(SEEDS.values()), ids=list(SEEDS))
# pixels by rows of patches, patches of a row, then the side of a patch
GRIDS = [
    (1, 1, 1), (1, 2, 1), (3, 1, 1), (2, 2, 1), (1, 5, 1), (3, 5, 1), (4, 4, 1), (13, 7, 1), (16, 16, 1), (37, 41, 1),
    (1, 1, 4), (2, 1, 3), (3, 3, 2), (8, 8, 4), (7, 9, 2), (2, 50, 3), (1, 3, 16),
]  # fmt: skip
RATIOS = [0.0, 0.01, 0.1, 0.25, 0.29, 0.5, 0.57, 0.75, 0.999, 1.0]


def masked_patches(seeds: Tensor, patches: int, count: int) -> Tensor:
    """(N, P) float64, on the CPU: 1 where a patch is masked."""
    # the middle between two counts: no product of floats decides
    mask = patch_mask(seeds.to(DEVICE), (1, patches), ratio=min((count + 0.5) / patches, 1.0))
    return (~mask[:, 0, 0]).cpu().double()


def masked_channels(seeds: Tensor, channels: int, ratio: float) -> Tensor:
    return (~channel_mask(seeds.to(DEVICE), channels, ratio=ratio)[:, :, 0, 0]).cpu().double()


def chi_square_limit(freedom: int) -> float:
    """Wilson and Hilferty: a χ² to the power 1/3 is nearly normal."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + SIGMA * math.sqrt(share)) ** 3


def largest_of(number: int) -> float:
    """The largest of many normal numbers, in sigma, that is as unlikely as SIGMA of one."""
    one = 2 * NormalDist().cdf(-SIGMA)
    return -NormalDist().inv_cdf(one / number / 2)


def deviations(counts: Tensor, number: int, chance: float) -> Tensor:
    """Of counts among so many, in sigma of the binomial distribution."""
    return (counts - number * chance) / math.sqrt(number * chance * (1 - chance))


# which patches


@pytest.mark.parametrize(("rows", "columns", "patch"), GRIDS, ids=[f"{r}x{c}-patch{p}" for r, c, p in GRIDS])
def test_counts_are_exact(rows: int, columns: int, patch: int) -> None:
    seeds, patches = some(9), rows * columns
    for ratio in [*RATIOS, *((k + 0.5) / patches for k in range(min(patches, 9)))]:
        mask = patch_mask(seeds, (rows * patch, columns * patch), ratio=ratio, patch=patch)
        assert mask.shape == (9, 1, rows * patch, columns * patch) and mask.dtype == torch.bool
        assert mask.device == seeds.device
        # whole patches, of the side of a patch
        tiles = mask.view(9, rows, patch, columns, patch)
        of_patch = tiles[:, :, :1, :, :1]
        assert torch.equal(tiles, of_patch.expand_as(tiles))
        assert ((~of_patch).sum((1, 2, 3, 4)) == int(ratio * patches)).all(), ratio


def test_counts_of_many_patches_are_exact() -> None:
    for size in ((128, 128), (250, 301), (1, 65537), (257, 255)):
        patches = size[0] * size[1]
        for ratio in (0.37, 1 - 1.5 / patches):
            kept = patch_mask(some(2), size, ratio=ratio)
            assert ((~kept).sum((1, 2, 3)) == int(ratio * patches)).all(), (size, ratio)


def test_what_is_masked_is_a_function_of_the_seed() -> None:
    seeds = some(12)
    for patches, patch in ((12, 1), (64, 2)):
        size = (patch, patches * patch)
        mask = patch_mask(seeds, size, ratio=0.4, patch=patch)
        assert torch.equal(patch_mask(seeds.flip(0), size, ratio=0.4, patch=patch), mask.flip(0))
        assert torch.equal(patch_mask(seeds[5:6], size, ratio=0.4, patch=patch), mask[5:6])
        # patches are numbered by rows, whatever the grid
        numbered = mask[:, 0, ::patch, ::patch].flatten(1)
        folded = patch_mask(seeds, (4 * patch, patches // 4 * patch), ratio=0.4, patch=patch)
        assert torch.equal(folded[:, 0, ::patch, ::patch].flatten(1), numbered)
    channels = channel_mask(seeds, 12, ratio=0.4)
    assert channels.shape == (12, 12, 1, 1) and channels.dtype == torch.bool and channels.device == seeds.device
    assert torch.equal(channel_mask(seeds.flip(0), 12, ratio=0.4), channels.flip(0))
    assert torch.equal(channel_mask(seeds, 5, ratio=0.4), channels[:, :5])


def test_a_larger_ratio_masks_more() -> None:
    seeds = some(20)
    for smaller, larger in pairwise(RATIOS):
        few, many = (patch_mask(seeds, (6, 17), ratio=ratio) for ratio in (smaller, larger))
        assert (few | ~many).all()
        few, many = (channel_mask(seeds, 40, ratio=ratio) for ratio in (smaller, larger))
        assert (few | ~many).all()


@every_seed
@pytest.mark.parametrize(
    ("patches", "count"),
    [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 2), (6, 3), (7, 3), (16, 4), (17, 8), (64, 1), (64, 32), (100, 75)],
)
def test_every_patch_is_masked_equally_often(patches: int, count: int, seeds: Tensor) -> None:
    counts, chance = masked_patches(seeds, patches, count).sum(0), count / patches
    off = deviations(counts, len(seeds), chance)
    assert off.abs().max() <= largest_of(patches)
    # patches of one image exclude each other: less the (P − 1)/P of it
    assert (patches - 1) / patches * off.square().sum() <= chi_square_limit(patches - 1)


@every_seed
@pytest.mark.parametrize(
    ("patches", "count"), [(4, 2), (6, 2), (6, 3), (9, 4), (16, 4), (16, 8), (64, 16), (64, 32), (64, 48)]
)
def test_pairs_of_patches_are_nearly_independent(patches: int, count: int, seeds: Tensor) -> None:
    masked = masked_patches(seeds, patches, count)
    first, second = torch.triu_indices(patches, patches, 1)
    both = count * (count - 1) / (patches * (patches - 1))
    off = deviations((masked.T @ masked)[first, second], len(seeds), both)
    assert off.abs().max() <= largest_of(len(off))
    # less what each patch does on its own, there remain P·(P − 3)/2 independent numbers
    share = count / patches
    products = ((masked - share).T @ (masked - share))[first, second]
    neither, one = 1 - 2 * share + both, share - both
    mean = -share * (1 - share) / (patches - 1)
    variance = both * (1 - share) ** 4 + 2 * one * (share * (1 - share)) ** 2 + neither * share**4 - mean**2
    off = (products - len(seeds) * mean) / math.sqrt(len(seeds) * variance)
    freedom = patches * (patches - 3) // 2
    assert off.square().mean() * freedom <= chi_square_limit(freedom)


@every_seed
@pytest.mark.parametrize(("patches", "count"), [(3, 1), (4, 2), (4, 3), (5, 2), (6, 3), (7, 2)])
def test_all_sets_of_patches_are_equally_likely(patches: int, count: int, seeds: Tensor) -> None:
    masked = masked_patches(seeds, patches, count)
    sets = [sum(2**p for p in chosen) for chosen in combinations(range(patches), count)]
    numbers = masked @ 2.0 ** torch.arange(patches, dtype=torch.float64)
    counts = torch.tensor([int((numbers == one).sum()) for one in sets], dtype=torch.float64)
    assert counts.sum() == len(seeds)
    expected = len(seeds) / len(sets)
    assert deviations(counts, len(seeds), 1 / len(sets)).abs().max() <= largest_of(len(sets))
    assert ((counts - expected).square() / expected).sum() <= chi_square_limit(len(sets) - 1)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("patches", "count"), [(4, 2), (6, 3), (16, 4), (64, 32)])
def test_seeds_are_unrelated(patches: int, count: int, distance: int) -> None:
    seeds = torch.arange(4096)
    one, other = (masked_patches(x, patches, count) for x in (seeds, (seeds + distance) % 2**32))
    # patch p for one seed and patch q for the other
    off = deviations(one.T @ other, len(seeds), (count / patches) ** 2)
    assert off.abs().max() <= largest_of(off.numel())
    # how many patches both mask: a hypergeometric number
    variance = count**2 * (patches - count) ** 2 / (patches**2 * (patches - 1))
    shared = (one * other).sum(1)
    assert (shared.mean() - count**2 / patches).abs() <= SIGMA * math.sqrt(variance / len(seeds))
    assert (shared.var() / variance - 1).abs() <= SIGMA * math.sqrt(2 / len(seeds))


def test_no_two_seeds_mask_the_same() -> None:
    for seeds in SEEDS.values():
        assert len(masked_patches(seeds, 64, 32).unique(dim=0)) == len(seeds)


def test_masks_have_no_direction() -> None:
    # a permutation that adds or multiplies keeps neighbours together, or apart
    for rows, columns, ratio in ((16, 16, 0.5), (15, 17, 0.25), (8, 32, 0.75)):
        mask = (~patch_mask(torch.arange(4096, device=DEVICE), (rows, columns), ratio=ratio))[:, 0].cpu().double()
        patches, count = rows * columns, int(ratio * rows * columns)
        chance = count * (count - 1) / (patches * (patches - 1))
        # with their number fixed, and around the edges, only the products of two deviations vary
        spread = count / patches * (1 - count / patches) * math.sqrt(mask.numel())
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1), (2, 0), (0, 2), (3, 0), (0, 4), (0, 5), (3, 7)):
            pairs = mask * mask.roll(shift, (1, 2))
            assert (pairs.sum() - pairs.numel() * chance).abs() <= SIGMA * spread, (rows, columns, shift)


# which channels


@every_seed
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
def test_channels_are_masked_as_often_as_asked(ratio: float, seeds: Tensor) -> None:
    masked = masked_channels(seeds, 24, ratio)
    off = deviations(masked.sum(0), len(seeds), ratio)
    assert off.abs().max() <= largest_of(24) and off.square().sum() <= chi_square_limit(24)
    assert abs(float(deviations(masked.sum(), masked.numel(), ratio))) <= SIGMA
    first, second = torch.triu_indices(24, 24, 1)
    off = deviations((masked.T @ masked)[first, second], len(seeds), ratio**2)
    assert off.abs().max() <= largest_of(len(off))
    # independent channels: their number is binomial
    spread = float(masked.sum(1).var()) / (24 * ratio * (1 - ratio))
    kurtosis = 2 + (1 - 6 * ratio * (1 - ratio)) / (24 * ratio * (1 - ratio))
    assert abs(spread - 1) <= SIGMA * math.sqrt(kurtosis / len(seeds))


def test_ratios_of_channels_are_fine() -> None:
    # 8 or 16 bits of a hash would be enough for the seeds above
    seeds = torch.arange(2**16)
    for ratio in (0.0003, 0.05, 0.4997):
        masked = masked_channels(seeds, 64, ratio)
        assert abs(float(deviations(masked.sum(), masked.numel(), ratio))) <= SIGMA


@pytest.mark.parametrize("distance", DISTANCES)
def test_channels_of_other_seeds_are_unrelated(distance: int) -> None:
    seeds = torch.arange(4096)
    one, other = (masked_channels(x, 24, 0.3) for x in (seeds, (seeds + distance) % 2**32))
    assert deviations(one.T @ other, len(seeds), 0.09).abs().max() <= largest_of(24**2)


def test_ratios_of_none_and_all_are_exact() -> None:
    seeds = torch.cat([x[:500] for x in SEEDS.values()]).to(DEVICE)
    assert channel_mask(seeds, 200, ratio=0.0).all() and not channel_mask(seeds, 200, ratio=1.0).any()
    assert channel_mask(seeds, 200, ratio=0).all() and not channel_mask(seeds, 200, ratio=1).any()
    assert patch_mask(seeds, (3, 5), ratio=0.0).all() and not patch_mask(seeds, (3, 5), ratio=1.0).any()
    assert patch_mask(seeds, (3, 5), ratio=0).all() and not patch_mask(seeds, (3, 5), ratio=1).any()
