"""The file of a packed cache: its format, its checksums, and batches that are read from it.

The file is in the safetensors format, so that other tools can open it:

    images      uint8 or uint16 (N, H, W, C)
    checksums   int64 (blocks,): the crc32 of every `BLOCK` images
    skipped     uint8: JSON, the faults of the files that were left out
    metadata    identifies the source files, and how they were decoded

It is read, not mapped: a file that somebody truncates is an error, where a mapped one would kill the process.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastle.errors import DataError
from fastle.files import Entry, one_line, parse_json, read_at, read_header, read_into, read_tensor

from .bits import unit
from .decode import default_threads
from .loading import Loading

BLOCK = 256  # images per checksum


class ImagesOnDisk:
    """Images of a cache file, which is read batch by batch. Batches are channels-last.

    Args:
        path: For messages.
        file: The cache file, open for as long as this lives. Deleting it meanwhile does no harm.
        entry: Where the images lie, uint8 or uint16 (N, H, W, C).
    """

    def __init__(self, path: Path, file: BinaryIO, entry: Entry) -> None:
        self._path, self._file, self._entry = path, file, entry

    def __len__(self) -> int:
        return self._entry.shape[0]

    def batch(self, indices: Sequence[int]) -> Tensor:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"there is no image {index} among {len(self)}")
        rows = torch.empty((len(indices), *self._entry.shape[1:]), dtype=self._entry.dtype)
        size, buffer = _bytes_of_image(self._entry), rows.numpy().reshape(-1).view(np.uint8).data
        try:
            for place, index in enumerate(indices):
                part = buffer[place * size : (place + 1) * size]
                read_into(self._file, self._entry.start + int(index) * size, part)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._path} cannot be read any more ({one_line(error)}): run the same command again, which builds "
                "it anew, or use --cache none"
            ) from None
        return unit(rows.permute(0, 3, 1, 2))


def read_layout(file: BinaryIO) -> tuple[Entry, list[int], list[str]]:
    """Where the images of a cache file lie, the checksums of its blocks, and the faults of the files left out.

    Raises:
        ValueError: The file is damaged. The images themselves are not looked at.
    """
    header = read_header(file)
    if header.entries.keys() != {"images", "checksums", "skipped"}:
        raise ValueError("it does not hold what a cache holds")
    images, checksums, skipped = (header.entries[name] for name in ("images", "checksums", "skipped"))
    if images.dtype not in (torch.uint8, torch.uint16) or len(images.shape) != 4:
        raise ValueError("its images are of another type or shape")
    if checksums.dtype != torch.int64 or checksums.shape != (-(-images.shape[0] // BLOCK),):
        raise ValueError("its checksums are of another type or shape")
    listed = read_at(file, skipped.start, skipped.end - skipped.start)
    # a folder may hold any number of files that cannot be used
    record = parse_json(listed, largest=len(listed))
    if not isinstance(record, dict) or record.keys() != {"faults", "crc32"} or not isinstance(record["faults"], list):
        raise ValueError("the list of skipped files is damaged")
    if record["crc32"] != zlib.crc32(json.dumps(record["faults"]).encode()):
        raise ValueError("the list of skipped files is damaged")
    return images, read_tensor(file, checksums).tolist(), record["faults"]


def check_blocks(
    file: BinaryIO, entry: Entry, checksums: Sequence[int], loading: Loading, kept: Tensor | None = None
) -> str | None:
    """Compares every block of images with its checksum, and copies the images to `kept`, if that is given.

    Returns:
        The first block that is damaged, in words, or None.
    """
    starts = range(0, entry.shape[0], BLOCK)
    size = _bytes_of_image(entry)

    def check(start: int) -> bool:
        count = min(BLOCK, entry.shape[0] - start)
        # straight to where they are kept, so that the copy is checked, too
        if kept is not None and not kept.is_cuda:
            block = kept[start : start + count].numpy().reshape(-1).view(np.uint8)
        else:
            block = np.empty(count * size, np.uint8)
        try:
            read_into(file, entry.start + start * size, block.data)
        except (OSError, ValueError):
            return False
        if kept is not None and kept.is_cuda:
            images = torch.from_numpy(block).view(entry.dtype).view(count, *entry.shape[1:])
            kept[start : start + count].copy_(images)
        return zlib.crc32(block.data) == checksums[start // BLOCK]

    with ThreadPoolExecutor(default_threads(), thread_name_prefix="cache") as pool:
        checked = loading.track(pool.map(check, starts), "reading the cache", len(starts))
        for start, intact in zip(starts, checked, strict=True):
            if not intact:
                return f"block {start // BLOCK}"
    return None


def _bytes_of_image(entry: Entry) -> int:
    return math.prod(entry.shape[1:]) * entry.dtype.itemsize


class Checksums:
    """The crc32 of every `block` bytes of a stream."""

    def __init__(self, block: int) -> None:
        self.total = 0
        self._block = block
        self._done: list[int] = []
        self._open = 0

    def add(self, data: memoryview) -> None:
        """Adds the next bytes of the stream."""
        while len(data):
            part = data[: self._block - self.total % self._block]
            self._open = zlib.crc32(part, self._open)
            self.total += len(part)
            if self.total % self._block == 0:
                self._done.append(self._open)
                self._open = 0
            data = data[len(part) :]

    def blocks(self) -> list[int]:
        """The checksums so far; the last one may cover fewer bytes."""
        return [*self._done, self._open] if self.total % self._block else list(self._done)
