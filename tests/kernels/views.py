"""Images and layouts, error limits, and checks that the tests of all operators on images share."""

from __future__ import annotations

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

from fastle.kernels.impl import HAS_TRITON, MISSING_TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the largest error of a value of images in [0, 1], and of a gradient relative to its largest entry, in fp64; fp32 has
# limits below. half precision may also round the result once
VALUE = {torch.float64: 1e-13}
GRADIENT = {torch.float64: 1e-12}
LAYOUTS = ["contiguous", "channels-last", "transposed", "strided", "expanded", "some-channels-of-channels-last"]
if DEVICE.type == "cuda":
    # only a compiled kernel depends on alignment
    LAYOUTS += ["unaligned", "unaligned-channels-last"]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason=str(MISSING_TRITON))
every_impl = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU")(test))


# images


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images in [0, 1], or in 0..255 for uint8."""
    generator = Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype).to(DEVICE)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def upstream(value: Tensor, seed: int = 7) -> Tensor:
    """A gradient to a result: in [−0.5, 0.5], always contiguous."""
    noise = torch.rand(value.shape, generator=Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return noise.to(value.device, value.dtype)


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same images in another memory layout ("expanded" repeats the first image)."""
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


def keeps_layout(result: Tensor, images: Tensor) -> bool:
    """Whether a result is channels-last for channels-last images and contiguous for all others."""
    formats = [torch.contiguous_format, torch.channels_last]
    given = [x for x in formats if images.is_contiguous(memory_format=x)] or formats[:1]
    return any(result.is_contiguous(memory_format=x) for x in given)


def exactly(images: Tensor) -> Tensor:
    """The images in fp64 on the CPU; uint8 is scaled to [0, 1]."""
    values = images.detach().cpu().double()
    return values / 255 if images.dtype == torch.uint8 else values


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype


# limits


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of one rounding to half precision; 0 for fp32 and fp64."""
    if dtype in (torch.float32, torch.float64):
        return torch.zeros_like(exact)
    limits = torch.finfo(dtype)
    power = 2.0 ** (torch.frexp(exact).exponent - 1).double()
    return limits.eps / 2 * power.clamp_min(limits.smallest_normal)


def _check(result: Tensor, exact: Tensor, slack: float, impl: str, what: str) -> None:
    assert result.shape == exact.shape, what
    # Triton's interpreter truncates fp32 to bf16, where a GPU rounds
    half_ulps = 2 if impl == "triton" and DEVICE.type == "cpu" and result.dtype == torch.bfloat16 else 1
    if exact.numel():
        error = (result.detach().cpu().double() - exact).abs()
        excess = error - half_ulps * half_ulp(exact, result.dtype) - slack
        assert excess.max() <= 0, f"{what}: {float(error.max()):.3g} off, {float(excess.max()):.3g} more than allowed"


def check_value(result: Tensor, exact: Tensor, images: Tensor, impl: str) -> None:
    assert result.dtype == result_dtype(images.dtype) and result.device == images.device
    assert keeps_layout(result, images), f"{images.stride()} became {result.stride()}"
    _check(result, exact, VALUE.get(result.dtype, 1e-6), impl, "value")


def check_gradient(result: Tensor, exact: Tensor, images: Tensor, impl: str) -> None:
    assert result.dtype == images.dtype
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    _check(result, exact, GRADIENT.get(result.dtype, 1e-5) * largest, impl, "gradient")


def check(
    operator: Callable[[Any], Any],
    images: Tensor | Sequence[Tensor],
    exact: Callable[[Tensor], Tensor],
    exact_gradient: Callable[[Tensor], Tensor],
    impl: str,
) -> None:
    """Compares an operator's values and gradients with two formulas, and checks that the images did not change."""
    several = [images] if isinstance(images, Tensor) else list(images)
    # no clone, which would change the memory layout
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in several]
    before = [x.detach().clone() for x in several]
    results = operator(leaves[0]) if isinstance(images, Tensor) else operator(type(images)(leaves))  # type: ignore[call-arg]
    if isinstance(images, Tensor):
        assert isinstance(results, Tensor)
        results = (results,)
    assert type(results) is tuple and len(results) == len(several)
    for result, image in zip(results, several, strict=True):
        check_value(result, exact(exactly(image)), image, impl)
        assert result.requires_grad == image.is_floating_point()
    pairs = [(result, x) for result, x in zip(results, leaves, strict=True) if x.requires_grad]
    if pairs:
        to_results = [upstream(result, seed=i) for i, (result, _) in enumerate(pairs)]
        gradients = torch.autograd.grad([result for result, _ in pairs], [x for _, x in pairs], to_results)
        for gradient, to_result, (_, image) in zip(gradients, to_results, pairs, strict=True):
            check_gradient(gradient, exact_gradient(exactly(to_result)), image, impl)
    for image, was in zip(several, before, strict=True):
        assert torch.equal(image, was)


