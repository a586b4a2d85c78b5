"""The run directory: config.json, metrics.jsonl, grids/, curves.png and checkpoints/, written by one process.

Running the same command again resumes from the newest checkpoint; `overwrite` starts anew. Nothing else deletes files,
except that only the two newest checkpoints are kept.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from fastle.checkpoint import (
    has_checkpoint,
    latest_checkpoint,
    newest_good_checkpoint,
    read_run_config,
    save_checkpoint,
    write_atomic,
)
from fastle.config import ConfigError, RunConfig
from fastle.data import Images

from .evaluate import evenly_spaced, reconstruction_rows
from .report import append_metrics, read_metrics, rewind_metrics, save_curves, save_grid
from .trainer import Trainer

GRID_IMAGES = 8
# config.json is last: until it goes, the directory is recognised as a run, so that --overwrite can be repeated
RUN_FILES = ("checkpoints", "grids", "metrics.jsonl", "curves.png", "config.json")


class RunDirectory:
    """A run on disk.

    Args:
        path: The directory, which is created when the run begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._train_images = 0

    def open(self, config: RunConfig, *, overwrite: bool) -> None:
        """Checks that the directory holds no other run. With `overwrite`, deletes the files of the run it holds.

        Raises:
            ConfigError: It holds a run with another configuration; only the number of steps may differ.
            CheckpointError: Its configuration cannot be read.
        """
        if overwrite and (self.path / "config.json").exists():
            self._clear()
        # a run without a checkpoint failed before its first one, so no results can be mixed up
        if has_checkpoint(self.path):
            check_same_run(self.path, read_run_config(self.path), config)

    def resume(self, trainer: Trainer, *, images: int, total: int) -> str | None:
        """Restores the newest checkpoint, if there is one.

        Args:
            trainer: Restored in place.
            images: The number of training images, which must be what it was when the run began.
            total: The number of steps of the whole run.

        Returns:
            A line to show, or None for a new run.

        Raises:
            FastleError: The checkpoint cannot be read, or it belongs to other images or to a longer run.
        """
        self._train_images = images
        if not has_checkpoint(self.path):
            return None
        checkpoint, remark = newest_good_checkpoint(self.path, trainer.check)
        done, before = checkpoint.step, int(checkpoint.metadata["train_images"])
        if before != images:
            raise ConfigError(
                f"{self.path} was trained on {before} images and there are {images} now: restore them, "
                "give another --run, or --overwrite to start anew"
            )
        if done > total:
            raise ConfigError(f"{self.path} is at step {done} already, past the {total} asked for: give more --steps")
        trainer.load(checkpoint, done)
        self._saved_step = done
        resumed = f"resumed from {checkpoint.path}" + (", nothing left to do" if done == total else "")
        return resumed if remark is None else f"{resumed}; {remark}"

    def begin(self, trainer: Trainer) -> None:
        """Writes config.json, and cuts metrics.jsonl back to the step that the run resumes from."""
        write_atomic(self.path / "config.json", json.dumps(trainer.config.to_dict(), indent=2).encode() + b"\n")
        rewind_metrics(self.path / "metrics.jsonl", trainer.done)

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        append_metrics(self.path / "metrics.jsonl", row)

    def save_pictures(self, trainer: Trainer, images: Images) -> None:
        """Writes a grid of reconstructions, always of the same images of the split, and the curves so far."""
        batch = images.batch(evenly_spaced(len(images), GRID_IMAGES)).to(trainer.device)
        rows = reconstruction_rows(trainer.model, batch, trainer.config.objective.hole_ratio)
        save_grid(self.path / "grids" / f"step-{trainer.done:08d}.png", rows)
        save_curves(self.path / "curves.png", read_metrics(self.path / "metrics.jsonl"))

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint, unless this step has one already."""
        step = trainer.done
        if self._saved_step != step:
            identity = {"train_images": self._train_images, "config": trainer.config.to_dict()}
            save_checkpoint(self.path, step, trainer.state(), {"step": step, **identity})
            self._saved_step, self._saved_at = step, time.monotonic()

    def seconds_since_saved(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._saved_at

    def last_good_checkpoint(self) -> str:
        """Says, in words, which checkpoint the run could resume from."""
        if not has_checkpoint(self.path):
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {latest_checkpoint(self.path)}"

    def _clear(self) -> None:
        for name in RUN_FILES:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_same_run(path: Path, before: RunConfig, now: RunConfig) -> None:
    """Raises ConfigError, naming every difference, if two configurations differ in more than the number of steps."""
    differences = before.differences(now)
    if differences:
        raise ConfigError(
            f"{path} holds a run with another configuration ({', '.join(differences)}): give another --run, "
            "or --overwrite to start anew"
        )
