"""How torch takes kernels.random_mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.random_mask import channel_mask, mask_channels, mask_patches, patch_mask
from tests.kernels import views
from tests.kernels.random_mask_cases import channels_of, patches_of, some
from tests.kernels.views import every_impl, made, needs_gpu


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
