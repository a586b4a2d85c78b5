"""What the commands that write share: checks, before anything is computed, that a file or folder can be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastle.config import ConfigError
from fastle.data.cache import first_existing, why_read_only


def check_output(output: Path, endings: Sequence[str] = (), inputs: Sequence[Path] = (), flag: str = "-o") -> None:
    """Raises ConfigError if a file cannot go to a path.

    Args:
        output: The path.
        endings: Those that its name may have, in lower case, with their dot; none for any.
        inputs: Files that it must not overwrite.
        flag: The flag that gave the path.
    """
    if endings and output.suffix.lower() not in endings:
        raise ConfigError(f"{flag} {output}: give it a name that ends in {' or '.join(endings)}")
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"{flag} {output} is one of the images, which it would overwrite: give another name")
    if output.is_dir():
        raise ConfigError(f"{flag} {output} is a folder: give the name of a file")
    _check_parent(output, flag)


def check_output_folder(output: Path, flag: str) -> None:
    """Raises ConfigError unless a folder can be made at a path, where there is none yet or an empty one."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{flag} {output} is no folder: give another name")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{flag} {output} is not empty: give a new folder, or empty it")
    _check_parent(output, flag)


def _check_parent(output: Path, flag: str) -> None:
    folder = first_existing(output.absolute().parent)
    if fault := why_read_only(folder):
        raise ConfigError(f"{flag} {output}: no file can be written to {folder} ({fault}): give another name")
