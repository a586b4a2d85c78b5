"""Where the time of a step goes: chrome traces, and tables by phase, of fastle's step and of the plain eager one.

A step starts from fresh weights and takes the run's own batches. After a few steps to warm up, compilation included,
the requested number of steps is timed without the profiler, and the same number again under it. Rates come from the
first measurement, phases from the second. The two kinds of step are measured one after the other, so that neither holds
the other's memory. The measurement changes no run: it writes only the traces.

    host     time in a phase without the phases inside it; all phases together are the whole of the profiled steps
    device   time of the kernels and copies that the host launched in the phase, from any thread: autograd has its own
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from fastle.choices import StepMode
from fastle.config import ConfigError, CropResizeConfig, Precision, RunConfig
from fastle.data import Feed, Images, Loading, open_images
from fastle.errors import FastleError
from fastle.files import write_atomic
from fastle.machine import allocated_memory, peak_memory, quiet_profiler, synchronize
from fastle.training.plain_step import PlainStep, StartingPoint
from fastle.training.trainer import Trainer

from .measure import count_flop, matmul_peak, product_type
from .tables import StepFigures, legend, phase_table, rate_table
from .trace import phase_times

WARM_UP = 3  # steps
COUNTED = 2  # images whose FLOP are counted: FLOP grow in proportion to the number of images


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep:
    """A step to measure.

    Attributes:
        name: Its name in the tables and of the trace's file.
        precision: The precision of its convolutions and products.
        compiles: Whether the first step takes long.
        model: The model that it trains.
        step: Takes one step on a batch.
        loss: The loss of a batch, computed operator by operator.
        ours: The step, if it is fastle's; otherwise None.
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
    """Measures the step of a run, writes traces to `profile/` in the run directory, and prints tables.

    Args:
        config: The run's configuration.
        path: The run directory. Neither a run nor its checkpoints there are read or changed.
        steps: How many steps are measured, at least 1.
        device: The device of this process.
        console: Where the tables go.
        loading: How the images are loaded; see `open_images`.
        mode: The mode of fastle's step.
        against: Measure the plain eager step too, in fp32 and with PyTorch's defaults.

    Raises:
        FastleError: The images cannot be used, the step cannot be compiled, its weights become infinite or NaN, the
            plain step does not support the configuration, or a trace cannot be written.
    """
    quiet_profiler()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    makers: list[Callable[[], ProfiledStep]] = [partial(_fastle, config, device, mode)]
    if against:
        check_plain(config)
        makers.append(partial(_plain, StartingPoint(config, device, total_steps=sys.maxsize)))
    images = open_images(config.data, "train", loading)
    folder = path / "profile"
    # a folder that cannot be written fails before the measuring
    folder.mkdir(parents=True, exist_ok=True)
    say(f"profile: {steps} steps of fastle, --step {mode}, {config.train.precision}; nothing is trained or saved")
    if against:
        say("against eager: the author's structure in plain PyTorch, operator by operator, fp32, PyTorch's defaults")
    figures = [_measure(make, config, images, steps, device, folder, say) for make in makers]
    console.print(phase_table(figures, device))
    console.print(rate_table(figures, config.train.batch_size))
    for line in legend(figures, device):
        say(line)
    traces = " and ".join(str(folder / f"{of.name}.json") for of in figures)
    say(f"written to {traces}: open in https://ui.perfetto.dev or chrome://tracing")


