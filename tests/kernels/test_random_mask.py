"""kernels.random_mask, every implementation, against what the masks say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.random_mask import channel_mask, mask_patches, patch_mask
from tests.kernels import views
from tests.kernels.random_mask_cases import channels_of, patches_of, some
from tests.kernels.views import DEVICE, every_float, every_impl, every_layout, made


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