def value_and_gradients(operator: Callable[..., Any], images: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients of an operator that takes images as separate arguments."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in images]
    results = operator(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    differentiable = [x for x in results if x.requires_grad]
    to_results = [upstream(x, seed=i) for i, x in enumerate(differentiable)]
    gradients = torch.autograd.grad(differentiable, [x for x in leaves if x.requires_grad], to_results)
    return [x.detach() for x in results] + list(gradients)


# images that every operator refuses
BAD_IMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "three-axes": (lambda: made(2, 6, 9), r"2\D+6\D+9"),
    "no-pixels": (lambda: made(2, 3, 0, 9), r"2\D+3\D+0\D+9"),
    "int64": (lambda: made(2, 3, 6, 9).long(), "int64"),
    "bool": (lambda: made(2, 3, 6, 9) > 0.5, "bool"),
    "empty-sequence": (list, "images"),
    "other-height": (lambda: [made(2, 3, 6, 9), made(2, 3, 7, 9)], r"7\D+9"),
    "other-batch": (lambda: (made(2, 3, 6, 9), made(3, 3, 6, 9)), r"\b3\b"),
    "second-of-three-axes": (lambda: [made(2, 3, 6, 9), made(2, 6, 9)], r"2\D+6\D+9"),
    "second-int64": (lambda: [made(2, 3, 6, 9), made(2, 3, 6, 9).long()], "int64"),
    "other-device": (lambda: [made(2, 3, 6, 9), made(2, 3, 6, 9).to("meta")], "meta"),
}


# what torch requires of an operator


def compiled_equals_eager(
    operator: Callable[..., Any], *inputs: Sequence[Tensor], backend: str = "aot_eager", dynamic: bool | None = None
) -> None:
    """Compares values and gradients for each list of images in turn."""
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend=backend, dynamic=dynamic)
    for images in inputs:
        result, expected = (value_and_gradients(call, images) for call in (compiled, operator))
        assert len(result) == len(expected)
        for a, b in zip(result, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class _Calls(TorchDispatchMode):
    """Records the calls of fastle's operators."""

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
    """Runs opcheck on every call that a value and its gradients make."""
    with _Calls() as calls:
        value_and_gradients(operator, images)
    names = [str(func) for func, _, _ in calls.made]
    assert f"fastle.{name}.default" in names and any("_backward" in x for x in names), names
    for func, args, kwargs in calls.made:
        forward = "_backward" not in str(func)

        def fresh(x: Tensor, forward: bool = forward) -> Tensor:
            return x.detach().requires_grad_(forward and x.is_floating_point())

        torch.library.opcheck(func, tree_map_only(Tensor, fresh, args), tree_map_only(Tensor, fresh, kwargs))


def run_alone(script: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a new process, without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2], env=inherited | environment,
        capture_output=True, text=True, check=check, timeout=600,
    )  # fmt: skip


def waits_for_no_gpu(operator: Callable[[Any], Any], images: Tensor) -> None:
    leaf, to_result = images.clone().requires_grad_(), upstream(operator(images))
    operator(leaf).backward(to_result)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(leaf).backward(to_result)
        result, _ = operator([leaf, images])
        result.backward(to_result)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(step: Callable[[], Sequence[Tensor]], change: Callable[[], object]) -> None:
    """Checks a captured step against an eager one, on other inputs than those of the capture."""
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
    for result, expected in zip(captured, step(), strict=True):
        assert torch.equal(result, expected)
