"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. Each is imported only if it is asked for.

A logger that fails says so once, and the training goes on without it: metrics.jsonl has everything.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastle.choices import LoggerName
from fastle.extras import missing_extra
from fastle.files import one_line

PROJECT = "fastle"
RUN_ID = "logger-id.txt"  # by which a service recognises a resumed run


class Logger(Protocol):
    """Where the rows of metrics and the grids of one run go. A method that fails raises an exception."""

    def row(self, row: dict[str, Any], step: int) -> object:
        """Takes numbers by their names."""

    def grid(self, path: Path, step: int) -> object:
        """Takes a PNG."""

    def close(self) -> object:
        """Waits until everything has been written or sent."""


class GuardedLogger:
    """A logger that is dropped, with a line, when it fails: the training goes on.

    Args:
        name: The logger.
        say: Shows a line.

    Raises:
        MissingExtra: Its package is not installed.
    """

    def __init__(self, name: LoggerName, say: Callable[[str], object]) -> None:
        self._name, self._say = name, say
        self._make = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}[name]
        try:
            self._package = _import(name)
        except ModuleNotFoundError as error:
            raise missing_extra(error, f"--log {name}") or error from None
        self._logger: Logger | None = None

    def begin(self, run: Path, config: dict[str, Any], done: int) -> None:
        """Begins or continues to log a run that has taken `done` steps."""
        self._guard(lambda: setattr(self, "_logger", self._make(self._package, run, config, done)))

    def row(self, row: dict[str, Any]) -> None:
        """Logs a row of metrics; see `append_metrics`."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        if self._logger is not None:
            self._guard(partial(self._logger.row, values, row["step"]))

    def grid(self, path: Path, step: int) -> None:
        """Logs a grid of reconstructions."""
        if self._logger is not None:
            self._guard(partial(self._logger.grid, path, step))

    def close(self) -> None:
        """Ends the logging; it may wait for a service."""
        if self._logger is not None:
            self._guard(self._logger.close)
        self._logger = None

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (other people's code, networks and disks: none may cost a training)
            self._logger = None
            self._say(f"--log {self._name} has failed, and the run goes on without it ({one_line(error)[:200]})")


def _import(name: LoggerName) -> Any:
    if name == "tensorboard":
        from torch.utils import tensorboard

        return tensorboard
    if name == "wandb":
        import wandb

        return wandb
    import trackio

    return trackio


class _TensorBoard:
    def __init__(self, package: Any, run: Path, config: dict[str, Any], done: int) -> None:
        # purge_step hides what a killed run logged after its last checkpoint
        self._writer = package.SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=done + 1)
        self._writer.add_text("configuration", "\n".join(f"- {name}: {value}" for name, value in config.items()), done)

    def row(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def grid(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._writer.add_image("grid", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service:
    """What Weights & Biases and Trackio, which took over its functions, have in common."""

    def __init__(self, package: Any, run: Any) -> None:
        self._package, self._run = package, run

    def row(self, row: dict[str, Any], step: int) -> None:
        self._run.log(row, step=step)

    def grid(self, path: Path, step: int) -> None:
        self._run.log({"grid": self._package.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb(_Service):
    def __init__(self, package: Any, run: Path, config: dict[str, Any], done: int) -> None:
        # what is passed here wins over the variables of Weights & Biases
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", run.resolve().name)
        options = {"project": project, "dir": str(run), "id": _identity(run), "name": name}
        super().__init__(package, package.init(**options, config=config, resume="allow"))


class _Trackio(_Service):
    def __init__(self, package: Any, run: Path, config: dict[str, Any], done: int) -> None:
        name = f"{run.resolve().name}-{_identity(run)}"
        package.init(project=PROJECT, name=name, config=config, resume="allow")
        # its module logs to the run that was begun last
        super().__init__(package, package)


def _identity(run: Path) -> str:
    """A name that no other run has, kept in the run directory."""
    path = run / RUN_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
