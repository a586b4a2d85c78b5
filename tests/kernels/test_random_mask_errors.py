"""What kernels.random_mask does not take, and what it says then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.random_mask import channel_mask, mask_channels, mask_patches, patch_mask
from tests.kernels import views
from tests.kernels.random_mask_cases import channels_of, patches_of, some
from tests.kernels.views import DEVICE, every_bad_image, every_impl, made


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
