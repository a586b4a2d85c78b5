"""Reads files that may be damaged or made by somebody else (JSON, and tensors in the safetensors format), and writes.

Everything is checked before it is used: what kind of file it is, its size, how deep its JSON nests, and that the
header of a tensor file describes its bytes exactly. Tensors are read, not mapped: a mapped file that another process
truncates kills the process that looks at it. Tensors take as much memory as the file. JSON is limited to `LARGEST_JSON`
bytes, because it takes many times as much. A file is written to a temporary name, flushed and renamed, so that it is
whole or absent.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from .errors import FastleError

LARGEST_JSON = 2**18  # bytes of a file, a header or a line
DEEPEST_JSON = 16  # objects and lists within each other
# a string without an end is matched up to the end of the file: backtracking from there would take minutes
BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
NESTING = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# the names of the safetensors format, of the types that fastle writes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CannotWrite(FastleError):
    """A file cannot be written: the disk is full, or the folder is not writable."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        dtype, shape: Of the tensor.
        start, end: Of its bytes, counted from the beginning of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a tensor file: texts about it, and its tensors by name."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def parse_json(data: bytes | bytearray, largest: int = LARGEST_JSON) -> Any:
    """Parses JSON, more strictly than Python does.

    Raises:
        ValueError: It is no JSON, larger than `largest` bytes, nested deeper than `DEEPEST_JSON`, or holds NaN, an
            infinite number, or a name twice. The message is the fault alone, in one line.
    """
    if len(data) > largest:
        raise ValueError(f"{len(data):,} bytes of JSON, where {largest:,} are the most")
    depth = 0
    for match in BRACKETS.finditer(data):
        depth += NESTING.get(data[match.start()], 0)
        if depth > DEEPEST_JSON:
            raise ValueError(f"JSON nested deeper than {DEEPEST_JSON} levels")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)


def open_regular(path: str | Path, largest: int | None = None) -> FileIO:
    """Opens a file for reading, without a buffer.

    Args:
        path: The file.
        largest: Its greatest size, bytes; None for any.

    Raises:
        OSError: There is no such file, it cannot be opened or is larger, or it is a folder, a pipe, a socket or a
            device. Reading those might never end.
    """
    # O_NONBLOCK: opening a pipe would wait for a writer. os.open takes half the time of Path.open, which matters with
    # thousands of small images per second
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    if largest is not None and status.st_size > largest:
        file.close()
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, where {largest:,} are the most")
    return file


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError, or ValueError as `open_regular` and `parse_json` do."""
    with open_regular(path, LARGEST_JSON) as file:
        return parse_json(file.read())


def read_at(file: BinaryIO, start: int, length: int) -> bytearray:
    """Reads `length` bytes at `start` of a file from `open_regular`. Raises ValueError if the file ends before."""
    data = bytearray(length)
    read_into(file, start, memoryview(data))
    return data


def read_into(file: BinaryIO, start: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes at `start` of a file from `open_regular`; several threads may do so at once.

    Raises:
        ValueError: The file ends before.
    """
    while len(buffer):
        count = os.preadv(file.fileno(), [buffer], start)
        if not count:
            raise ValueError("it is truncated")
        buffer, start = buffer[count:], start + count


def read_header(file: BinaryIO) -> Header:
    """Reads the header of a tensor file.

    Raises:
        ValueError: It is damaged, or does not describe the bytes of the file exactly. The message is the fault alone.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError("it is truncated")
    length = int.from_bytes(read_at(file, 0, 8), "little")
    if length > min(LARGEST_JSON, size - 8):
        raise ValueError("its header is damaged, or it is truncated")
    values = parse_json(read_at(file, 8, length))
    if not isinstance(values, dict):
        raise ValueError("its header is damaged")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is damaged")
    entries = {name: _entry(value, 8 + length) for name, value in values.items()}
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            raise ValueError("its header is damaged: tensors overlap, or leave a gap")
        at = entry.end
    if at != size:
        raise ValueError(f"it has {size:,} bytes, and its header speaks of {at:,}")
    return Header(metadata, entries)


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """Reads a tensor. Raises ValueError if the file has become shorter."""
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = read_at(file, entry.start, entry.end - entry.start)
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)


def write_atomic(path: Path, content: bytes, way_out: str = "make room, then run the same command again") -> None:
    """Writes a file completely or not at all. Once this returns, the file survives a power cut.

    Args:
        path: The file, whose folder is made if need be.
        content: What it holds.
        way_out: What the error tells the user to do.

    Raises:
        CannotWrite: An earlier file of that name is left untouched.
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
        raise CannotWrite(
            f"cannot write {path}: {error.strerror or error}; {way_out} (what was saved before is intact)"
        ) from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _entry(value: Any, offset: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header is damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("its header names an unknown type of numbers")
    if not _is_counts(shape) or not _is_counts(offsets) or len(shape) > 8 or len(offsets) != 2:
        raise ValueError("its header is damaged")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("its header is damaged: a shape and a number of bytes disagree")
    return Entry(DTYPES[dtype], tuple(shape), offset + offsets[0], offset + offsets[1])


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond every number")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in one object of JSON")
    return values
