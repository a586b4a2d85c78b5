"""The run directory: config.json, metrics.jsonl, grids/, curves.png and checkpoints/, written by one process.

The same command again goes on from the newest checkpoint, `overwrite` starts anew, and nothing else deletes (but for
checkpoints older than the newest two).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastle.checkpoint import (
    has_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_run_config,
    save_checkpoint,
    write_atomic,
)
from fastle.config import ConfigError, RunConfig
from fastle.data import Images

from .evaluate import reconstruction_rows, spread
from .report import append_metrics, read_metrics, rewind_metrics, save_curves, save_grid
from .step import TrainStep

GRID_IMAGES = 8
OURS = ("checkpoints", "grids", "metrics.jsonl", "curves.png", "config.json")


class RunDirectory:
    """A run on disk.

    Args:
        path: of the directory; made when the run begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._images = 0

    def open(self, config: RunConfig, *, overwrite: bool) -> None:
        """Checks that the directory holds this very run or none, or clears it of the one it holds.

        Raises:
            ConfigError: it holds a run with another configuration; only the steps may have grown.
            CheckpointError: it cannot be read.
        """
        if overwrite and (self.path / "config.json").exists():
            self._clear()
        # without a checkpoint there is nothing to mix up: the run failed before its first
        if has_checkpoint(self.path):
            check_same_run(self.path, read_run_config(self.path), config)

    def resume(self, step: TrainStep, *, images: int, total: int) -> str | None:
        """Puts the newest checkpoint, if there is one, into `step`.

        Args:
            images: in the training split, which must be as many as when the run began.
            total: steps of the run.

        Returns:
            A line to show, or None for a new run.

        Raises:
            FastleError: the checkpoint cannot be read, or is of other images or of a longer run.
        """
        self._images = images
        if not has_checkpoint(self.path):
            return None
        checkpoint = load_checkpoint(latest_checkpoint(self.path))
        done, before = int(checkpoint.metadata["step"]), int(checkpoint.metadata["train_images"])
        if before != images:
            raise ConfigError(
                f"{self.path} was trained on {before} images and there are {images} now: restore them, "
                "give another --run, or --overwrite to start anew"
            )
        if done > total:
            raise ConfigError(f"{self.path} is at step {done} already, past the {total} asked for: give more --steps")
        step.load(checkpoint, done)
        self._saved_step = done
        return f"resumed from {checkpoint.path}" + (", nothing left to do" if done == total else "")

    def begin(self, step: TrainStep) -> None:
        """Writes what steps will be added to: config.json, and metrics.jsonl up to the step resumed from."""
        write_atomic(self.path / "config.json", json.dumps(step.config.to_dict(), indent=2).encode() + b"\n")
        rewind_metrics(self.path / "metrics.jsonl", step.done)

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics."""
        append_metrics(self.path / "metrics.jsonl", row)

    def draw(self, step: TrainStep, images: Images) -> None:
        """The grid of fixed images of a split, and the curves so far."""
        batch = images.batch(spread(len(images), GRID_IMAGES)).to(step.device)
        rows = reconstruction_rows(step.model, batch, step.config.objective.hole_ratio)
        save_grid(self.path / "grids" / f"step-{step.done:08d}.png", rows)
        save_curves(self.path / "curves.png", read_metrics(self.path / "metrics.jsonl"))

    def save(self, step: TrainStep) -> None:
        """A checkpoint of this step, unless it is there."""
        if self._saved_step != step.done:
            save_checkpoint(self.path, step.done, step.state(), {"step": step.done, "train_images": self._images})
            self._saved_step, self._saved_at = step.done, time.monotonic()

    def since_saved(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._saved_at

    def last_good(self) -> str:
        """Where the run could go on from, in words."""
        if not has_checkpoint(self.path):
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {latest_checkpoint(self.path)}"

    def _clear(self) -> None:
        # config.json goes last: until then the directory is known as a run, and --overwrite can be given again
        for name in OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_same_run(path: Path, before: RunConfig, now: RunConfig) -> None:
    """Raises ConfigError, naming every difference, if two configurations differ in more than the length of the run."""
    same_length = replace(now, train=replace(now.train, steps=before.train.steps, epochs=before.train.epochs))
    if same_length == before:
        return
    old, new = _flatten(before.to_dict()), _flatten(same_length.to_dict())
    names = old | new
    differences = [f"{name} {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]
    raise ConfigError(
        f"{path} holds a run with another configuration ({', '.join(differences)}): give another --run, "
        "or --overwrite to start anew"
    )


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
