"""The training loop: open the images, resume if there is a checkpoint, then train, report and save.

A step is a pure function of the weights, the seed and the step's number. A run that was killed and resumed therefore
computes exactly what an uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as show_progress
from torch import Tensor

from fastle.choices import CacheChoice, DecoderChoice, LoggerName, StepMode
from fastle.config import ConfigError, RunConfig, TrainConfig
from fastle.data import Feed, Identity, Images, Loading, open_training
from fastle.data.order import rank_share
from fastle.errors import DataError
from fastle.lengths import steps_per_epoch, total_steps
from fastle.method.model import Autoencoder
from fastle.method.objective import Losses
from fastle.method.own import OwnParts

from .display import Clock, Display
from .evaluate import validation_psnr
from .loggers import GuardedLogger
from .precision import precision_on, takes_tf32, with_precision
from .ranks import Agreement, Ranks, versions
from .run import RunDirectory
from .signals import SAVE, STOPPING, Interrupted, Signals
from .trainer import FASTLES, Trainer
from .window import Window

LOG_EVERY = 20  # steps between rows of metrics
# and on a GPU at least this many seconds: a row makes it wait for the host, some 10 ms with the eigenvalues
LOG_SECONDS = 5.0
REPORTS = 10  # validations, grids and checkpoints in a run, evenly spaced
SAVE_SECONDS = 300.0  # a checkpoint is written at least this often, when a row of metrics is due
VALIDATION_IMAGES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How this process computes a run, which may be computed otherwise when it goes on.

    Attributes:
        device: The device of this process.
        mode: How steps are computed; it affects rounding only.
        decoder, cache: See `fastle.data.Loading`.
        rank, world_size: See `Trainer`.
    """

    device: torch.device
    mode: StepMode = "eager"
    decoder: DecoderChoice = "auto"
    cache: CacheChoice = "auto"
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What is told of a run beside its directory, on rank 0.

    Attributes:
        on_report, on_checkpoint: See `fastle.fit`.
        log: A logger that gets the rows of metrics and the grids.
    """

    on_report: Callable[[dict[str, Any], Autoencoder], object] | None = None
    on_checkpoint: Callable[[Path], object] | None = None
    log: LoggerName | None = None


NO_HOOKS = Hooks()


def train(
    config: RunConfig,
    path: Path,
    execution: Execution,
    *,
    console: Console,
    progress: bool = True,
    overwrite: bool = False,
    accept_new_data: bool = False,
    open_images: Callable[[RunConfig, Loading], tuple[Images, Images, Identity]] | None = None,
    hooks: Hooks = NO_HOOKS,
    own: OwnParts = FASTLES,
) -> Trainer:
    """Starts or resumes the run in a directory, and trains to its end.

    Args:
        config: What to compute.
        path: The run directory, created if need be.
        execution: How to compute it.
        console: Where rank 0 displays its progress.
        progress: Whether it does. Warnings about slow or unexpected choices are printed in any case.
        overwrite: Whether to start anew if the directory holds a run already.
        accept_new_data: Whether a run goes on with other training images than those that it was saved with.
        open_images: Opens the images to train and to validate, and identifies the first; by default those of `config`.
        hooks: What else is told of the run.
        own: See `Trainer`.

    Returns:
        The trainer, at the end of the run.

    Raises:
        FastleError: The images, the directory or a checkpoint cannot be used, or the loss is not finite.
        Interrupted: A signal arrived. The run has been saved.
    """
    device, rank, world_size = execution.device, execution.rank, execution.world_size
    _check_batch_size(config.train, world_size)
    main, say = rank == 0, partial(console.print, highlight=False, markup=False, soft_wrap=True)
    config = _settle_precision(config, device, None if overwrite else path, say)
    logger = GuardedLogger(hooks.log, say) if hooks.log is not None and main else None
    run = RunDirectory(path, overwrite=overwrite, say=say, on_checkpoint=hooks.on_checkpoint, logger=logger)
    with (
        Signals(say, run.last_good_checkpoint) as signals,
        Ranks(rank, world_size, run.last_good_checkpoint) as ranks,
        run,
    ):
        # only rank 0 writes, and the other ranks read once it has looked
        ranks.together(lambda: run.open(config) if main else None)

        # images
        loading = make_loading(execution.decoder, execution.cache, device, console, processes=world_size)
        images, valid_images, identity = ranks.together(
            lambda: open_training(config.data, loading) if open_images is None else open_images(config, loading)
        )
        total = ranks.together(lambda: total_steps(config, steps_per_epoch(len(images), config.train.batch_size)))

        # trainer
        trainer = Trainer(
            config, device, mode=execution.mode, rank=rank, world_size=world_size, total_steps=total, own=own
        )
        resumed = ranks.together(
            lambda: run.resume(trainer, images=identity, total=total, accept_new_data=accept_new_data)
        )
        ranks.compare(_common_facts(trainer, identity, total))
        if main:
            run.begin(trainer)

        # steps
        feed = Feed(
            images, batch_size=config.train.batch_size, seed=config.train.seed, device=device,
            start_step=trainer.done, stop_step=total, rank=rank, world_size=world_size,
        )  # fmt: skip
        with feed, Display(console, total, shown=main, rows=progress) as display:
            display.tell(f"{len(images):,} training images, {len(valid_images):,} to validate, {total:,} steps")
            if resumed:
                display.say(resumed)
            with signals.mode("after the step"), _saving_before_bad_images(trainer, run):
                _loop(trainer, run, feed, valid_images, display, signals, hooks.on_report)
            display.tell(f"done: see {path}/grids and {path}/curves.png; `fastle eval {path}` measures the test split")
    return trainer


def _settle_precision(
    config: RunConfig, device: torch.device, kept: Path | None, say: Callable[[str], object]
) -> RunConfig:
    """The configuration as `with_precision` gives it, after a line about the formats that it did not name itself."""
    automatic, config = config, with_precision(config, device, kept)
    if config != automatic and config.train.precision == "bf16":
        say(f"computing in bf16, as {'--precision auto does here' if precision_on(device) == 'bf16' else 'before'}")
    if takes_tf32(device, config.train.precision):
        say("convolutions and matrix products multiply in TF32, SIGReg in fp32")
    return config


@contextmanager
def _saving_before_bad_images(trainer: Trainer, run: RunDirectory) -> Iterator[None]:
    """Saves the steps since the last checkpoint where an image that cannot be read ends the run."""
    try:
        yield
    except DataError:
        if trainer.rank == 0 and trainer.weights_are_finite():
            run.save(trainer)
        raise


def _common_facts(trainer: Trainer, images: Identity, total: int) -> dict[str, Any]:
    """What all ranks must have in common, by names that an error can show."""
    settings = {name: value for group in trainer.config.settings().values() for name, value in group.items()}
    # the same images may lie in another folder on another machine
    settings.pop("data", None)
    return {
        "the number of images": images.count,
        "the names of the images": images.names,
        "the sizes of the images": images.sizes,
        "the versions": versions(),
        "the steps taken": trainer.done,
        "the steps to take": total,
        "--step": trainer.mode,
        **{f"--{name.replace('_', '-')}": value for name, value in settings.items()},
    }


def make_loading(
    decoder: DecoderChoice, cache: CacheChoice, device: torch.device, console: Console, *, processes: int = 1
) -> Loading:
    """How a command loads images, with its messages and progress bars on a console."""

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


def _check_batch_size(config: TrainConfig, world_size: int) -> None:
    rank_share(config.batch_size, world_size)
    if config.batch_size < 2 * world_size:
        raise ConfigError(
            f"--batch-size {config.batch_size} leaves one image to some of {world_size} processes, and BatchNorm "
            f"needs two: use {2 * world_size} or more"
        )
    if config.accumulate > 1 and config.batch_size % (world_size * config.accumulate):
        raise ConfigError(
            f"--batch-size {config.batch_size} does not divide into --accumulate {config.accumulate} equal parts on "
            f"each of {world_size} processes"
        )


def _loop(
    trainer: Trainer,
    run: RunDirectory,
    feed: Feed,
    valid_images: Images,
    display: Display,
    signals: Signals,
    on_report: Callable[[dict[str, Any], Autoencoder], object] | None,
) -> None:
    """Takes the steps of the feed, and stops after one of them if a signal asks for it."""
    main, total = trainer.rank == 0, feed.stop_step
    report_every = -(-total // REPORTS)
    clock = Clock(trainer.config.train.batch_size)
    window = Window(trainer, clock, feed, run)
    agreed = Agreement(trainer.device, trainer.world_size)
    if trainer.why_not_captured:
        display.say(trainer.why_not_captured)

    for images in feed:
        # train
        losses = trainer(images) if clock.steps else _first_step(trainer, images, clock, display, signals)
        clock.step()
        window.add(losses.terms())
        report = trainer.done % report_every == 0 or trainer.done == total
        row_due = report or (trainer.done % LOG_EVERY == 0 and window.seconds() >= seconds_of_window(trainer))
        request = agreed(signals.request, clock.seconds_per_step())
        if not (row_due or request):
            continue

        # report and save
        row = {"step": trainer.done, "epoch": trainer.done // feed.steps_per_epoch, **window.close(losses.latent)}
        with clock.paused():
            if main:
                _report(trainer, run, valid_images, row, signals, report=report, save=request > 0)
                if report and on_report is not None:
                    on_report(dict(row), trainer.model)
        seconds = clock.seconds_per_step()
        display.update(row, None if seconds is None else seconds * (total - trainer.done), force=report)

        # answer a signal
        if request == SAVE:
            signals.forget_save()
            display.say(f"saved at step {trainer.done}")
        elif request and trainer.done < total:
            done = f"stopped and saved at step {trainer.done}"
            raise Interrupted(request - STOPPING, f"{done}: run the same command again to go on")


def _report(
    trainer: Trainer,
    run: RunDirectory,
    valid_images: Images,
    row: dict[str, Any],
    signals: Signals,
    *,
    report: bool,
    save: bool,
) -> None:
    """Writes a row of metrics, at a report with a validation and pictures, and a checkpoint if one is due."""
    if report:
        models = {"": trainer.model} | {f"_{average.name}": average.model for average in trainer.averages}
        with signals.cut_short():
            for name, model in models.items():
                row[f"valid_psnr{name}"] = validation_psnr(
                    model, valid_images, limit=VALIDATION_IMAGES, device=trainer.device
                )
    run.log(row)
    if report or save or run.seconds_since_saved() >= SAVE_SECONDS:
        run.save(trainer)
    if report:
        run.save_pictures(trainer, valid_images)


def _first_step(trainer: Trainer, images: Tensor, clock: Clock, display: Display, signals: Signals) -> Losses:
    """Takes the first step. If the step is compiled, says so before and after; a signal ends it without saving."""
    if trainer.mode == "eager":
        return trainer(images)
    known = trainer.why_not_captured
    display.say("compiling the step: a minute or more; torch keeps the result for later runs")
    with signals.mode("at once"):
        losses = trainer(images)
    compiled = "compiled and captured" if trainer.mode == "captured" else "compiled"
    display.say(f"{compiled} in {clock.elapsed():.0f} s")
    if trainer.why_not_captured and not known:
        display.say(trainer.why_not_captured)
    return losses


def seconds_of_window(trainer: Trainer) -> float:
    """How long a window of metrics lasts at least."""
    # ranks find a loss that is not finite at the same step
    return LOG_SECONDS if trainer.device.type == "cuda" and trainer.world_size == 1 else 0.0
