"""Where the time of a step goes: chrome traces, and a table by phase, of fastle's step and of the plain eager one.

A side takes steps on the run's own feed, from fresh weights: a few to warm up, compilation included, as many as asked
for timed without the profiler, and as many again under it. Rates come from the former, phases from the latter. One side
after the other, so that neither holds the other's memory. Nothing is trained or saved but the traces.

    host     time in a phase without the phases inside it; all phases together are the profiled steps, whole
    device   time of the kernels and copies that were launched meanwhile, by any thread: backward has its own
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

from fastle.checkpoint import write_atomic
from fastle.config import ConfigError, Precision, RunConfig
from fastle.data import Feed, Images, Loading, open_images
from fastle.errors import FastleError
from fastle.machine import synchronize
from fastle.method.objective import Draws
from fastle.training.memory import peak_allocated
from fastle.training.plain_step import PlainStep
from fastle.training.trainer import StepMode, Trainer

from .tables import Figures, legend, phase_table, rate_table
from .trace import phase_times

WARM_UP = 3  # steps
COUNTED = 2  # images whose operations are counted: they are in proportion to their number
MATRIX, PRODUCTS = {"cpu": 2048, "cuda": 8192}, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to take the step.

    Attributes:
        name: in the tables, and of the trace's file.
        precision: of its products.
        compiles: the first step takes long.
        model: what it trains.
        step: takes one, on a batch.
        loss: of a batch, operator by operator.
        ours: the step, if it is fastle's.
    """

    name: str
    precision: Precision
    compiles: bool
    model: nn.Module
    step: Callable[[Tensor], object]
    loss: Callable[[Tensor], Tensor]
    ours: Trainer | None = None


def profile(
    config: RunConfig,
    path: Path,
    *,
    steps: int,
    device: torch.device,
    console: Console,
    loading: Loading | None = None,
    mode: StepMode = "eager",
    against: bool = False,
) -> None:
    """Measures the step of a run, writes `profile/` in its directory and prints the tables.

    Args:
        config: of the run.
        path: the run directory. A run that is there is neither read nor touched.
        steps: how many are measured.
        device: of this process.
        console: for the tables.
        loading: of the images, see `open_images`.
        mode: of the step.
        against: measure the plain eager step too: fp32, PyTorch's defaults.

    Raises:
        FastleError: the images cannot be used, the step cannot be compiled or computes what is not finite, there is no
            plain step to compare with, or a trace cannot be written.
    """
    # it would tell its starts and stops on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    makers: list[Callable[[], Side]] = [partial(_fastle, config, device, mode)]
    if against:
        makers.append(_plain(config, device))
    images = open_images(config.data, "train", loading)
    folder = path / "profile"
    # what cannot be written is found before the measuring
    folder.mkdir(parents=True, exist_ok=True)
    say(f"profile: {steps} steps of fastle, --step {mode}, {config.train.precision}; nothing is trained or saved")
    if against:
        say("against eager: the author's structure in plain PyTorch, operator by operator, fp32, PyTorch's defaults")
    figures = [_measure(make, config, images, steps, device, folder, say) for make in makers]
    console.print(phase_table(figures, device))
    console.print(rate_table(figures, config.train.batch_size))
    for line in legend(figures, device):
        say(line)
    traces = " and ".join(str(folder / f"{side.side}.json") for side in figures)
    say(f"written to {traces}: open in https://ui.perfetto.dev or chrome://tracing")


