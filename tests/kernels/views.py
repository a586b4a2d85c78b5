"""What the tests of the views' operators share: images and layouts, limits, and what torch asks of every operator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# what is asked of fp32 and fp64: of values of images in [0, 1], and of a gradient's largest error against its largest
# entry. half precision may round the result once more
VALUE = {torch.float64: 1e-13}
GRADIENT = {torch.float64: 1e-12}
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = [
    "contiguous", "channels-last", "transposed", "strided", "unaligned", "expanded",
    "some-channels-of-channels-last", "unaligned-channels-last",
]  # fmt: skip

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TRITON = pytest.param("triton", marks=needs_triton)
every_impl = pytest.mark.parametrize("impl", ["torch", TRITON])
every_float = pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=list(FLOATS))
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU")(test))


# images


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [0, 1], or all that uint8 holds."""
    generator = Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype).to(DEVICE)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def upstream(value: Tensor, seed: int = 7) -> Tensor:
    """A gradient to a result: in [−0.5, 0.5], and contiguous whatever the result is."""
    noise = torch.rand(value.shape, generator=Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return noise.to(value.device, value.dtype)


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same images, otherwise in memory ("expanded": the first one only, as often)."""
    b, c, h, w = images.shape
    if layout == "channels-last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        return images.new_zeros(b, c, h, 2 * w + 1)[..., 1::2].copy_(images)
    if layout == "unaligned":
        return images.new_zeros(images.numel() + 1)[1:].view(b, c, h, w).copy_(images)
    if layout == "expanded":
        return images[:1].expand(b, c, h, w)
    if layout == "some-channels-of-channels-last":
        return laid_out(images.new_zeros(b, c + 1, h, w), "channels-last")[:, 1:].copy_(images)
    if layout == "unaligned-channels-last":
        return images.new_zeros(images.numel() + 1)[1:].view(b, h, w, c).permute(0, 3, 1, 2).copy_(images)
    assert layout == "contiguous"
    return images.contiguous()


def keeps_layout(found: Tensor, images: Tensor) -> bool:
    """Contiguous for contiguous, channels-last for channels-last, contiguous for the rest; of several, any."""
    formats = [torch.contiguous_format, torch.channels_last]
    given = [x for x in formats if images.is_contiguous(memory_format=x)] or formats[:1]
    return any(found.is_contiguous(memory_format=x) for x in given)


def exactly(images: Tensor) -> Tensor:
    """What images hold, in float64 on the CPU; uint8 scaled to [0, 1]."""
    raised = images.detach().cpu().double()
    return raised / 255 if images.dtype == torch.uint8 else raised


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype


# limits


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding to half precision may cost; 0 for the dtypes that are computed in."""
    if dtype in (torch.float32, torch.float64):
        return torch.zeros_like(exact)
    limits = torch.finfo(dtype)
    power = 2.0 ** (torch.frexp(exact).exponent - 1).double()
    return limits.eps / 2 * power.clamp_min(limits.smallest_normal)


def _check(found: Tensor, exact: Tensor, slack: float, impl: str, what: str) -> None:
    assert found.shape == exact.shape, what
    # Triton's interpreter cuts fp32 off where a GPU rounds it to bf16
    half_ulps = 2 if impl == "triton" and DEVICE.type == "cpu" and found.dtype == torch.bfloat16 else 1
    if exact.numel():
        error = (found.detach().cpu().double() - exact).abs()
        excess = error - half_ulps * half_ulp(exact, found.dtype) - slack
        assert excess.max() <= 0, f"{what}: {float(error.max()):.3g} off, {float(excess.max()):.3g} more than allowed"


def check_value(found: Tensor, exact: Tensor, images: Tensor, impl: str) -> None:
    assert found.dtype == result_dtype(images.dtype) and found.device == images.device
    assert keeps_layout(found, images), f"{images.stride()} became {found.stride()}"
    _check(found, exact, VALUE.get(found.dtype, 1e-6), impl, "value")


def check_gradient(found: Tensor, exact: Tensor, images: Tensor, impl: str) -> None:
    assert found.dtype == images.dtype
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    _check(found, exact, GRADIENT.get(found.dtype, 1e-5) * largest, impl, "gradient")


def check(
    operator: Callable[[Any], Any],
    images: Tensor | Sequence[Tensor],
    exact: Callable[[Tensor], Tensor],
    exact_gradient: Callable[[Tensor], Tensor],
    impl: str,
) -> None:
    """Hold values and gradients of an operator to two formulas, and the images to what they were."""
    several = [images] if isinstance(images, Tensor) else list(images)
    # images under test are views of others: a clone would not lie in memory as they do
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in several]
    before = [x.detach().clone() for x in several]
    results = operator(leaves[0]) if isinstance(images, Tensor) else operator(type(images)(leaves))  # type: ignore[call-arg]
    if isinstance(images, Tensor):
        assert isinstance(results, Tensor)
        results = (results,)
    assert type(results) is tuple and len(results) == len(several)
    for found, image in zip(results, several, strict=True):
        check_value(found, exact(exactly(image)), image, impl)
        assert found.requires_grad == image.is_floating_point()
    pairs = [(found, x) for found, x in zip(results, leaves, strict=True) if x.requires_grad]
    if pairs:
        to_results = [upstream(found, seed=i) for i, (found, _) in enumerate(pairs)]
        gradients = torch.autograd.grad([found for found, _ in pairs], [x for _, x in pairs], to_results)
        for gradient, to_result, (_, image) in zip(gradients, to_results, pairs, strict=True):
            check_gradient(gradient, exact_gradient(exactly(to_result)), image, impl)
    for image, was in zip(several, before, strict=True):
        assert torch.equal(image, was)