def _fastle(config: RunConfig, device: torch.device, mode: StepMode) -> ProfiledStep:
    # a falling learning rate takes no other time than a constant one
    step = Trainer(config, device, mode=mode, total_steps=sys.maxsize)

    def loss(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            # calling `objective` itself would run the compiled graph
            return step.objective.forward(images, step.draw(images)).total

    return ProfiledStep(
        name="fastle",
        precision=config.train.precision,
        compiles=mode != "eager",
        model=step.model,
        step=step,
        loss=loss,
        ours=step,
    )


def check_plain(config: RunConfig) -> None:
    """Checks that the plain step supports a configuration.

    Raises:
        ConfigError: It does not.
    """
    judge, transform = config.objective.judge, config.objective.transform
    if judge != "step-frozen" or not isinstance(transform, CropResizeConfig):
        asked = f"--judge {judge} --transform {transform.name}" if transform else "--objective pixel"
        raise ConfigError(f"--against eager knows --judge step-frozen with --transform crop-resize only, not {asked}")
    for flag, value, known in (
        ("--accumulate", config.train.accumulate, 1),
        ("--averages", config.train.averages, ()),
    ):
        if value != known:
            raise ConfigError(f"--against eager knows a plain update, not {flag} {value}")


def _plain(start: StartingPoint) -> ProfiledStep:
    step = PlainStep(start)

    def loss(images: Tensor) -> Tensor:
        return step.objective(images, start.draw(images, step.done))

    return ProfiledStep(name="eager", precision="fp32", compiles=False, model=step.model, step=step, loss=loss)


def _measure(
    make: Callable[[], ProfiledStep],
    config: RunConfig,
    images: Images,
    steps: int,
    device: torch.device,
    folder: Path,
    say: Callable[[str], object],
) -> StepFigures:
    # what the step before this one held is freed
    held = allocated_memory(device)
    step = make()
    batch_size, seed, stop = config.train.batch_size, config.train.seed, WARM_UP + 2 * steps + 3
    with Feed(images, batch_size=batch_size, seed=seed, device=device, stop_step=stop) as feed:
        batches = iter(feed)
        say(
            f"{step.name}: {WARM_UP} steps to warm up"
            + (", compilation included: a minute or more" if step.compiles else "")
        )
        seconds = WARM_UP * _seconds_per_step(step, batches, WARM_UP, device)
        if step.ours is not None and step.ours.why_not_captured:
            say(f"{step.name}: {step.ours.why_not_captured}")
        say(f"{step.name}: warm after {seconds:.1f} s; {steps} steps without the profiler, {steps} with it")
        step_ms = 1e3 * _seconds_per_step(step, batches, steps, device)
        memory = _step_memory(step, next(batches), device, held)
        # on a GPU the profiler's first start takes long
        _trace(step, batches, 1, device)
        content = _trace(step, batches, steps, device)
        counted = next(batches)[:COUNTED]
    if not all(bool(weight.isfinite().all()) for weight in step.model.parameters()):
        fault = f"{step.name}: after {stop - 1} steps the weights are not finite, which no profile is worth"
        raise FastleError(f"{fault}; try a lower --lr" + ("" if step.precision == "fp32" else " or --precision fp32"))
    write_atomic(folder / f"{step.name}.json", content)
    phases, total = phase_times(json.loads(content), steps)
    product = product_type(step.precision, device)
    return StepFigures(
        name=step.name,
        phases=phases,
        total=total,
        step_ms=step_ms,
        flop=count_flop(lambda batch: step.loss(batch).backward(), counted),
        product=product,
        peak=matmul_peak(product, device),
        memory=memory,
    )


def _seconds_per_step(step: ProfiledStep, batches: Iterator[Tensor], steps: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step.step(next(batches))
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def _trace(step: ProfiledStep, batches: Iterator[Tensor], steps: int, device: torch.device) -> bytes:
    """A chrome trace of some steps: JSON."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function("step"):
                with record_function("data wait"):
                    images = next(batches)
                step.step(images)
        if device.type == "cuda":
            # the host runs ahead of the device
            with record_function("device wait"):
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return file.read_bytes()


def _step_memory(step: ProfiledStep, images: Tensor, device: torch.device, held: int) -> int:
    """Bytes at the peak of one step.

    On a GPU everything counts that was allocated since `held` bytes were, weights and moments included. A captured step
    counts with its peak while it was recorded, because its replay allocates nothing. On a CPU only what the step itself
    allocates is known.
    """
    if device.type != "cuda":
        step.model.zero_grad()
        return peak_memory(lambda: step.step(images), device)
    before = torch.cuda.memory_allocated(device) - held
    recorded = step.ours.graph_memory - held if step.ours else 0
    return max(before + peak_memory(lambda: step.step(images), device), recorded)
