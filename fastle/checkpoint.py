"""Checkpoints, and the configuration of a run.

A checkpoint is one safetensors file. Its tensors are named `section.name`. Its metadata is one text: the crc32 of the
rest in hexadecimal, a space, and a JSON object of the step, what the run is and is trained on, and the crc32 of every
section. It is one text because safetensors writes several in any order, and one state would give different files.
The crc32 of a section covers the names, types, shapes and bytes of its tensors, so that no flipped bit goes unnoticed.
Checkpoints of fastle 0.1 have no checksums; all other checks hold for them too. This module knows bytes, names and
errors; the trainer decides what a checkpoint holds.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .config import ConfigError, RunConfig
from .errors import FastleError
from .files import Header, one_line, open_regular, parse_json, read_header, read_json, read_tensor, write_atomic
from .options import shown

FORMAT = 2  # of the metadata; 1 had no checksums, and no number in the file
RUN_FORMAT = "fastle run"  # the marker in config.json
MODEL_FORMAT = "fastle model"  # the same of a model that was saved without its run
KEPT = 2  # checkpoints of a run
NAME = r"step-[0-9]{8,12}\.safetensors"  # of a checkpoint


class CheckpointError(FastleError):
    """A run or a checkpoint is missing or cannot be used, or what is to be saved is not finite."""


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
            raise self.unfit(f"holds no {name}")
        return tensors

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return int(self.metadata["step"])

    def unfit(self, fault: str) -> CheckpointError:
        """An error that says what is wrong with the checkpoint: "holds no …"."""
        return CheckpointError(f"{self.path} {fault}{way_out(self.path)}")


def save_checkpoint(run: Path, step: int, sections: dict[str, dict[str, Tensor]], metadata: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-NNNNNNNN.safetensors`, and deletes all but the `KEPT` newest checkpoints.

    A checkpoint of a later step is one that could not be used when the run was resumed: ".damaged" is added to its
    name.

    Args:
        run: The run directory.
        step: The number of steps taken.
        sections: The tensors, by section and name.
        metadata: Any JSON object.

    Raises:
        CheckpointError: A tensor is not finite, and nothing was written.
        CannotWrite: See `write_atomic`.
    """
    saved = {section: {n: t.detach().cpu().contiguous() for n, t in ts.items()} for section, ts in sections.items()}
    path = run / "checkpoints" / f"step-{step:08d}.safetensors"
    for section, tensors in saved.items():
        if fault := not_finite(section, tensors):
            others = [other.name for other in checkpoints(run)]
            earlier = f"the last good checkpoint is {others[-1]}" if others else "there is no earlier checkpoint"
            raise CheckpointError(f"{path} is not written: {fault}; {earlier}; try a lower --lr")
    checksums = {section: _checksum(tensors) for section, tensors in saved.items()}
    text = json.dumps({**metadata, "format": FORMAT, "checksums": checksums})
    content = safetensors.torch.save(
        {f"{section}.{name}": tensor for section, tensors in saved.items() for name, tensor in tensors.items()},
        metadata={"fastle": with_checksum(text)},
    )
    write_atomic(path, content)
    for old in [other for other in checkpoints(run) if _step_of(other) <= step][:-KEPT]:
        old.unlink()
    for other in checkpoints(run):
        if _step_of(other) > step:
            other.replace(other.with_name(f"{other.name}.damaged"))
    return path


def with_checksum(text: str) -> str:
    """A checkpoint's metadata: a JSON object with its crc32 before it."""
    return f"{zlib.crc32(text.encode()):08x} {text}"


