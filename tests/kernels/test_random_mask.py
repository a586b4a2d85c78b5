"""kernels.random_mask: what is masked, counted and held to the statistics of draws; then every implementation to that.

Seeds are fixed, so nothing here fails by chance. Limits are 5 sigma of the binomial distribution, or what is as
unlikely of the largest of many such numbers and of χ²: masks that are as good as random stay far within.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels.random_mask import channel_mask, mask_channels, mask_patches, patch_mask
from tests.kernels import views
from tests.kernels.views import DEVICE, every_bad_image, every_float, every_impl, every_layout, made, needs_gpu

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


def some(number: int, seed: int = 3) -> Tensor:
    """Seeds, the smallest and the largest among them."""
    seeds = torch.randint(2**32, (number,), generator=Generator().manual_seed(seed))
    for i, value in enumerate([2**32 - 1, 0, 2**31, 2**31 - 1][:number]):
        seeds[i] = value
    return seeds.to(DEVICE)


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


# what is done with it

Operator = Callable[..., Any]


def patches_of(seeds: Tensor, ratio: float, patch: int = 1, **options: Any) -> Operator:
    return lambda images: mask_patches(images, seeds, ratio=ratio, patch=patch, **options)


def channels_of(seeds: Tensor, ratio: float, **options: Any) -> Operator:
    return lambda images: mask_channels(images, seeds, ratio=ratio, **options)


def check_patches(images: Tensor | Sequence[Tensor], ratio: float, patch: int = 1, **options: Any) -> None:
    batch, _, height, width = images.shape if isinstance(images, Tensor) else images[0].shape
    seeds = some(batch)
    kept = patch_mask(seeds, (height, width), ratio=ratio, patch=patch).cpu()

    def masked(x: Tensor) -> Tensor:
        return torch.where(kept, x, 0)

    views.check(patches_of(seeds, ratio, patch, **options), images, masked, masked, options.get("impl", "auto"))


def check_channels(images: Tensor | Sequence[Tensor], ratio: float, **options: Any) -> None:
    seeds = some(len(images) if isinstance(images, Tensor) else len(images[0]))

    def masked(x: Tensor) -> Tensor:
        return torch.where(channel_mask(seeds, x.shape[1], ratio=ratio).cpu(), x, 0)

    views.check(channels_of(seeds, ratio, **options), images, masked, masked, options.get("impl", "auto"))


# what does not ask for other numbers has a power of 4, and at least 64, of patches below: permuting few of them, or
# another number, walks long cycles, which takes the interpreter ten times as long

# batch, channels, rows of patches, patches of a row, side of a patch
SHAPES = [
    (1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 3, 3, 1, 1), (3, 1, 6, 9, 1), (1, 5, 2, 3, 4), (2, 2, 37, 41, 1),
    (2, 2, 4, 4, 7), (1, 1, 3, 700, 1), (1, 2, 130, 3, 3), (2, 1, 8, 8, 8), (1, 1, 1, 1, 30),
]  # fmt: skip


@every_impl
@pytest.mark.parametrize(
    ("b", "c", "rows", "columns", "patch"), SHAPES, ids=["B{}-C{}-{}x{}-patch{}".format(*shape) for shape in SHAPES]
)
def test_masked_is_what_the_mask_says(b: int, c: int, rows: int, columns: int, patch: int, impl: Any) -> None:
    images = made(b, c, rows * patch, columns * patch)
    check_patches(images, 0.6, patch, impl=impl)
    check_patches(views.laid_out(images, "channels-last"), 0.4, patch, impl=impl)
    check_channels(images, 0.6, impl=impl)


@every_impl
def test_a_count_of_every_implementation(impl: Any) -> None:
    seeds = some(2)
    for rows, columns, patch in ((5, 5, 1), (3, 7, 2)):
        ones = torch.ones(2, 1, rows * patch, columns * patch, device=DEVICE)
        for ratio in (0.0, 0.29, 0.57, 1.0):
            zeros = (mask_patches(ones, seeds, ratio=ratio, patch=patch, impl=impl) == 0).sum((2, 3))
            assert (zeros == int(ratio * rows * columns) * patch**2).all()


@every_impl
@pytest.mark.parametrize("dtype", [*views.FLOATS.values(), torch.uint8], ids=[*views.FLOATS, "uint8"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_dtypes(layout: str, dtype: torch.dtype, impl: Any) -> None:
    images = views.laid_out(made(1, 2, 12, 48, dtype=dtype), layout)
    check_patches(images, 0.4, 3, impl=impl)
    check_channels(images, 0.4, impl=impl)
    if images.is_floating_point():
        # what is kept is not touched: no rounding
        kept = patch_mask(some(1), (12, 48), ratio=0.4)
        found = mask_patches(images, some(1), ratio=0.4, impl=impl)
        assert torch.equal(found, torch.where(kept, images, 0))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_fp64(layout: str) -> None:
    images = views.laid_out(made(4, 3, 12, 15, dtype=torch.float64), layout)
    check_patches(images, 0.4, 3)
    check_channels(images, 0.4)
    check_patches([images, images.float()], 0.4)
    check_channels([images, images.float()], 0.4)


@every_impl
@every_layout
def test_layouts(layout: str, impl: Any) -> None:
    check_patches(views.laid_out(made(2, 2, 8, 32), layout), 0.4, 2, impl=impl)
    check_channels(views.laid_out(made(2, 3, 4, 6), layout), 0.4, impl=impl)


@every_impl
def test_gradients_of_any_layout(impl: Any) -> None:
    for operator in (patches_of(some(2), 0.4, impl=impl), channels_of(some(2), 0.4, impl=impl)):
        for layout in ("contiguous", "channels-last"):
            views.takes_gradients_of_any_layout(operator, views.laid_out(made(2, 2, 4, 16), layout))


@every_impl
def test_seeds_may_be_strided_or_expanded(impl: Any) -> None:
    images, seeds = made(4, 3, 4, 16), some(4)
    for given in (torch.stack([seeds, seeds + 1], 1)[:, 0], seeds[:1].expand(4)):
        for operator in (patches_of, channels_of):
            expected = views.value_and_gradients(operator(given.clone(), 0.5, impl=impl), [images])
            found = views.value_and_gradients(operator(given, 0.5, impl=impl), [images])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_impl
@every_float
def test_autocast_changes_nothing(dtype: torch.dtype, impl: Any) -> None:
    images = made(1, 2, 4, 16, dtype=dtype)
    for operator in (patches_of(some(1), 0.4, impl=impl), channels_of(some(1), 0.4, impl=impl)):
        plain = views.value_and_gradients(operator, [images])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            cast = views.value_and_gradients(operator, [images])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_masked_is_zero_whatever_was_there(value: float, layout: str, impl: Any) -> None:
    seeds, images = some(2), made(2, 2, 8, 32)
    for operator, kept in (
        (patches_of(seeds, 0.5, 2, impl=impl), patch_mask(seeds, (8, 32), ratio=0.5, patch=2).expand_as(images)),
        (channels_of(seeds, 0.5, impl=impl), channel_mask(seeds, 2, ratio=0.5).expand_as(images)),
    ):
        leaf = views.laid_out(torch.where(kept, images, value), layout).requires_grad_()
        found = operator(leaf)
        assert torch.equal(found, torch.where(kept, images, 0))
        # and no gradient gets there
        (gradient,) = torch.autograd.grad(found, leaf, torch.where(kept, images, value))
        assert torch.equal(gradient, torch.where(kept, images, 0))
        spoilt = views.laid_out(torch.full_like(images, value), layout)
        assert torch.equal(operator(spoilt), torch.where(kept, spoilt, 0)) or math.isnan(value)
        assert not operator(spoilt)[~kept].any()


# sequences


@every_impl
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_sequences(number: int, impl: Any) -> None:
    images = (list if number % 2 else tuple)(views.mixed(number, 2, 8, 32))
    check_patches(images, 0.4, 2, impl=impl)
    check_channels(images, 0.4, impl=impl)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_sequences_of_equals(layout: str, impl: Any) -> None:
    images = [views.laid_out(made(2, 3, 4, 16, seed=i), layout) for i in range(5)]
    # one image twice
    for several in (images, [images[0], images[1], images[0]]):
        check_patches(several, 0.4, impl=impl)
        check_channels(several, 0.4, impl=impl)


@every_impl
def test_gradient_goes_only_where_it_is_asked_for(impl: Any) -> None:
    for operator in (patches_of(some(2), 0.4, impl=impl), channels_of(some(2), 0.4, impl=impl)):
        views.gradient_goes_only_where_it_is_asked_for(operator, (2, 4, 16))


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "uint8"])
def test_no_images(dtype: torch.dtype, impl: Any) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert patch_mask(none, (6, 9), ratio=0.5, patch=3).shape == (0, 1, 6, 9)
    assert channel_mask(none, 4, ratio=0.5).shape == (0, 4, 1, 1)
    for operator in (patches_of(none, 0.5, 3, impl=impl), channels_of(none, 0.5, impl=impl)):
        for layout in ("contiguous", "channels-last"):
            images = views.laid_out(made(0, 3, 6, 9, dtype=dtype), layout).requires_grad_(dtype != torch.uint8)
            found = operator(images)
            assert found.shape == (0, 3, 6, 9) and found.dtype == views.result_dtype(dtype)
            if images.requires_grad:
                found.sum().backward()
                assert images.grad is not None and images.grad.shape == images.shape
        assert [x.shape for x in operator([images, images])] == [(0, 3, 6, 9)] * 2


# how torch takes it


def test_gradcheck() -> None:
    images = [made(3, c, 2, 4, seed=c, dtype=torch.float64).requires_grad_() for c in (1, 2)]
    for operator in (patches_of(some(3), 0.4, 2, impl="torch"), channels_of(some(3), 0.4, impl="torch")):
        assert torch.autograd.gradcheck(operator, images[1])
        assert torch.autograd.gradcheck(lambda *x: operator(x), images)  # noqa: B023


def test_gradgradcheck() -> None:
    images = made(3, 2, 2, 4, dtype=torch.float64).requires_grad_()
    for operator in (patches_of(some(3), 0.4, 2, impl="torch"), channels_of(some(3), 0.4, impl="torch")):
        assert torch.autograd.gradgradcheck(operator, images)


@every_impl
def test_opcheck(impl: Any) -> None:
    images = made(2, 2, 8, 32)
    views.passes_opcheck("random_mask", patches_of(some(2), 0.4, 2, impl=impl), [images])
    channels_last = views.laid_out(images, "channels-last")
    views.passes_opcheck("random_mask", channels_of(some(2), 0.4, impl=impl), [channels_last])


@every_impl
def test_opcheck_of_sequences(impl: Any) -> None:
    operator = patches_of(some(1), 0.4, impl=impl)
    views.passes_opcheck("random_mask", lambda *x: operator(x), views.mixed(3, 1, 4, 16))


@every_impl
def test_the_same_bits_twice(impl: Any) -> None:
    for operator in (patches_of(some(2), 0.4, impl=impl), channels_of(some(2), 0.4, impl=impl)):
        views.same_bits_twice(lambda *x: operator(x), views.mixed(2, 2, 16, 64))  # noqa: B023


@every_impl
@pytest.mark.parametrize("kind", ["patches", "channels"])
def test_full_graph_compile(kind: str, impl: Any) -> None:
    operator = patches_of(some(1), 0.4, 2, impl=impl) if kind == "patches" else channels_of(some(1), 0.4, impl=impl)

    def doubled(images: Tensor) -> Tensor:
        return operator(2 * images) + 1

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator(images))

    views.compiled_equals_eager(doubled, [made(1, 2, 8, 32)])
    views.compiled_equals_eager(operator, [views.laid_out(made(1, 2, 8, 32), "channels-last")])
    views.compiled_equals_eager(several, views.mixed(3, 1, 8, 32))


def test_full_graph_compile_by_inductor() -> None:
    def several(*images: Tensor) -> tuple[Tensor, ...]:
        patched = mask_patches([2 * x for x in images], seeds, ratio=0.4, patch=2)
        return tuple(x + 1 for x in mask_channels(patched, seeds, ratio=0.4))

    seeds = some(3)
    views.compiled_equals_eager(several, [made(3, 2, 8, 10), made(3, 1, 8, 10, seed=1)], backend="inductor")


def test_compiles_for_all_batches_at_once() -> None:
    seeds = some(9)

    def masked(images: Tensor) -> Tensor:
        return mask_patches(images, seeds[: images.shape[0]], ratio=0.4)

    views.compiled_equals_eager(masked, *([made(b, 2, 8, 9)] for b in (3, 5, 9)), dynamic=True)


def test_auto_takes_what_suits_the_device() -> None:
    for function in (mask_patches, mask_channels):
        views.auto_takes_what_suits(lambda x, **o: function(x, some(3), ratio=0.4, **o), made(3, 3, 12, 10))  # noqa: B023


# errors


@pytest.mark.parametrize("ratio", [-0.1, 1.1, -1, 2, math.nan, math.inf])
def test_ratios_out_of_range(ratio: float) -> None:
    for call in (
        lambda: mask_patches(made(2, 1, 6, 8), some(2), ratio=ratio),
        lambda: mask_channels(made(2, 1, 6, 8), some(2), ratio=ratio),
        lambda: patch_mask(some(2), (6, 8), ratio=ratio),
        lambda: channel_mask(some(2), 3, ratio=ratio),
    ):
        with pytest.raises(ValueError, match=str(ratio)):
            call()


@pytest.mark.parametrize("patch", [0, -2, 4, 3, 5, 64])
def test_patches_that_do_not_tile(patch: int) -> None:
    says = f"patches of {patch} px do not tile images of 30x32" if patch > 0 else str(patch)
    with pytest.raises(ValueError, match=says):
        mask_patches(made(2, 1, 30, 32), some(2), ratio=0.5, patch=patch)
    with pytest.raises(ValueError, match=says):
        patch_mask(some(2), (30, 32), ratio=0.5, patch=patch)


@every_impl
@every_bad_image
def test_images_that_it_does_not_take(bad: Callable[[], Any], says: str, impl: Any) -> None:
    for operator in (patches_of(some(2), 0.5, impl=impl), channels_of(some(2), 0.5, impl=impl)):
        with pytest.raises(ValueError, match=says):
            operator(bad())


@every_impl
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:3], r"\(3,\)|\b3\b"),
        (lambda x: x[:, None], r"4\D+1"),
        (lambda x: x[0], r"\(\)|\[\]|scalar|shape"),
        (lambda x: x.float(), "float32"),
        (lambda x: x.int(), "int32"),
        (lambda x: x > 0, "bool"),
        (lambda x: x.to("meta"), "meta"),
    ],
    ids=["too-few", "two-axes", "no-axis", "float", "int32", "bool", "other-device"],
)
def test_seeds_that_are_no_seeds(change: Callable[[Tensor], Tensor], says: str, impl: Any) -> None:
    seeds = change(torch.arange(4, device=DEVICE))
    for operator in (patches_of(seeds, 0.5, impl=impl), channels_of(seeds, 0.5, impl=impl)):
        with pytest.raises(ValueError, match=says) as raised:
            operator(made(4, 1, 5, 8))
        assert "seeds" in str(raised.value)


def test_choices_that_cannot_be_had() -> None:
    for function in (mask_patches, mask_channels):
        views.choices_that_cannot_be_had(
            lambda x, impl: function(x, some(2), ratio=0.5, impl=impl),  # noqa: B023
            made(2, 1, 6, 8),
        )


# what only a GPU can show


@needs_gpu
def test_a_gpu_masks_what_a_cpu_does() -> None:
    for size, patch in (((37, 41), 1), ((64, 64), 8), ((300, 301), 1)):
        for ratio in (0.25, 0.5):
            here = patch_mask(some(50), size, ratio=ratio, patch=patch)
            assert torch.equal(here.cpu(), patch_mask(some(50).cpu(), size, ratio=ratio, patch=patch))
    for ratio in (0.25, 0.5):
        here = channel_mask(some(50), 300, ratio=ratio)
        assert torch.equal(here.cpu(), channel_mask(some(50).cpu(), 300, ratio=ratio))


@needs_gpu
@every_impl
@pytest.mark.parametrize("kind", ["patches", "channels"])
def test_cuda_graph(kind: str, impl: Any) -> None:
    images = [made(8, 3, 128, 100, seed=i).requires_grad_() for i in range(3)]
    seeds = some(8)
    operator = patches_of(seeds, 0.6, 4, impl=impl) if kind == "patches" else channels_of(seeds, 0.6, impl=impl)

    def step() -> list[Tensor]:
        results = operator(images)
        return [*results, *torch.autograd.grad(torch.stack([x.square().sum() for x in results]).sum(), images)]

    def change() -> None:
        seeds.copy_(some(8, seed=4))
        for i, image in enumerate(images):
            image.data.copy_(made(8, 3, 128, 100, seed=10 + i))

    views.replays(step, change)


@needs_gpu
@every_impl
def test_waits_for_no_gpu(impl: Any) -> None:
    for operator in (patches_of(some(8), 0.6, 4, impl=impl), channels_of(some(8), 0.6, impl=impl)):
        views.waits_for_no_gpu(operator, made(8, 3, 64, 52))
