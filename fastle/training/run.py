"""The run directory, written by one process: configuration, metrics, starts, grids, curves and checkpoints.

Running the same command again resumes from the newest checkpoint; `overwrite` starts anew. Nothing else deletes files,
except that only the two newest checkpoints are kept.

A directory is a run's if its config.json says so. `overwrite` moves the files of the run before aside, and deletes them
once the new run has a checkpoint of its own. If the new run ends before its first checkpoint, the old run is restored,
at once or when the directory is next opened.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fastle.checkpoint import (
    CheckpointError,
    checkpoints,
    has_checkpoint,
    is_run,
    latest_checkpoint,
    load_checkpoint,
    newest_good_checkpoint,
    read_run_config,
    save_checkpoint,
    write_run_config,
)
from fastle.config import ConfigError, RunConfig
from fastle.data import Identity, Images
from fastle.machine import environment

from .evaluate import evenly_spaced, reconstruction_rows
from .lock import RunLock
from .loggers import RUN_ID, GuardedLogger
from .report import STARTS, append_metrics, append_start, read_metrics, rewind_metrics, save_curves, save_grid
from .trainer import Trainer

GRID_IMAGES = 8
PAGE = "report.html"  # which fastle-train writes at the end
# patterns of the files and folders that a run writes
RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    STARTS,
    "curves.png",
    PAGE,
    "grids",
    "checkpoints",
    "eval-*.json",
    "probe-*.json",
    "tensorboard",
    "wandb",
    RUN_ID,
)
# folders for the files of a run that is being overwritten: all of them, or those moved so far
REPLACED, MOVING = "replaced-run", "replaced-run.moving"


class RunDirectory:
    """A run on disk. Use it in a `with` statement, which holds the directory's lock from `open` on.

    Args:
        path: The directory, which is created when it is opened.
        overwrite: Whether to start anew if the directory holds a run already.
        say: Shows a line.
        on_checkpoint: Called with the path of each checkpoint, once it is on disk.
        logger: Gets the rows of metrics and the grids too.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        say: Callable[[str], object] = lambda line: None,
        on_checkpoint: Callable[[Path], object] | None = None,
        logger: GuardedLogger | None = None,
    ) -> None:
        self.path = path
        self._logger = logger
        self._on_checkpoint = on_checkpoint
        self._overwrite, self._say = overwrite, say
        self._lock = RunLock(path, say)
        self._created = self._opened = False
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._config: RunConfig | None = None
        self._images: Identity | None = None
        self._start: dict[str, Any] = {}

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._logger is not None:
            self._logger.close()
        if not self._opened:
            return
        self._finish_overwriting()
        self._lock.release()
        if self._created and not any(self.path.iterdir()):
            self.path.rmdir()

    def open(self, config: RunConfig) -> None:
        """Takes the lock, and checks that the directory can hold this run. No file of a run is changed.

        Raises:
            ConfigError: It holds files that are no run's, or a run with another configuration; only the number of steps
                may differ.
            CheckpointError: Its configuration cannot be read, or it cannot be written to.
            RunLocked: Another process writes to it.
        """
        check_no_stranger(self.path)
        self._created = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror}; give another --run") from None
        self._opened = True
        self._finish_overwriting()
        # a run without a checkpoint failed before its first one, so no results can be mixed up
        if has_checkpoint(self.path) and not self._overwrite:
            self._check_config(config)

    def _check_config(self, config: RunConfig) -> None:
        """Raises ConfigError, naming every difference, if the run there differs in more than the number of steps."""
        differences = read_run_config(self.path).differences(config)
        if not differences:
            return
        named = f"({', '.join(differences)})"
        if any(_belongs_to(path, config) for path in checkpoints(self.path)):
            raise ConfigError(
                f"{self.path / 'config.json'} is of another run than its checkpoints {named}: "
                f"`fastle check {self.path} --restore-config` writes it anew"
            )
        raise ConfigError(
            f"{self.path} holds a run with another configuration {named}: give the former values to continue it, "
            "another --run, or --overwrite to start anew"
        )

    def resume(self, trainer: Trainer, *, images: Identity, total: int, accept_new_data: bool = False) -> str | None:
        """Restores the newest checkpoint, if there is one and it is not to be overwritten.

        Args:
            trainer: Restored in place.
            images: The training images, which must be what they were when the run was saved.
            total: The number of steps of the whole run.
            accept_new_data: Whether the images may have changed all the same.

        Returns:
            A line to show, or None for a new run.

        Raises:
            FastleError: The checkpoint cannot be read, or it belongs to other images or to a longer run.
        """
        self._images = images
        if self._overwrite or not has_checkpoint(self.path):
            return None
        checkpoint, remark = newest_good_checkpoint(self.path, trainer.check)
        done = checkpoint.step
        change = _change_of_images(checkpoint.metadata, images)
        if change and not accept_new_data:
            raise ConfigError(
                f"{self.path}: the training images {change}: restore them, give another --run, "
                "--accept-new-data to go on with these, or --overwrite to start anew"
            )
        if done > total:
            raise ConfigError(f"{self.path} is at step {done} already, past the {total} asked for: give more --steps")
        trainer.load(checkpoint, done)
        self._saved_step = done
        accepted = f" on other images: they {change}" if change else ""
        resumed = f"resumed from {checkpoint.path}{accepted}" + (", nothing left to do" if done == total else "")
        return resumed if remark is None else f"{resumed}; {remark}"

    def begin(self, trainer: Trainer) -> None:
        """Writes config.json, and cuts metrics.jsonl back to the step that the run resumes from.

        A run that is to be overwritten is moved aside first.
        """
        if self._overwrite and any(_files_of_run(self.path)):
            self._move_aside()
        self._config = trainer.config
        self._write_config()
        rewind_metrics(self.path / "metrics.jsonl", trainer.done)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        facts = {"step": trainer.done, "command": command, "mode": trainer.mode, "ranks": trainer.world_size}
        self._start = facts | environment(trainer.device)
        if self._logger is not None:
            settings = trainer.config.settings().values()
            self._logger.begin(self.path, {k: v for group in settings for k, v in group.items()}, trainer.done)

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl; before the first one, a line to starts.jsonl."""
        self._restore_directory()
        if self._start:
            append_start(self.path, self._start)
            self._start = {}
        append_metrics(self.path / "metrics.jsonl", row)
        if self._logger is not None:
            self._logger.row(row)

    def save_pictures(self, trainer: Trainer, images: Images) -> None:
        """Writes a grid of reconstructions, always of the same images of the split, and the curves so far."""
        batch = images.batch(evenly_spaced(len(images), GRID_IMAGES)).to(trainer.device)
        rows = reconstruction_rows(trainer.model, batch, trainer.config.objective.hole_ratio)
        grid = self.path / "grids" / f"step-{trainer.done:08d}.png"
        save_grid(grid, rows)
        if self._logger is not None:
            self._logger.grid(grid, trainer.done)
        save_curves(self.path / "curves.png", read_metrics(self.path / "metrics.jsonl"))

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint, unless this step has one already."""
        step = trainer.done
        self._restore_directory()
        if self._saved_step != step:
            # earlier versions know images by their number alone
            images = (
                {} if self._images is None else {"train_images": self._images.count, "images": self._images.to_dict()}
            )
            identity = {"step": step, "config": trainer.config.to_dict(), **images}
            saved = save_checkpoint(self.path, step, trainer.state(), identity)
            self._saved_step, self._saved_at = step, time.monotonic()
            if (self.path / REPLACED).exists():
                shutil.rmtree(self.path / REPLACED)
            if self._on_checkpoint is not None:
                self._on_checkpoint(saved)

    def seconds_since_saved(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._saved_at

    def last_good_checkpoint(self) -> str:
        """Says, in words, which checkpoint the run could resume from."""
        if not has_checkpoint(self.path):
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {latest_checkpoint(self.path)}"

    def _write_config(self) -> None:
        assert self._config is not None
        write_run_config(self.path, self._config.to_dict())

    def _restore_directory(self) -> None:
        """Makes the directory anew if it has been deleted since the run began."""
        if (self.path / "config.json").exists() or self._config is None:
            return
        self._say(f"{self.path} has been deleted in mid-run: it is made anew, and what it held is lost")
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock.is_lost():
            self._lock.release()
            self._lock.acquire()
        # whatever was saved is gone: a checkpoint is due
        self._saved_step, self._saved_at = 0, -math.inf
        self._write_config()

    def _move_aside(self) -> None:
        """Moves the files of a run to `REPLACED`. Killed half-way, it leaves `MOVING`, which means: move them back."""
        moving = self.path / MOVING
        moving.mkdir()
        for file in _files_of_run(self.path):
            file.rename(moving / file.name)
        moving.rename(self.path / REPLACED)

    def _put_back(self) -> None:
        """Deletes the files of a run without a checkpoint, and puts those of the run before it back."""
        for file in _files_of_run(self.path):
            _delete(file)
        (self.path / REPLACED).rename(self.path / MOVING)
        self._move_back()
        self._say(f"{self.path} holds the run before again: the new one ended before its first checkpoint")

    def _move_back(self) -> None:
        for file in (self.path / MOVING).iterdir():
            file.rename(self.path / file.name)
        (self.path / MOVING).rmdir()

    def _finish_overwriting(self) -> None:
        """Finishes the overwriting that this process, or one that was killed, has left half-way."""
        if (self.path / MOVING).exists():
            self._move_back()
        if not (self.path / REPLACED).exists():
            return
        if has_checkpoint(self.path):
            shutil.rmtree(self.path / REPLACED)
        else:
            self._put_back()


def check_no_stranger(path: Path) -> None:
    """Raises ConfigError if a directory holds files that a run would write, and that are not a run's."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--run {path} is a file: give a directory")
    if any((path / name).is_dir() for name in (REPLACED, MOVING)) or not path.exists():
        return
    strangers = sorted(file.name for file in _files_of_run(path))
    if strangers and not is_run(path):
        raise ConfigError(
            f"{path} holds {', '.join(strangers)}, which no run of fastle wrote: give another --run, or move them away"
        )


def _files_of_run(path: Path) -> list[Path]:
    return [file for pattern in RUN_FILES for file in sorted(path.glob(pattern))]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _belongs_to(checkpoint: Path, config: RunConfig) -> bool:
    """Whether a checkpoint knows that it is of a configuration, whatever the number of steps."""
    try:
        known = load_checkpoint(checkpoint, ()).metadata.get("config")
        return known is not None and not RunConfig.from_dict(known).differences(config)
    except (CheckpointError, ConfigError):
        return False


def _change_of_images(metadata: dict[str, Any], now: Identity) -> str | None:
    """How the images have changed since a checkpoint was saved, or None."""
    if "images" in metadata:
        return now.difference(Identity.from_dict(metadata["images"]))
    # earlier versions
    return now.difference(replace(now, count=int(metadata["train_images"])))
