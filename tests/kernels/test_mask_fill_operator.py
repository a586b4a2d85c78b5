"""How torch takes kernels.mask_fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.mask_fill import mask_fill
from tests.kernels import views
from tests.kernels.mask_fill_cases import applied, at_the_corners, beyond
from tests.kernels.views import DEVICE, every_impl, made, needs_gpu


def test_gradcheck() -> None:
    images = [made(7, c, 4, 5, seed=c, dtype=torch.float64).requires_grad_() for c in (1, 2)]
    for box in ((1, 1), (2, 3), (4, 5), (0, 2)):
        operator = applied(beyond((4, 5), box), box, impl="torch")
        assert torch.autograd.gradcheck(operator, images[1])
        assert torch.autograd.gradcheck(lambda *x: operator(x), images)  # noqa: B023


def test_gradgradcheck() -> None:
    images = made(4, 2, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(applied(at_the_corners(4, (4, 5), (2, 3)), (2, 3), impl="torch"), images)


@every_impl
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_opcheck(layout: str, impl: Any) -> None:
    operator = applied(at_the_corners(3, (6, 7), (3, 4)), (3, 4), impl=impl)
    views.passes_opcheck("mask_fill", operator, [views.laid_out(made(3, 2, 6, 7), layout)])


@every_impl
def test_opcheck_of_sequences(impl: Any) -> None:
    operator = applied(at_the_corners(2, (6, 7), (3, 4)), (3, 4), impl=impl)
    views.passes_opcheck("mask_fill", lambda *x: operator(x), views.mixed(3, 2, 6, 7))
    views.passes_opcheck("mask_fill", lambda *x: operator(x), [made(2, 2, 6, 7, seed=i) for i in range(2)])


@every_impl
@pytest.mark.parametrize("size", [(30, 17), (170, 130)], ids=["few", "many"])
def test_the_same_bits_twice(size: tuple[int, int], impl: Any) -> None:
    operator = applied(at_the_corners(2, size, (23, 15)), (23, 15), impl=impl)
    views.same_bits_twice(lambda *x: operator(x), views.mixed(3, 2, *size))


@every_impl
def test_full_graph_compile(impl: Any) -> None:
    operator = applied(at_the_corners(3, (8, 9), (5, 4)), (5, 4), impl=impl)

    def doubled(images: Tensor) -> Tensor:
        return operator(2 * images) + 1

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator(images))

    views.compiled_equals_eager(doubled, [made(3, 2, 8, 9)])
    views.compiled_equals_eager(operator, [views.laid_out(made(3, 2, 8, 9), "channels-last")])
    views.compiled_equals_eager(several, views.mixed(3, 3, 8, 9))


def test_full_graph_compile_by_inductor() -> None:
    operator = applied(at_the_corners(3, (8, 9), (5, 4)), (5, 4))

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator([2 * x for x in images]))

    views.compiled_equals_eager(several, [made(3, 2, 8, 9), made(3, 1, 8, 9, seed=1)], backend="inductor")


def test_compiles_for_all_batches_at_once() -> None:
    corners = torch.zeros(9, dtype=torch.int64, device=DEVICE)

    def holed(images: Tensor) -> Tensor:
        return mask_fill(images, corners[: images.shape[0]], corners[: images.shape[0]], 3, 4)

    views.compiled_equals_eager(holed, *([made(b, 2, 8, 9)] for b in (3, 5, 9)), dynamic=True)


def test_auto_takes_what_suits_the_device() -> None:
    top, left = at_the_corners(3, (33, 20), (17, 19)).to(DEVICE).unbind(1)
    views.auto_takes_what_suits(lambda x, **o: mask_fill(x, top, left, 17, 19, **o), made(3, 3, 33, 20))


# what only a GPU can show


@needs_gpu
@every_impl
def test_cuda_graph(impl: Any) -> None:
    images = [made(8, 3, 128, 100, seed=i).requires_grad_() for i in range(3)]
    corners = at_the_corners(8, (128, 100), (90, 70)).to(DEVICE)
    others = corners.flip(0)

    def step() -> list[Tensor]:
        results = mask_fill(images, corners[:, 0], corners[:, 1], 90, 70, impl=impl)
        return [*results, *torch.autograd.grad(torch.stack([x.square().sum() for x in results]).sum(), images)]

    def change() -> None:
        corners.copy_(others)
        for i, image in enumerate(images):
            image.data.copy_(made(8, 3, 128, 100, seed=10 + i))

    views.replays(step, change)


@needs_gpu
@every_impl
def test_waits_for_no_gpu(impl: Any) -> None:
    operator = applied(at_the_corners(8, (64, 50), (19, 30)), (19, 30), impl=impl)
    views.waits_for_no_gpu(operator, made(8, 3, 64, 50))
