"""Files of a run that must never be half-written: safetensors and JSON, to a temporary name, flushed, renamed.

A checkpoint is one safetensors file: tensors named `section.name`, and one JSON object as its metadata. This file knows
bytes, names and errors; what goes in is the trainer's business.
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

KEPT = 2


class CheckpointError(FastleError):
    """A run or a checkpoint that is not there, cannot be read or cannot be written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint file holds."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, without that prefix.

        Raises:
            CheckpointError: there is no such section.
        """
        prefix = f"{name}."
        found = {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
        if not found:
            raise CheckpointError(f"{self.path} holds no {name}: it was not written by this version of fastle")
        return found


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, and survives a power cut once this returns.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; an earlier file of that name is untouched.
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
    """Writes `checkpoints/step-NNNNNNNN.safetensors` and keeps the `KEPT` newest.

    Raises:
        CheckpointError: see `write_atomic`.
    """
    tensors = {f"{section}.{name}": t.contiguous() for section, ts in sections.items() for name, t in ts.items()}
    path = run / "checkpoints" / f"step-{step:08d}.safetensors"
    write_atomic(path, safetensors.torch.save(tensors, metadata={"fastle": json.dumps(metadata)}))
    for old in _checkpoints(run)[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, all of it, onto the CPU.

    Raises:
        CheckpointError: the file is truncated, damaged or not a checkpoint of fastle.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["fastle"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        others = [other.name for other in _checkpoints(path.parents[1]) if other != path]
        way_out = (
            f"move it away to go on from {others[-1]}" if others else "move it away or use --overwrite to start anew"
        )
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)}): {way_out}") from None
    return Checkpoint(path, tensors, metadata)


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = _checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint: give a directory that fastle-train made with --run")
    return found[-1]


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return bool(_checkpoints(run))


def read_run_config(run: Path) -> RunConfig:
    """The configuration that a run directory was made with.

    Raises:
        CheckpointError: there is no config.json, or it is damaged.
        ConfigError: it is of another version.
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
