"""Checkpoints, and atomic writes: a file is written to a temporary name, flushed and renamed, so it is whole or absent.

A checkpoint is one safetensors file. Its tensors are named `section.name`, and its metadata is one JSON object. This
module knows bytes, names and errors; the trainer decides what a checkpoint holds.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .config import RunConfig
from .errors import FastleError

KEPT = 2  # checkpoints of a run


class CheckpointError(FastleError):
    """A run or a checkpoint is missing, cannot be read, or cannot be written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint file, with the tensors on the CPU."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors of a section, named without its prefix.

        Raises:
            CheckpointError: There is no such section.
        """
        prefix = f"{name}."
        tensors = {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
        if not tensors:
            raise CheckpointError(f"{self.path} holds no {name}: it was not written by this version of fastle")
        return tensors


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all. Once this returns, the file survives a power cut.

    Raises:
        CheckpointError: The disk is full or the folder is not writable. An earlier file of that name is left untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; make room or give another --run, then run the same "
            "command again (what was saved before is intact)"
        ) from None


def save_checkpoint(run: Path, step: int, sections: dict[str, dict[str, Tensor]], metadata: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-NNNNNNNN.safetensors`, and deletes all but the `KEPT` newest checkpoints.

    Args:
        run: The run directory.
        step: The number of steps taken.
        sections: The tensors, by section and name.
        metadata: Any JSON object.

    Raises:
        CheckpointError: See `write_atomic`.
    """
    tensors = {f"{section}.{name}": t.contiguous() for section, ts in sections.items() for name, t in ts.items()}
    path = run / "checkpoints" / f"step-{step:08d}.safetensors"
    write_atomic(path, safetensors.torch.save(tensors, metadata={"fastle": json.dumps(metadata)}))
    for old in _checkpoints(run)[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a whole checkpoint onto the CPU.

    Raises:
        CheckpointError: The file is truncated, damaged or not a checkpoint of fastle.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["fastle"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        others = [other.name for other in _checkpoints(path.parents[1]) if other != path]
        hint = f"move it away to go on from {others[-1]}" if others else "move it away or use --overwrite to start anew"
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)}): {hint}") from None
    return Checkpoint(path, tensors, metadata)


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: There is none.
    """
    checkpoints = _checkpoints(run)
    if not checkpoints:
        raise CheckpointError(f"{run} holds no checkpoint: give a directory that fastle-train made with --run")
    return checkpoints[-1]


def has_checkpoint(run: Path) -> bool:
    """Whether the run has a checkpoint to resume from."""
    return bool(_checkpoints(run))


def read_run_config(run: Path) -> RunConfig:
    """The configuration of the run in a directory.

    Raises:
        CheckpointError: There is no config.json, or it is damaged.
        ConfigError: Another version of fastle wrote it.
    """
    path = run / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not a run: it has no config.json; give a directory made with --run") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)})") from None
    return RunConfig.from_dict(values)


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