def _fastle(config: RunConfig, device: torch.device, mode: StepMode) -> Side:
    step = Trainer(config, device, mode=mode)

    def loss(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            # `forward`, not a call, which would take the graph
            return step.objective.forward(images, step.draw(images)).total

    return Side(
        name="fastle",
        precision=config.train.precision,
        compiles=mode != "eager",
        model=step.model,
        step=step,
        loss=loss,
        ours=step,
    )


def _plain(config: RunConfig, device: torch.device) -> Callable[[], Side]:
    """How to make the plain eager step.

    Raises:
        ConfigError: it is not there, or does not know the row of the configuration.
    """
    row = (config.objective.judge, config.objective.transform)
    if row != ("step-frozen", "crop-resize"):
        asked = f"--judge {row[0]} --transform {row[1]}" if row[0] else "--objective pixel"
        raise ConfigError(f"--against eager knows --judge step-frozen with --transform crop-resize only, not {asked}")
    for flag, value, known in (
        ("--crop-ratio-max", config.objective.crop_ratio_max, None),
        ("--crops", config.objective.crops, 1),
    ):
        if value != known:
            raise ConfigError(f"--against eager knows one crop of a fixed side only, not {flag} {value}")
    config = replace(config, train=replace(config.train, precision="fp32"))

    # for its weights and draws; made before the side is, so that it does not count as the side's memory
    source = Trainer(config, device)

    def draw(images: Tensor, done: int) -> Draws:
        source.done = done
        return source.draw(images)

    def make() -> Side:
        step = PlainStep(config, device, weights=source.model.state_dict(), draw=draw)

        def loss(images: Tensor) -> Tensor:
            return step.objective(images, source.draw(images))

        return Side(name="eager", precision="fp32", compiles=False, model=step.model, step=step, loss=loss)

    return make


def _measure(
    make: Callable[[], Side],
    config: RunConfig,
    images: Images,
    steps: int,
    device: torch.device,
    folder: Path,
    say: Callable[[str], object],
) -> Figures:
    # the sides before are garbage now
    gc.collect()
    held = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
    side = make()
    batch_size, seed, stop = config.train.batch_size, config.train.seed, WARM_UP + 2 * steps + 3
    with Feed(images, batch_size=batch_size, seed=seed, device=device, stop_step=stop) as feed:
        batches = iter(feed)
        say(
            f"{side.name}: {WARM_UP} steps to warm up"
            + (", compilation included: a minute or more" if side.compiles else "")
        )
        seconds = WARM_UP * _seconds_per_step(side, batches, WARM_UP, device)
        if side.ours is not None and side.ours.why_not_captured:
            say(f"{side.name}: {side.ours.why_not_captured}")
        say(f"{side.name}: warm after {seconds:.1f} s; {steps} steps without the profiler, {steps} with it")
        step_ms = 1e3 * _seconds_per_step(side, batches, steps, device)
        memory = step_memory(side, next(batches), device) - held
        # on a GPU the first start of a profiler takes long
        _trace(side, batches, 1, device)
        content = _trace(side, batches, steps, device)
        counted = next(batches)[:COUNTED]
    if not all(bool(weight.isfinite().all()) for weight in side.model.parameters()):
        fault = f"{side.name}: after {stop - 1} steps the weights are not finite, which no profile is worth"
        raise FastleError(f"{fault}; try a lower --lr" + ("" if side.precision == "fp32" else " or --precision fp32"))
    write_atomic(folder / f"{side.name}.json", content)
    phases, total = phase_times(json.loads(content), steps)
    kind = products(side.precision, device)
    return Figures(
        side=side.name,
        phases=phases,
        total=total,
        step_ms=step_ms,
        flop=count_flop(side, counted),
        products=kind,
        peak=matmul_peak(kind, device),
        memory=memory,
    )


def _seconds_per_step(side: Side, batches: Iterator[Tensor], steps: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        side.step(next(batches))
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def _trace(side: Side, batches: Iterator[Tensor], steps: int, device: torch.device) -> bytes:
    """A chrome trace of some steps, JSON."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function("step"):
                with record_function("data wait"):
                    images = next(batches)
                side.step(images)
        if device.type == "cuda":
            # the host is ahead of it
            with record_function("device wait"):
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return file.read_bytes()


def step_memory(side: Side, images: Tensor, device: torch.device) -> int:
    """Bytes at the peak of one step.

    On a GPU `torch.cuda.max_memory_allocated`, all that is held included, a captured step's while it was recorded:
    a replay allocates nothing. On a CPU see `peak_allocated`: weights and moments are there before and do not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        side.step(images)
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device), side.ours.graph_memory if side.ours else 0)
    side.model.zero_grad()
    return peak_allocated(lambda: side.step(images))


def count_flop(side: Side, images: Tensor) -> float:
    """For each image, forward and backward: of convolutions and products, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        side.loss(images).backward()
    return counter.get_total_flops() / len(images)


def products(precision: Precision, device: torch.device) -> str:
    """What the step's convolutions multiply: "bf16", "fp32", or "tf32" where PyTorch takes that for fp32."""
    tf32 = precision == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 else precision


@cache
def matmul_peak(kind: str, device: torch.device) -> float:
    """FLOP in a second of the best of several large matrix products of a kind of `products`."""
    n = MATRIX[device.type]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    before, best = torch.get_float32_matmul_precision(), float("inf")
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        for _ in range(PRODUCTS):
            synchronize(device)
            begin = time.perf_counter()
            a @ b
            synchronize(device)
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / best
