"""The loop: open the images, resume if there is something to resume, step, report, save.

A step is a pure function of the weights, the seed and its number, so a run that was killed and resumed computes what an
uninterrupted one would have.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track as show_progress
from torch import Tensor

from fastle.config import ConfigError, RunConfig
from fastle.data import CacheChoice, DecoderChoice, Feed, Images, Loading, open_training
from fastle.data.order import steps_per_epoch
from fastle.errors import DataError, FastleError

from .display import Clock, Display
from .evaluate import validation_psnr
from .report import effective_rank, latent_spread
from .run import RunDirectory
from .step import StepMode, TrainStep

LOG_EVERY = 20  # steps
REPORTS = 10  # validations, grids and checkpoints in a run, evenly spaced
SAVE_SECONDS = 300.0  # a checkpoint at least this often
VALIDATION_IMAGES = 500


class NonFiniteLoss(FastleError):
    """The loss is NaN or infinite."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came, and the run is saved. `signum` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def train(
    config: RunConfig,
    path: Path,
    *,
    device: torch.device,
    console: Console,
    mode: StepMode = "eager",
    decoder: DecoderChoice = "auto",
    cache: CacheChoice = "auto",
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Trains, or goes on training, the run in a directory.

    Args:
        config: what to compute.
        path: the run directory; made if need be.
        device: of this process.
        console: for the display of rank 0.
        mode: of the step. It decides the rounding, and nothing else: a run may be resumed in another.
        decoder, cache: see `fastle.data.Loading`; a run may be resumed with others.
        overwrite: start anew where there is a run already.
        rank, world_size: of this process; above 1 a process group must be initialised.

    Raises:
        FastleError: the images, the directory or a checkpoint cannot be used, or the loss is not finite.
        Interrupted: a signal came; everything up to here is saved.
    """
    if config.train.batch_size < 2 * world_size:
        raise ConfigError(
            f"--batch-size {config.train.batch_size} leaves one image to some of {world_size} processes, and BatchNorm "
            f"needs two: use {2 * world_size} or more"
        )

    # images
    loading = make_loading(decoder, cache, device, console, processes=world_size)
    images, valid_images = open_training(config.data, loading)
    epoch_steps = steps_per_epoch(len(images), config.train.batch_size)
    total = total_steps(config, epoch_steps)

    # model and run directory; rank 0 alone writes, and the others read after it
    step = TrainStep(config, device, mode=mode, rank=rank, world_size=world_size)
    run, main = RunDirectory(path), rank == 0
    if main:
        run.open(config, overwrite=overwrite)
    if world_size > 1:
        dist.barrier()
    resumed = run.resume(step, images=len(images), total=total)
    if main:
        run.begin(step)

    feed = Feed(
        images,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        device=device,
        start_step=step.done,
        stop_step=total,
        rank=rank,
        world_size=world_size,
    )
    with caught_signals(console) as received, feed, Display(console, total, shown=main) as display:
        display.say(f"{len(images):,} training images, {len(valid_images):,} to validate, {total:,} steps")
        if resumed:
            display.say(resumed)
        try:
            _loop(step, feed, valid_images, run, display, received, epoch_steps, total, world_size)
        except DataError:
            # an image that cannot be read must not cost the steps since the last checkpoint
            if main and step.weights_are_finite():
                run.save(step)
            raise
        display.say(f"done: see {path}/grids and {path}/curves.png; `fastle eval {path}` measures the test split")


def make_loading(
    decoder: DecoderChoice, cache: CacheChoice, device: torch.device, console: Console, *, processes: int = 1
) -> Loading:
    """How a command loads images: with its lines and progress bars on a console."""

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        if not console.is_terminal:
            # of a bar that vanishes, rich leaves a blank line
            return items
        return show_progress(items, description, total, console=console, transient=True)

    return Loading(
        decoder=decoder,
        cache=cache,
        device=device,
        processes=processes,
        say=partial(console.print, highlight=False, markup=False, soft_wrap=True),
        track=track,
    )


def _loop(
    step: TrainStep,
    feed: Feed,
    valid_images: Images,
    run: RunDirectory,
    display: Display,
    received: list[int],
    epoch_steps: int,
    total: int,
    world_size: int,
) -> None:
    main, report_every = step.rank == 0, -(-total // REPORTS)
    clock = Clock(step.config.train.batch_size)
    window = Window(step, clock, feed, run)
    batches = iter(feed)
    if step.refused:
        display.say(step.refused)
    compiling, refused = step.mode != "eager", step.refused
    while step.done < total:
        # step
        images = next(batches)
        if compiling:
            display.say("compiling the step: a minute or more; torch keeps the result for later runs")
        losses = step(images)
        clock.step()
        if compiling:
            display.say(f"{'compiled and ' if step.mode == 'captured' else ''}{step.mode} in {clock.elapsed():.0f} s")
            if step.refused and not refused:
                display.say(step.refused)
            compiling = False
        window.add(losses.terms())
        report = step.done % report_every == 0 or step.done == total
        row_due = report or step.done % LOG_EVERY == 0
        stop = agreed_signal(received, step.device, world_size, row_due)
        if not (row_due or stop):
            continue

        # report
        row = {"step": step.done, "epoch": step.done // epoch_steps, **window.close(losses.latent)}
        with clock.paused():
            if main and report:
                row["valid_psnr"] = validation_psnr(
                    step.model, valid_images, limit=VALIDATION_IMAGES, device=step.device
                )
            if main:
                run.log(row)
            if main and report:
                run.draw(step, valid_images)
            if main and (report or stop or run.since_saved() >= SAVE_SECONDS):
                run.save(step)
        seconds = clock.seconds_per_step()
        display.update(row, None if seconds is None else seconds * (total - step.done), force=report)

        # leave
        if stop and step.done < total:
            raise Interrupted(stop, f"stopped and saved at step {step.done}: run the same command again to go on")


class Window:
    """The steps since the last row of metrics; their terms stay on the device until the row is due.

    Args:
        step, clock, feed: where the figures come from.
        run: to name its last good checkpoint.
    """

    def __init__(self, step: TrainStep, clock: Clock, feed: Feed, run: RunDirectory) -> None:
        self._step, self._clock, self._feed, self._run = step, clock, feed, run
        self._terms: list[dict[str, Tensor]] = []
        self._elapsed, self._wait = clock.elapsed(), feed.wait

    def add(self, terms: dict[str, Tensor]) -> None:
        """The terms of one step."""
        self._terms.append(terms)

    def _check(self) -> None:
        """Raises NonFiniteLoss for a loss of the window, named with its step and terms, or for the weights after it."""
        finite = torch.stack([terms["total"] for terms in self._terms]).isfinite().tolist()
        if not all(finite):
            bad = finite.index(False)
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in self._terms[bad].items())
            fault = f"the loss of step {self._step.done - len(finite) + bad + 1} is not finite ({values})"
        elif not self._step.weights_are_finite():
            fault = f"after step {self._step.done} the weights are not finite"
        else:
            return
        raise NonFiniteLoss(
            f"{fault}; {self._run.last_good()}; try a lower --lr"
            + (" or --precision fp32" if self._step.config.train.precision == "bf16" else "")
        )

    def close(self, latent: Tensor) -> dict[str, Any]:
        """The means over the window, the newest latent's health, and the rates; a new window begins."""
        self._check()
        means = {name: float(torch.stack([terms[name] for terms in self._terms]).mean()) for name in self._terms[0]}
        elapsed, wait, rate = self._clock.elapsed(), self._feed.wait, self._clock.images_per_second()
        row = {
            **means,
            "latent_spread": float(latent_spread(latent)),
            "effective_rank": float(effective_rank(latent)),
            "images_per_second": None if rate is None else round(rate, 1),
            # the share of the window's time
            "data_wait": round((wait - self._wait) / max(elapsed - self._elapsed, 1e-9), 4),
        }
        self._terms, self._elapsed, self._wait = [], elapsed, wait
        return row


def total_steps(config: RunConfig, epoch_steps: int) -> int:
    """The length of a run whose epochs have so many steps."""
    steps, epochs = config.train.steps, config.train.epochs
    return steps if steps is not None else epoch_steps * (epochs or 0)


@contextmanager
def caught_signals(console: Console) -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put in a list instead of ending the process; the second one ends it."""
    received: list[int] = []
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def catch(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()
        console.print(f"{signal.Signals(signum).name}: finishing this step, then saving", highlight=False)

    for signum in previous:
        signal.signal(signum, catch)
    try:
        yield received
    finally:
        restore()


def agreed_signal(received: list[int], device: torch.device, world_size: int, row_due: bool) -> int:
    """The signal that all ranks leave for at this step, or 0.

    Ranks see a signal at different steps, and one that left alone would leave the others waiting for its gradients:
    several ranks compare notes, but only when a row of metrics is due, because that waits for the device.
    """
    signum = received[0] if received else 0
    if world_size == 1 or not row_due:
        return signum if world_size == 1 else 0
    flag = torch.tensor(signum, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)