# a mixed bag, of which the first n are taken: all that a sequence may mix
MIXED = [
    (3, torch.float32, "contiguous"),
    (3, torch.bfloat16, "channels-last"),
    (1, torch.uint8, "contiguous"),
    (3, torch.float32, "contiguous"),
    (5, torch.float16, "strided"),
]


def mixed(number: int, batch: int, height: int, width: int) -> list[Tensor]:
    return [
        laid_out(made(batch, c, height, width, seed=i, dtype=dtype), layout)
        for i, (c, dtype, layout) in enumerate(MIXED[:number])
    ]


def value_and_gradients(operator: Callable[..., Any], images: Sequence[Tensor]) -> list[Tensor]:
    """Of an operator that takes images one by one and gives a tensor or several."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in images]
    results = operator(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    differentiable = [x for x in results if x.requires_grad]
    to_results = [upstream(x, seed=i) for i, x in enumerate(differentiable)]
    gradients = torch.autograd.grad(differentiable, [x for x in leaves if x.requires_grad], to_results)
    return [x.detach() for x in results] + list(gradients)


def same_bits_twice(operator: Callable[..., Any], images: Sequence[Tensor]) -> None:
    once, twice = (value_and_gradients(operator, images) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def gradient_goes_only_where_it_is_asked_for(
    operator: Callable[[Any], tuple[Tensor, ...]], size: Sequence[int]
) -> None:
    """Some images of a sequence take no gradient, and some results are not used."""
    batch, height, width = size
    images = [made(batch, 2, height, width, seed=i) for i in range(3)]
    _, right, _ = value_and_gradients(lambda *x: operator(x), images)[3:]
    to_result = upstream(operator(images)[0], seed=1)
    frozen, leaf, unused = images[0], images[1].clone().requires_grad_(), images[2].clone().requires_grad_()
    results = operator([frozen, leaf, unused])
    # equal within rounding only: what shares a launch may be another group of images
    (gradient,) = torch.autograd.grad(results[1], leaf, to_result)
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6)
    results = operator([frozen, leaf, unused])
    (results[0].sum() + results[1].sum()).backward()
    assert frozen.grad is None and leaf.grad is not None and (unused.grad is None or not unused.grad.any())
    assert not any(x.requires_grad for x in operator(images))
    with torch.no_grad():
        assert not any(x.requires_grad for x in operator([leaf, unused]))


def takes_gradients_of_any_layout(operator: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """A gradient may arrive expanded, channels-last or strided."""
    leaf = images.detach().requires_grad_()
    result = operator(leaf)
    plain = upstream(result)
    (right,) = torch.autograd.grad(result, leaf, plain, retain_graph=True)
    for layout in ("channels-last", "strided", "transposed"):
        (found,) = torch.autograd.grad(result, leaf, laid_out(plain, layout), retain_graph=True)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
    (right,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


# what no operator takes


BAD_IMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "three-axes": (lambda: made(2, 6, 9), r"2\D+6\D+9"),
    "five-axes": (lambda: made(2, 1, 3, 6, 9), r"2\D+1\D+3\D+6\D+9"),
    "int64": (lambda: made(2, 3, 6, 9).long(), "int64"),
    "bool": (lambda: made(2, 3, 6, 9) > 0.5, "bool"),
    "complex": (lambda: made(2, 3, 6, 9).to(torch.complex64), "complex64"),
    "none": (list, "images|image"),
    "none-in-a-tuple": (tuple, "images|image"),
    "other-height": (lambda: [made(2, 3, 6, 9), made(2, 3, 7, 9)], r"7\D+9"),
    "other-width": (lambda: [made(2, 3, 6, 9), made(2, 3, 6, 8)], r"6\D+8"),
    "other-batch": (lambda: (made(2, 3, 6, 9), made(3, 3, 6, 9)), r"\b3\b"),
    "one-of-three-axes": (lambda: [made(2, 3, 6, 9), made(2, 6, 9)], r"2\D+6\D+9"),
    "one-int64": (lambda: [made(2, 3, 6, 9), made(2, 3, 6, 9).long()], "int64"),
    "other-device": (lambda: [made(2, 3, 6, 9), made(2, 3, 6, 9).to("meta")], "meta"),
}
every_bad_image = pytest.mark.parametrize(("bad", "says"), list(BAD_IMAGES.values()), ids=list(BAD_IMAGES))


def choices_that_cannot_be_had(operator: Callable[..., Any], images: Tensor) -> None:
    choice: Any
    for choice in ("cuda", "reference", "", None):
        with pytest.raises(ValueError, match="impl"):
            operator(images, impl=choice)
    for given in (images.double(), [images, images.double()]):
        with pytest.raises(ValueError, match=r'impl="triton" cannot be had: .*(float64|fp64)'):
            operator(given, impl="triton")


def auto_takes_what_suits(operator: Callable[..., Any], images: Tensor) -> None:
    """Triton on a GPU and torch elsewhere, torch for all of a sequence with fp64 in it."""
    fused = "triton" if images.device.type == "cuda" else "torch"
    assert torch.equal(operator(images), operator(images, impl=fused))
    assert torch.equal(operator(images, impl="auto"), operator(images, impl=fused))
    pair = [images, images.double()]
    for found, expected in zip(operator(pair), operator(pair, impl="torch"), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype


# how torch takes them


def compiled_equals_eager(
    operator: Callable[..., Any], *inputs: Sequence[Tensor], backend: str = "aot_eager", dynamic: bool | None = None
) -> None:
    """Values and gradients, for one list of images after the other."""
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend=backend, dynamic=dynamic)
    for images in inputs:
        found, expected = (value_and_gradients(call, images) for call in (compiled, operator))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class _Calls(TorchDispatchMode):
    """Which of our operators are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastle":
            self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def passes_opcheck(name: str, operator: Callable[..., Any], images: Sequence[Tensor]) -> None:
    """The operators that a value and its gradients take, with the arguments that they get there."""
    with _Calls() as calls:
        value_and_gradients(operator, images)
    names = [str(func) for func, _, _ in calls.made]
    assert f"fastle.{name}.default" in names and any("_backward" in x for x in names), names
    for func, args, kwargs in calls.made:
        forward = "_backward" not in str(func)

        def fresh(x: Tensor, forward: bool = forward) -> Tensor:
            return x.detach().requires_grad_(forward and x.is_floating_point())

        torch.library.opcheck(func, tree_map_only(Tensor, fresh, args), tree_map_only(Tensor, fresh, kwargs))


def run_alone(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, in which Triton does not interpret."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2], env=inherited, capture_output=True, text=True, check=check, timeout=300,
    )  # fmt: skip


def waits_for_no_gpu(operator: Callable[[Any], Any], images: Tensor) -> None:
    leaf, to_result = images.clone().requires_grad_(), upstream(operator(images))
    operator(leaf).backward(to_result)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(leaf).backward(to_result)
        found, _ = operator([leaf, images])
        found.backward(to_result)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(step: Callable[[], Sequence[Tensor]], change: Callable[[], None]) -> None:
    """A captured step gives what an eager one does, for other inputs than those it was captured with."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    change()
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
