"""The operators on images as compiled for GPUs that need not be there: the PTX is executed and held to float64.

A result in bf16 may be off by one rounding, and a mask not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels import crop_resize as crop_resize_module
from fastle.kernels.images import Images
from fastle.kernels.random_mask import mask_channels, mask_patches
from tests.kernels import crop_resize_cases as crops
from tests.kernels import mask_fill_cases as holes
from tests.kernels import views
from tests.kernels.image_operators import channel_mask, patch_mask, some_seeds
from tests.kernels.views import laid_out, made
from tests.ptx.executor import DeviceAssert
from tests.ptx.launches import every_arch, executed, marks, other_archs

pytestmark = marks

Exact = Callable[[Tensor], Tensor]


def check(operator: Callable[[Any], Any], images: Images, exact: Exact, to_images: Exact, arch: int) -> None:
    """Values and gradients against two formulas, with one rounding to half precision."""
    with executed(arch) as launched:
        views.check(operator, images, exact, to_images, "ptx")
    assert launched


def size_of(images: Images) -> tuple[int, int]:
    height, width = (images if isinstance(images, Tensor) else images[0]).shape[2:]
    return height, width


def check_crop(images: Images, boxes_B4: Tensor, arch: int, tensors: str = "", out: crops.Out = None) -> None:
    check(
        crops.applied(boxes_B4, tensors, out_size=out, impl="triton"),
        images,
        lambda x: crops.resized(x, boxes_B4, out),
        lambda gradient: crops.resized_adjoint(gradient, boxes_B4, size_of(images)),
        arch,
    )


def check_fill(images: Images, corners_B2: Tensor, box: tuple[int, int], arch: int) -> None:
    check(
        holes.applied(corners_B2, box, impl="triton"),
        images,
        lambda x: holes.filled(x, corners_B2, box),
        lambda gradient: holes.filled_adjoint(gradient, corners_B2, box),
        arch,
    )


def check_patches(images: Images, batch: int, patch: int, arch: int) -> None:
    seeds = some_seeds(batch)
    kept = patch_mask(seeds, size_of(images), ratio=0.6, patch=patch)

    def masked(x: Tensor) -> Tensor:
        return torch.where(kept, x, 0)

    def operator(x: Any) -> Any:
        return mask_patches(x, seeds, ratio=0.6, patch=patch, impl="triton")

    check(operator, images, masked, masked, arch)


def check_channels(images: Images, batch: int, arch: int) -> None:
    seeds = some_seeds(batch)

    def masked(x: Tensor) -> Tensor:
        return torch.where(channel_mask(seeds, x.shape[1], ratio=0.6), x, 0)

    def operator(x: Any) -> Any:
        return mask_channels(x, seeds, ratio=0.6, impl="triton")

    check(operator, images, masked, masked, arch)


# what a sequence may mix: the first and the fourth share a launch
MIXED = [
    (3, torch.float32, "contiguous"),
    (3, torch.bfloat16, "channels-last"),
    (1, torch.uint8, "contiguous"),
    (3, torch.float32, "contiguous"),
    (5, torch.float16, "strided"),
]


def mixed(number: int, batch: int, height: int, width: int) -> list[Tensor]:
    return [
        laid_out(made(batch, channels, height, width, seed=i, dtype=dtype), layout)
        for i, (channels, dtype, layout) in enumerate(MIXED[:number])
    ]


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return laid_out(made(*shape, dtype=dtype), "channels-last")


# crop and its gradient


@every_arch
def test_crop_of_every_dtype_and_layout(arch: int) -> None:
    check_crop(mixed(5, 4, 13, 18), crops.at_the_corners(4, (13, 18), (7, 11)), arch, out=(5, 20))


@every_arch
def test_crop_of_boxes_of_all_sizes_over_several_tiles(arch: int) -> None:
    # rows of more than 128 numbers, and more rows than a program has
    check_crop(channels_last(5, 3, 20, 50), crops.of_all_sizes(5, (20, 50)), arch, "hw", (33, 48))


@every_arch
def test_crop_of_four_views_and_one_more(arch: int) -> None:
    images = [made(2, 1, 16, 32, seed=i) for i in range(5)]
    check_crop(images, crops.of_all_sizes(2, (16, 32))[1:].repeat(2, 1), arch, "w", 1)


@other_archs
def test_crop_on_other_gpus(arch: int) -> None:
    check_crop(mixed(2, 4, 13, 18), crops.of_all_sizes(4, (13, 18)), arch, "hw")


@every_arch
@pytest.mark.parametrize("box", [(10, 0, 7, 7), (0, -1, 7, 7), (0, 0, 0, 7)], ids=["below", "left", "empty"])
def test_a_box_outside_is_asserted_on_the_device(
    box: tuple[int, int, int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a CPU the host would see it before
    monkeypatch.setattr(crop_resize_module, "_check_boxes", lambda *_: None)
    boxes_B4 = torch.tensor([(0, 0, 7, 7), box])
    images = made(2, 1, 16, 16).requires_grad_()
    with executed(arch), pytest.raises(DeviceAssert, match="a box leaves its image"):
        crops.applied(boxes_B4, "hw", impl="triton")(images)


# hole and its gradient


@every_arch
def test_hole_of_every_dtype_and_layout(arch: int) -> None:
    check_fill(mixed(5, 7, 9, 13), holes.beyond((9, 13), (4, 5)), (4, 5), arch)


@every_arch
def test_hole_of_images_too_large_for_registers(arch: int) -> None:
    images = made(2, 1, 129, 130)
    check_fill(images, holes.at_the_corners(2, (129, 130), (50, 60)), (50, 60), arch)


@every_arch
def test_hole_of_many_channels_that_lie_together(arch: int) -> None:
    images = [channels_last(2, 17, 6, 9, dtype=torch.bfloat16) for _ in range(4)]
    check_fill(images, holes.at_the_corners(2, (6, 9), (3, 4)), (3, 4), arch)


@other_archs
def test_hole_on_other_gpus(arch: int) -> None:
    check_fill(mixed(2, 7, 9, 13), holes.beyond((9, 13), (4, 5)), (4, 5), arch)


# masks


@every_arch
def test_mask_of_every_dtype_and_layout(arch: int) -> None:
    check_patches(mixed(5, 2, 12, 48), 2, 3, arch)


@every_arch
def test_mask_of_many_pixels_and_channels(arch: int) -> None:
    # more pixels than a program has, of a number that is no power of 4; more channels than a program has at a time
    images = channels_last(2, 5, 37, 41)
    check_patches(images, 2, 1, arch)
    check_channels(images, 2, arch)


@other_archs
def test_mask_on_other_gpus(arch: int) -> None:
    check_patches(mixed(2, 2, 12, 48), 2, 3, arch)
    check_channels(mixed(2, 2, 12, 48), 2, arch)