def load_checkpoint(path: Path, sections: Collection[str] | None = None) -> Checkpoint:
    """Reads a checkpoint onto the CPU, and checks all that it reads.

    Args:
        path: The file.
        sections: The sections to read; all of them by default.

    Raises:
        CheckpointError: The file is truncated, damaged or not a checkpoint of fastle, or a tensor is not finite.
    """
    try:
        with open_regular(path) as file:
            header = read_header(file)
            metadata = _metadata(header, path)
            checksums = metadata.pop("checksums", None)
            tensors: dict[str, Tensor] = {}
            for section in _sections(header):
                if sections is not None and section not in sections:
                    continue
                names = [name for name in header.entries if name.startswith(f"{section}.")]
                read = {name[len(section) + 1 :]: read_tensor(file, header.entries[name]) for name in names}
                if checksums is not None and checksums[section] != _checksum(read):
                    raise ValueError(f"the checksum of {section} is wrong: its bytes are not those that were written")
                if fault := not_finite(section, read):
                    raise ValueError(fault)
                tensors |= {f"{section}.{name}": tensor for name, tensor in read.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}){way_out(path)}") from None
    return Checkpoint(path, tensors, metadata)


def good_sections(path: Path) -> list[str]:
    """The sections of a checkpoint that can be read; the file may be damaged."""
    try:
        with open_regular(path) as file:
            sections = _sections(read_header(file))
    except (OSError, ValueError):
        return []
    good = []
    for section in sections:
        try:
            load_checkpoint(path, (section,))
        except CheckpointError:
            continue
        good.append(section)
    return good


def newest_good_checkpoint(
    run: Path, check: Callable[[Checkpoint], None], sections: Collection[str] | None = None
) -> tuple[Checkpoint, str | None]:
    """The newest checkpoint of a run that can be used.

    Args:
        run: The run directory.
        check: Raises CheckpointError for a checkpoint that cannot be used.
        sections: See `load_checkpoint`.

    Returns:
        The checkpoint, and a line to show if there are newer ones that cannot be used.

    Raises:
        CheckpointError: There is no checkpoint, or none that can be used.
    """
    latest_checkpoint(run)
    faults: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            checkpoint = load_checkpoint(path, sections)
            check(checkpoint)
        except CheckpointError as error:
            faults.append(str(error).removesuffix(way_out(path)))
            continue
        return checkpoint, f"{'; '.join(faults)}: {path.name} is used instead" if faults else None
    raise CheckpointError("; ".join(faults) + way_out(path))


def check_sections(checkpoint: Checkpoint, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Checks that a checkpoint holds the tensors that a model and its optimizer need.

    Args:
        checkpoint: With the sections that are asked for.
        wanted: Tensors of the right shapes and types, by section and name. They may be on the meta device.

    Raises:
        CheckpointError: A tensor is missing, has another shape or type, or does not belong there.
    """
    held = checkpoint.tensors
    needed = {f"{section}.{name}": tensor for section, tensors in wanted.items() for name, tensor in tensors.items()}
    for name, tensor in needed.items():
        if name not in held:
            raise checkpoint.unfit(f"holds no {name}")
        if held[name].shape != tensor.shape:
            raise checkpoint.unfit(f"holds {name} of shape {tuple(held[name].shape)}, not {tuple(tensor.shape)}")
        if held[name].dtype != tensor.dtype:
            raise checkpoint.unfit(f"holds {name} as {held[name].dtype}, not {tensor.dtype}")
    if unknown := sorted(held.keys() - needed.keys()):
        raise checkpoint.unfit(f"holds {shown(unknown[0])}, of which this run knows nothing")


def check_identity(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Checks that a checkpoint was saved by a run of this configuration, if it names one.

    The length of the run may differ, and the folder of the images, which may have moved.

    Raises:
        CheckpointError: It was saved by another run.
    """
    if "config" not in checkpoint.metadata:
        return
    try:
        saved = RunConfig.from_dict(checkpoint.metadata["config"])
    except ConfigError as error:
        raise checkpoint.unfit(f"has a configuration that cannot be used ({error})") from None
    if differences := [text for text in saved.differences(config) if not text.startswith("data.root ")]:
        raise checkpoint.unfit(f"was saved by another run than config.json's ({', '.join(differences)})")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps."""
    files = (run / "checkpoints").glob("step-*.safetensors")
    return sorted((file for file in files if re.fullmatch(NAME, file.name)), key=_step_of)


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run, which may be damaged.

    Raises:
        CheckpointError: There is none.
    """
    paths = checkpoints(run)
    if not paths:
        raise CheckpointError(f"{run} holds no checkpoint: give a directory that fastle-train made with --run")
    return paths[-1]


def has_checkpoint(run: Path) -> bool:
    """Whether the run has a checkpoint to resume from."""
    return bool(checkpoints(run))


def read_run_config(run: Path) -> RunConfig:
    """The configuration of the run in a directory.

    Raises:
        CheckpointError: There is no config.json, or it is damaged.
        ConfigError: Another version of fastle wrote it, or a value is out of range.
    """
    path = run / "config.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not a run: it has no config.json; give a directory made with --run") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({one_line(error)}): `fastle check {run}` says what can be saved"
        ) from None
    if isinstance(values, dict) and values.get("format") == MODEL_FORMAT:
        raise CheckpointError(f"{run} is a saved model without its run: give a directory made with --run")
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_run_config(run: Path, config: Mapping[str, Any]) -> Path:
    """Writes config.json, with a marker by which the directory is known as a run's.

    Args:
        run: The run directory.
        config: As `RunConfig.to_dict` gives it.

    Raises:
        CannotWrite: See `write_atomic`.
    """
    path = run / "config.json"
    write_atomic(path, json.dumps({"format": RUN_FORMAT, **config}, indent=2).encode() + b"\n")
    return path


