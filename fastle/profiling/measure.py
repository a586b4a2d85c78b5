"""Instruments: time of a call, FLOP of a computation, and what a device reaches in matrix products and in copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastle.config import Precision

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}
REPEATS = 10  # of a product or copy, of which the fastest counts


class Stopwatch:
    """Times single calls: on a CPU by the clock; on a GPU by events, after the L2 cache was filled with other data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # twice the cache would do; reading four times as much takes so long that a queued call does wait behind it
            self._other = torch.zeros(cache_bytes, dtype=torch.float32, device=device)
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object], *, queued: bool = False) -> float:
        """Milliseconds of one call.

        Args:
            queued: On a GPU, start the call behind other work, which hides what its launch costs the host. Otherwise
                it starts on an idle device, and the launch counts.
        """
        if self._device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        # read, not written: dirty lines would be written back during the call
        self._other.sum()
        if not queued:
            torch.cuda.synchronize(self._device)
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


def percentiles(ms: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile ("p20", "p50", "p80"), and how many values there are ("repeats")."""
    quantiles = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), quantiles.tolist(), strict=True)) | {"repeats": len(ms)}


def count_flop(call: Callable[[Tensor], object], images: Tensor) -> float:
    """FLOP per image that a call executes in convolutions and matrix products, a multiply-add counted as two.

    PyTorch's counter sees neither elementwise operations nor what fastle's operators do inside. `call` must run
    operator by operator: the counter does not look into compiled code.
    """
    with FlopCounterMode(display=False) as counter:
        call(images)
    return counter.get_total_flops() / len(images)


def product_type(precision: Precision, device: torch.device) -> str:
    """The number format in which convolutions multiply: "bf16", "fp32", or "tf32" where PyTorch takes it for fp32."""
    tf32 = precision == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 else precision


@cache
def matmul_peak(product: str, device: torch.device) -> float:
    """FLOP per second of the fastest of several large square matrix products.

    Args:
        product: "bf16", "fp32" or "tf32"; see `product_type`.
    """
    n = MATRIX_SIDE[device.type]
    a, b = (
        torch.randn(n, n, device=device).to(torch.bfloat16 if product == "bf16" else torch.float32) for _ in range(2)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if product == "tf32" else "highest")
    try:
        stopwatch = Stopwatch(device)
        best = min(stopwatch.time(lambda: a @ b, queued=True) for _ in range(REPEATS))
    finally:
        torch.set_float32_matmul_precision(before)
    return 1e3 * 2 * n**3 / best


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of the fastest of several copies too large for any cache."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    # the target's pages exist already: a copy that has to ask the system for memory would time that
    target = torch.ones_like(source)
    stopwatch = Stopwatch(device)
    best = min(stopwatch.time(lambda: target.copy_(source), queued=True) for _ in range(REPEATS))
    return 1e3 * 2 * source.nbytes / best
