"""How torch takes kernels.crop_resize."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastle.kernels.crop_resize as form
from fastle.kernels.crop_resize import crop_resize
from tests.kernels import views
from tests.kernels.crop_resize_cases import applied, at_the_corners, of_all_sizes
from tests.kernels.views import DEVICE, every_impl, made, needs_gpu


def test_gradcheck() -> None:
    # the operator is linear: what its gradient's gradient is, is no question
    images = [made(2, c, 5, 7, seed=c, dtype=torch.float64).requires_grad_() for c in (1, 2)]
    for boxes_B4, tensors in ((at_the_corners(2, (5, 7), (3, 4)), ""), (of_all_sizes(2, (5, 7)), "hw")):
        for out in (None, (4, 1), (2, 9)):
            operator = applied(boxes_B4, tensors, out_size=out, impl="torch")
            assert torch.autograd.gradcheck(operator, images[1])
            assert torch.autograd.gradcheck(lambda *x: operator(x), images)  # noqa: B023


def test_gradgradcheck() -> None:
    images = made(2, 2, 5, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(applied(at_the_corners(2, (5, 7), (3, 4)), impl="torch"), images)
    assert torch.autograd.gradgradcheck(applied(of_all_sizes(2, (5, 7)), "hw", out_size=(4, 9)), images)


@every_impl
@pytest.mark.parametrize(
    ("layout", "tensors"),
    [("contiguous", ""), ("contiguous", "h"), ("channels-last", "hw")],
    ids=["integers", "heights", "channels-last"],
)
def test_opcheck(layout: str, tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (4, 5), (3, 2)), tensors, out_size=(3, 6), impl=impl)
    views.passes_opcheck("crop_resize", operator, [views.laid_out(made(2, 2, 4, 5), layout)])


@every_impl
def test_opcheck_of_sequences(impl: Any) -> None:
    operator = applied(at_the_corners(1, (4, 5), (3, 2)), impl=impl)
    views.passes_opcheck("crop_resize", lambda *x: operator(x), views.mixed(4, 1, 4, 5))


@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_the_same_bits_twice(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (21, 13), (17, 9)), tensors, impl=impl)
    views.same_bits_twice(lambda *x: operator(x), views.mixed(2, 2, 21, 13))


@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_full_graph_compile(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(2, (6, 5), (5, 4)), tensors, out_size=(4, 7), impl=impl)

    def doubled(images: Tensor) -> Tensor:
        return operator(2 * images) + 1

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator(images))

    views.compiled_equals_eager(doubled, [made(2, 2, 6, 5)])
    views.compiled_equals_eager(operator, [views.laid_out(made(2, 2, 6, 5), "channels-last")])
    views.compiled_equals_eager(several, views.mixed(3, 2, 6, 5))


def test_full_graph_compile_by_inductor() -> None:
    operator = applied(at_the_corners(3, (8, 9), (5, 4)), out_size=(6, 11))

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in operator([2 * x for x in images]))

    views.compiled_equals_eager(several, [made(3, 2, 8, 9), made(3, 1, 8, 9, seed=1)], backend="inductor")


def test_compiles_for_all_batches_at_once() -> None:
    corners = torch.zeros(9, dtype=torch.int64, device=DEVICE)

    def cropped(images: Tensor) -> Tensor:
        return crop_resize(images, corners[: images.shape[0]], corners[: images.shape[0]], 3, 4)

    views.compiled_equals_eager(cropped, *([made(b, 2, 8, 9)] for b in (3, 5, 9)), dynamic=True)


def test_auto_takes_what_suits_the_device() -> None:
    boxes = at_the_corners(3, (33, 20), (17, 19)).to(DEVICE)
    views.auto_takes_what_suits(
        lambda x, **o: crop_resize(x, boxes[:, 0], boxes[:, 1], 17, 19, **o), made(3, 3, 33, 20)
    )


# what only a GPU can show


@needs_gpu
@every_impl
@pytest.mark.parametrize("sizes", ["integers", "tensors"])
def test_a_box_that_leaves_the_image_on_a_gpu(sizes: str, impl: str) -> None:
    script = """if True:
        import sys, torch
        from fastle.kernels.crop_resize import crop_resize
        images = torch.rand(4, 3, 32, 32, device="cuda")
        top, left = torch.tensor([0, 5, 28, 3], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        side = 5 if sys.argv[2] == "integers" else torch.full_like(top, 5)
        crop_resize(images, top.clamp(max=27), left, side, impl=sys.argv[1])
        torch.cuda.synchronize()
        print("within", flush=True)
        crop_resize(images, top, left, side, impl=sys.argv[1])
        torch.cuda.synchronize()
        print("beyond", flush=True)
    """
    done = views.run_alone(script, impl, sizes, check=False)
    assert done.stdout.split() == ["within"] and done.returncode != 0
    assert "assert" in done.stderr


@needs_gpu
@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_cuda_graph(tensors: str, impl: Any) -> None:
    images = [made(8, 3, 128, 100, seed=i).requires_grad_() for i in range(3)]
    boxes = of_all_sizes(8, (128, 100)) if tensors else at_the_corners(8, (128, 100), (19, 30))
    others = boxes.flip(0).to(DEVICE)
    boxes = boxes.to(DEVICE)
    height, width = (boxes[:, 2], boxes[:, 3]) if tensors else (19, 30)

    def step() -> list[Tensor]:
        results = crop_resize(images, boxes[:, 0], boxes[:, 1], height, width, impl=impl)
        return [*results, *torch.autograd.grad(torch.stack([x.square().sum() for x in results]).sum(), images)]

    def change() -> None:
        boxes.copy_(others)
        for i, image in enumerate(images):
            image.data.copy_(made(8, 3, 128, 100, seed=10 + i))

    views.replays(step, change)


@needs_gpu
@every_impl
@pytest.mark.parametrize("tensors", ["", "hw"], ids=["integers", "tensors"])
def test_waits_for_no_gpu(tensors: str, impl: Any) -> None:
    operator = applied(at_the_corners(8, (64, 50), (19, 30)), tensors, impl=impl)
    views.waits_for_no_gpu(operator, made(8, 3, 64, 50))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("sizes", ["numbers", "tensors"])
def test_form_of_devices_without_triton_equals_that_of_a_cpu(sizes: str, layout: str) -> None:
    images = views.laid_out(made(4, 3, 9, 14), layout).cpu()
    top, left = torch.tensor([0, 4, 8, 2]), torch.tensor([0, 9, 13, 1])
    heights, widths = torch.tensor([9, 5, 1, 3]), torch.tensor([14, 5, 1, 7])
    boxes: tuple[Any, ...]
    if sizes == "numbers":
        boxes = (top.clamp(max=5), left.clamp(max=8), None, None, 4, 6)
    else:
        boxes = (top, left, heights, widths, 0, 0)
    # what no box holds is not read
    images[1, :, 0, 0] = torch.nan
    gradient = torch.rand(4, 3, 7, 20) - 0.5
    listed = form._listed(*boxes)
    expected, found = form._resize(images, listed, (7, 20)), form._resize_by_masks(images, *boxes, (7, 20))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.stride() == expected.stride()
    spread, by_masks = form._spread(gradient, listed, (9, 14)), form._spread_by_masks(gradient, *boxes, (9, 14))
    torch.testing.assert_close(by_masks, spread, rtol=0, atol=1e-5)
