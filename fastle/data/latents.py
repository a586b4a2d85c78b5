"""Latents in a file, written batch by batch, so that their number is not limited by memory.

| ending | what the file holds | the names of the images |
|---|---|---|
| .safetensors | one tensor, "latents", (N, *shape), fp32 | FILE.names.json, a list of N strings |
| .npy | the same as a NumPy array | FILE.names.json |
| .parquet | a row for each image: "name", and "latent" as a list of fp32; its schema has the shape | "name" |
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from fastle.errors import DataError
from fastle.extras import missing_extra

ENDINGS = (".safetensors", ".npy", ".parquet")
Write = Callable[[Tensor], object]


def names_file(path: Path) -> Path | None:
    """Where the names of the images go, if not into the file of latents itself."""
    return None if path.suffix.lower() == ".parquet" else path.with_name(f"{path.name}.names.json")


def check_latents_file(path: Path, names: Sequence[str]) -> None:
    """Raises DataError if the kind of file cannot be written here, or cannot hold the names."""
    if path.suffix.lower() != ".parquet":
        return
    _pyarrow(path)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name!r} is no text in UTF-8, which {path} needs: write .npy or .safetensors") from None


@contextmanager
def writing_latents(path: Path, names: Sequence[str], shape: Sequence[int]) -> Iterator[Write]:
    """Writes a file of latents, completely or not at all.

    Args:
        path: The file; its ending is one of `ENDINGS`. Folders above it are made.
        names: Of the images, in the order of the latents.
        shape: Of one latent.

    Yields:
        A function that appends a batch, (B, *shape). In all, there are as many latents as names.

    Raises:
        DataError: The disk is full, or the folder is not writable. An earlier file of that name is left untouched.
    """
    begin = {".safetensors": _safetensors, ".npy": _npy, ".parquet": _parquet}[path.suffix.lower()]
    beside = names_file(path)
    temporary = [target.with_name(f".{target.name}.tmp") for target in (path, beside) if target is not None]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary[0].open("wb") as file:
            with begin(file, names, (len(names), *shape)) as write:
                yield write
            file.flush()
            os.fsync(file.fileno())
        if beside is not None:
            temporary[1].write_text(json.dumps(list(names)), encoding="ascii")
            temporary[1].replace(beside)
        temporary[0].replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; make room or give another name") from None
    finally:
        for left in temporary:
            left.unlink(missing_ok=True)


@contextmanager
def _safetensors(file: BinaryIO, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[Write]:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "latents": entry}).encode()
    # the format asks for tensors that begin at a multiple of eight bytes
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    yield lambda batch: file.write(_bytes(batch))


@contextmanager
def _npy(file: BinaryIO, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[Write]:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    yield lambda batch: file.write(_bytes(batch))


@contextmanager
def _parquet(file: BinaryIO, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[Write]:
    pa, parquet = _pyarrow(Path(file.name))
    width = math.prod(shape[1:])
    schema = pa.schema(
        [("name", pa.string()), ("latent", pa.list_(pa.float32(), width))],
        metadata={"latent_shape": json.dumps(shape[1:])},
    )
    written = 0

    def write(batch: Tensor) -> None:
        nonlocal written
        values = pa.array(_array(batch).reshape(-1))
        latents = pa.FixedSizeListArray.from_arrays(values, width)
        of_batch = pa.array(names[written : written + len(batch)], pa.string())
        writer.write_table(pa.Table.from_arrays([of_batch, latents], schema=schema))
        written += len(batch)

    with parquet.ParquetWriter(file, schema) as writer:
        yield write


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"to write {path}") or error from None
    return pa, parquet


def _array(batch: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(batch.detach().float().cpu().numpy(), "<f4")


def _bytes(batch: Tensor) -> bytes:
    return _array(batch).tobytes()
