"""What holds for every operator on images: dtypes, layouts, sequences, errors, and what torch requires."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels import impl as implementations
from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_channels, mask_patches
from tests.kernels import views
from tests.kernels.image_operators import BOX, OPERATORS, SIZE, ImageOperator, every_operator, some_seeds
from tests.kernels.views import (
    BAD_IMAGES,
    DEVICE,
    LAYOUTS,
    every_impl,
    laid_out,
    made,
    needs_gpu,
    needs_triton,
    value_and_gradients,
)

# dtypes, layouts and sequences


def check(operator: ImageOperator, images: Any, impl: str) -> None:
    batch = len(images) if isinstance(images, Tensor) else len(images[0])
    integers = operator.integers(batch).values()
    views.check(
        operator.bound(batch, impl=impl),
        images,
        lambda x: operator.exact(x, *(values.cpu() for values in integers)),
        lambda g: operator.exact_gradient(g, *(values.cpu() for values in integers)),
        impl,
    )


def mixed(batch: int) -> list[Tensor]:
    """Images of every dtype in both dense layouts, and of several numbers of channels."""
    kinds = [
        (3, torch.float32, "contiguous"), (3, torch.bfloat16, "channels-last"), (1, torch.uint8, "contiguous"),
        (3, torch.uint8, "channels-last"), (5, torch.float16, "channels-last"), (2, torch.bfloat16, "contiguous"),
    ]  # fmt: skip
    return [laid_out(made(batch, c, *SIZE, seed=i, dtype=dtype), layout) for i, (c, dtype, layout) in enumerate(kinds)]


@every_operator
@every_impl
def test_every_layout(operator: ImageOperator, impl: str) -> None:
    # more contiguous batches than one launch takes, and one batch twice
    images = [laid_out(made(2, 2, *SIZE, seed=i), layout) for i, layout in enumerate(LAYOUTS)]
    check(operator, [*images, images[1]], impl)


@every_operator
@every_impl
def test_every_dtype(operator: ImageOperator, impl: str) -> None:
    check(operator, tuple(mixed(2)), impl)


@every_operator
def test_fp64_runs_in_torch(operator: ImageOperator) -> None:
    check(operator, [made(2, 2, *SIZE, dtype=torch.float64), made(2, 1, *SIZE)], "auto")
    check(operator, laid_out(made(2, 3, *SIZE, dtype=torch.float64), "channels-last"), "auto")


@every_operator
@every_impl
def test_gradients_arrive_in_any_layout(operator: ImageOperator, impl: str) -> None:
    leaf = laid_out(made(2, 2, *SIZE), "channels-last").requires_grad_()
    result = operator.bound(2, impl=impl)(leaf)
    plain = views.upstream(result)
    (expected,) = torch.autograd.grad(result, leaf, plain, retain_graph=True)
    for layout in ("channels-last", "strided"):
        (gradient,) = torch.autograd.grad(result, leaf, laid_out(plain, layout), retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@every_operator
@every_impl
def test_gradient_goes_only_where_it_is_needed(operator: ImageOperator, impl: str) -> None:
    bound = operator.bound(2, impl=impl)
    frozen, leaf, unused = (made(2, 2, *SIZE, seed=i).requires_grad_(i > 0) for i in range(3))
    results = bound([frozen, leaf, unused])
    assert [x.requires_grad for x in results] == [False, True, True]
    to_result = views.upstream(results[1])
    (results[0].sum() + (results[1] * to_result).sum()).backward()
    assert frozen.grad is None and unused.grad is None
    (expected,) = torch.autograd.grad(bound(leaf), leaf, to_result)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not any(x.requires_grad for x in bound([leaf, unused]))


@every_operator
@every_impl
def test_autocast_and_repetition_change_no_bit(operator: ImageOperator, impl: str) -> None:
    bound, images = operator.bound(1, impl=impl), mixed(1)[:3]
    plain = value_and_gradients(lambda *x: bound(x), images)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        again = value_and_gradients(lambda *x: bound(x), images)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, again, strict=True))


@every_operator
@every_impl
def test_no_images(operator: ImageOperator, impl: str) -> None:
    bound = operator.bound(0, impl=impl)
    images = laid_out(made(0, 3, *SIZE), "channels-last").requires_grad_()
    size = bound(made(0, 3, *SIZE)).shape[2:]
    results = bound([images, made(0, 3, *SIZE, dtype=torch.uint8)])
    assert [x.shape for x in results] == [(0, 3, *size)] * 2 and results[1].dtype == torch.float32
    results[0].sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape


# the integers of each image


@every_operator
@every_impl
def test_integers_may_be_strided_or_int32(operator: ImageOperator, impl: str) -> None:
    images, integers = [made(2, 1, *SIZE)], operator.integers(2)
    expected = value_and_gradients(operator.bound(2, impl=impl), images)
    strided = [torch.stack([values, values + 1], 1).to(DEVICE)[:, 0] for values in integers.values()]
    # seeds are 64 bits wide
    others = [strided] if "seeds" in integers else [strided, [values.int() for values in strided]]
    for given in others:
        results = value_and_gradients(lambda x: operator.call(x, *given, impl=impl), images)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


BAD_INTEGERS = {
    "too-few": (lambda x: x[:3], r"\(3,\)"),
    "two-axes": (lambda x: x[:, None], r"\(4, 1\)"),
    "float": (lambda x: x.float(), "float32"),
    "bool": (lambda x: x > 0, "bool"),
    "other-device": (lambda x: x.to("meta"), "meta"),
}


@every_operator
def test_integers_that_do_not_fit_are_errors(operator: ImageOperator) -> None:
    images, integers = made(4, 1, *SIZE), {k: v.to(DEVICE) for k, v in operator.integers(4).items()}
    for name, values in integers.items():
        for change, says in BAD_INTEGERS.values():
            with pytest.raises(ValueError, match=f"{name} .*{says}"):
                operator.call(images, *(integers | {name: change(values)}).values())
        if name not in ("height", "width"):
            with pytest.raises(ValueError, match=f"{name} must be a tensor with one integer for each .* not 3"):
                operator.call(images, *(integers | {name: 3}).values())
    if "seeds" in integers:
        with pytest.raises(ValueError, match=r"seeds .*int32"):
            operator.call(images, integers["seeds"].int())


@every_operator
def test_images_that_do_not_fit_are_errors(operator: ImageOperator) -> None:
    for bad, says in BAD_IMAGES.values():
        with pytest.raises(ValueError, match=says):
            operator.bound(2)(bad())


# the implementation


@every_operator
def test_auto_takes_what_suits_the_device(operator: ImageOperator) -> None:
    images, fused = made(2, 3, *SIZE), "triton" if DEVICE.type == "cuda" else "torch"
    assert torch.equal(operator.bound(2)(images), operator.bound(2, impl=fused)(images))
    pair = [images, images.double()]
    for a, b in zip(operator.bound(2)(pair), operator.bound(2, impl="torch")(pair), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@every_operator
def test_unknown_or_impossible_implementations_are_errors(operator: ImageOperator) -> None:
    images = made(2, 1, *SIZE)
    for impl in ("cuda", "reference", "", None):
        with pytest.raises(ValueError, match="impl"):
            operator.bound(2, impl=impl)(images)
    for given in (images.double(), [images, images.double()]):
        with pytest.raises(ValueError, match=r'impl="triton" cannot run here: .*fp64'):
            operator.bound(2, impl="triton")(given)


@pytest.mark.parametrize("missing", [pytest.param("interpreter", marks=needs_triton), "triton", "newer"])
def test_missing_triton_is_explained(missing: str) -> None:
    # all operators in one process, whose start takes seconds. Triton decides at its import whether it interprets
    script = """if True:
        import sys, torch, types
        if sys.argv[1] == "triton":
            sys.modules["triton"] = None
        if sys.argv[1] == "newer":
            sys.modules["triton"] = types.SimpleNamespace(__version__="3.4.0")
        from fastle.kernels.crop_resize import crop_resize
        from fastle.kernels.mask_fill import mask_fill
        from fastle.kernels.random_mask import mask_channels
        from fastle.kernels.sigreg import sigreg
        images, zero = torch.ones(2, 1, 6, 8), torch.zeros(2, dtype=torch.int64)
        for call in (
            lambda **options: crop_resize(images, zero, zero, 3, **options),
            lambda **options: mask_fill(images, zero, zero, 3, 3, **options),
            lambda **options: mask_channels(images, zero, ratio=0.5, **options),
            lambda **options: sigreg(torch.ones(6, 4), torch.eye(4), **options),
        ):
            for impl in ("auto", "torch"):
                assert call(impl=impl).isfinite().all()
            try:
                call(impl="triton")
            except ValueError as error:
                print(error)
    """
    lines = views.run_alone(script, missing).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert 'impl="triton" cannot run here: ' in line
        assert {"interpreter": "TRITON_INTERPRET", "triton": "install", "newer": "need Triton 3.5"}[missing] in line


def test_a_gpu_without_kernels_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "MISSING_TRITON", "the kernels need another Triton")

    def where(x: Tensor) -> Tensor:
        return x + 1 if implementations.choose("some_operator", "auto", torch.device("cuda"), None) == "torch" else x

    with pytest.warns(UserWarning, match="some_operator runs in torch on this GPU, .*: the kernels need"):
        assert torch.compile(where, fullgraph=True, backend="eager")(torch.zeros(())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert where(torch.zeros(())) == 1


# what torch requires


@every_operator
def test_gradcheck(operator: ImageOperator) -> None:
    bound = operator.bound(2, impl="torch")
    images = [made(2, c, *SIZE, seed=c, dtype=torch.float64)[:, :, :, :].requires_grad_() for c in (1, 1)]
    assert torch.autograd.gradcheck(lambda *x: bound(x), images, fast_mode=True)
    assert torch.autograd.gradgradcheck(bound, images[0], fast_mode=True)


@every_operator
def test_opcheck(operator: ImageOperator) -> None:
    # registration, fake and gradient are the operator's, whichever implementation computes
    images = [made(1, 1, *SIZE), laid_out(made(1, 2, *SIZE, dtype=torch.bfloat16), "channels-last")]
    bound = operator.bound(1, impl="torch")
    views.passes_opcheck(operator.schema, lambda *x: bound(x), images)


@every_operator
@every_impl
def test_full_graph_compile(operator: ImageOperator, impl: str) -> None:
    bound = operator.bound(1, impl=impl)

    def several(*images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in bound([images[0] * 2, *images[1:]]))

    views.compiled_equals_eager(several, mixed(1)[:3])


def test_full_graph_compile_by_inductor() -> None:
    corner, seeds = torch.tensor([0, 1, 2], device=DEVICE), some_seeds(3)

    def all_operators(*images: Tensor) -> tuple[Tensor, ...]:
        crops = crop_resize([2 * x for x in images], corner, corner, *BOX)
        filled = mask_fill(crops, corner, corner, *BOX)
        masked = mask_channels(mask_patches(filled, seeds, ratio=0.4, patch=2), seeds, ratio=0.4)
        return tuple(x + 1 for x in masked)

    views.compiled_equals_eager(all_operators, [made(3, 2, *SIZE), made(3, 1, *SIZE, seed=1)], backend="inductor")


@pytest.mark.parametrize("name", ["crop_resize", "mask_fill", "mask_patches"])
def test_one_graph_serves_all_batch_sizes(name: str) -> None:
    integers = [values.to(DEVICE) for values in OPERATORS[name].integers(9).values()]

    def call(images: Tensor) -> Tensor:
        return OPERATORS[name].call(images, *(values[: images.shape[0]] for values in integers))

    torch.compiler.reset()
    views.compiled_equals_eager(call, *([made(b, 2, *SIZE)] for b in (3, 5, 9)), dynamic=True)


@needs_gpu
@every_operator
@every_impl
def test_cuda_graph(operator: ImageOperator, impl: str) -> None:
    images = [made(8, 3, *SIZE, seed=i).requires_grad_() for i in range(3)]
    integers = {name: values.to(DEVICE) for name, values in operator.integers(8).items()}

    def step() -> list[Tensor]:
        results = operator.call(images, *integers.values(), impl=impl)
        return [*results, *torch.autograd.grad(torch.stack([x.square().sum() for x in results]).sum(), images)]

    def change() -> None:
        for values in integers.values():
            values.copy_(values.flip(0))
        for i, image in enumerate(images):
            image.data.copy_(made(8, 3, *SIZE, seed=10 + i))

    views.replays(step, change)


@needs_gpu
@every_operator
@every_impl
def test_does_not_wait_for_the_gpu(operator: ImageOperator, impl: str) -> None:
    views.waits_for_no_gpu(operator.bound(8, impl=impl), made(8, 3, *SIZE))