def is_run(run: Path) -> bool:
    """Whether a directory's config.json is a run's, also one of a version that did not mark it."""
    try:
        content = read_json(run / "config.json")
        if isinstance(content, dict) and content.get("format") == RUN_FORMAT:
            return True
        RunConfig.from_dict(content)
    except (OSError, ValueError, ConfigError):
        return False
    return True


def _metadata(header: Header, path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, without its format. "checksums" has one for each section, if there are any."""
    if header.metadata.keys() != {"fastle"}:
        raise ValueError("it is not a checkpoint of fastle")
    text = header.metadata["fastle"]
    # fastle 0.1 wrote the object alone
    has_checksum = not text.startswith("{")
    if has_checksum:
        text = text[9:]
        if with_checksum(text) != header.metadata["fastle"]:
            raise ValueError("the checksum of its metadata is wrong")
    values = parse_json(text.encode())
    if not isinstance(values, dict):
        raise ValueError("its metadata is no object")
    version = values.pop("format", 1)
    if version not in (1, FORMAT) or type(version) is not int:
        raise ValueError(f"its format is {shown(version)}, which this version of fastle does not know")
    if version == 1:
        if has_checksum or values.keys() - {"step", "train_images"}:
            raise ValueError("its metadata is damaged")
    else:
        checksums = values.get("checksums")
        if not has_checksum or not isinstance(checksums, dict) or checksums.keys() != set(_sections(header)):
            raise ValueError("it lacks checksums")
    for name in ("step", "train_images"):
        value = values.get(name, 0)
        if type(value) is not int or not 0 <= value <= 2**53:
            raise ValueError(f"its {name} is {shown(value)}, not a number of {name.split('_')[-1].rstrip('s')}s")
    if "step" not in values:
        raise ValueError("it does not say of which step it is")
    if re.fullmatch(NAME, path.name) and _step_of(path) != values["step"]:
        raise ValueError(f"it is of step {values['step']}: it was renamed")
    return values


def _sections(header: Header) -> list[str]:
    return sorted({name.partition(".")[0] for name in header.entries})


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """The crc32 of tensors on the CPU with their names, types and shapes."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def not_finite(section: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Which tensor of a section is not finite, or None. It allocates no copy, as `isfinite` would."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            smallest, largest = tensor.aminmax()
            if not (smallest.isfinite() and largest.isfinite()):
                return f"{section}.{name} is not finite"
    return None


def way_out(path: Path) -> str:
    return f": `fastle check {path.parents[1]}` says what can be saved, and fastle-train --overwrite starts anew"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".safetensors"))
