"""Images in shards, read in place: tar, zip and parquet files, whose members an index finds (see `shard_index`).

There may be a hundred million images. An index holds 16 bytes for each, and a split 4 more. The object for an image is
made on demand, and its name is read from the index's file then.
"""

from __future__ import annotations

import errno
import hashlib
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from fastle.files import Entry, one_line, open_regular, read_at

from .decode import MAX_BYTES
from .identity import Identity
from .parquet import read_row

LOCAL_HEADER = 30  # bytes of a zip's header of a member, before the name
STORED, DEFLATED = 0, 8  # methods of compression in a zip
ROW_BITS = 32  # of a place in a parquet file: the row within its row group
SPLIT_CODES = {"train": 0, "valid": 1, "test": 2}
Rows = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Where the images of shards lie, in the order of shards and names.

    Attributes:
        shards: The paths of the shards.
        columns: Of the parquet files among them, the columns of encoded images.
        shard: (N,) int32, which shard holds an image.
        start: (N,) int64, where it lies: the first byte of a tar's member or of a zip's header, or row group and row.
        size: (N,) int32, how many bytes it takes in the shard; 0 in a parquet file.
        split: (N,) uint8, of `SPLIT_CODES`; another number for images of no split.
        file: Open for as long as this lives, holds the names.
        names, name_ends: Where in `file` the names lie, one behind the other, and where each ends.
        fingerprint: Changes when a shard does.
        digests: Of the names and of the sizes of all images, for `Identity`.
    """

    shards: Sequence[str]
    columns: Sequence[str]
    shard: NDArray[np.int32]
    start: NDArray[np.int64]
    size: NDArray[np.int32]
    split: NDArray[np.uint8]
    file: BinaryIO
    names: Entry
    name_ends: Entry
    fingerprint: str
    digests: tuple[str, str]

    def name(self, row: int) -> str:
        """Shard and member."""
        return f"{self.shards[self.shard[row]]}, {self.member(row)}"

    def member(self, row: int) -> str:
        """The name of an image within its shard."""
        begin = 0 if row == 0 else self._end(row - 1)
        member = bytes(read_at(self.file, self.names.start + begin, self._end(row) - begin))
        return member.decode("utf-8", "surrogateescape")

    def read(self, row: int) -> bytes:
        """The encoded image. Raises OSError if it is not where the index says."""
        path, start, size = self.shards[self.shard[row]], int(self.start[row]), int(self.size[row])
        if size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, where {MAX_BYTES:,} are the most")
        try:
            if path.lower().endswith(".parquet"):
                return read_row(path, self.columns[self.shard[row]], start >> ROW_BITS, start & (1 << ROW_BITS) - 1)
            return read_member(path, start, size)
        except (ValueError, zlib.error) as error:
            raise OSError(errno.EIO, f"{one_line(error)}, copy the shard again") from None

    def of_split(self, split: str | None) -> ShardFiles:
        """The images of a split, or all."""
        kind = np.int32 if len(self.shard) < 2**31 else np.int64
        rows = np.arange(len(self.shard)) if split is None else np.flatnonzero(self.split == SPLIT_CODES[split])
        return ShardFiles(self, rows.astype(kind), split or "all")

    def _end(self, row: int) -> int:
        return int.from_bytes(read_at(self.file, self.name_ends.start + 8 * row, 8), "little")


class ShardFiles(Sequence["ShardFile"]):
    """Some images of an index, each an `ImageFile` that is made on demand.

    Args:
        index: The index.
        rows: (n,) which of its images, ascending.
        what: The split, for the identity.
    """

    def __init__(self, index: ShardIndex, rows: Rows, what: str) -> None:
        self._index, self.rows, self._what = index, rows, what

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> ShardFile: ...
    @overload
    def __getitem__(self, position: slice) -> ShardFiles: ...
    def __getitem__(self, position: int | slice) -> ShardFile | ShardFiles:
        if isinstance(position, slice):
            return ShardFiles(self._index, self.rows[position], self._what)
        return ShardFile(self._index, int(self.rows[position]))

    def __iter__(self) -> Iterator[ShardFile]:
        return (ShardFile(self._index, int(row)) for row in self.rows)

    def without(self, positions: Container[int]) -> ShardFiles:
        """The images except those at `positions`."""
        kept = np.fromiter((position not in positions for position in range(len(self))), bool, len(self))
        return ShardFiles(self._index, self.rows[kept], self._what)

    def fingerprint(self) -> str:
        """A digest that changes when a shard does, or with the images that are taken."""
        digest = hashlib.blake2b(f"{self._index.fingerprint} {self._what}".encode(), digest_size=16)
        digest.update(self.rows.tobytes())
        return digest.hexdigest()

    def identity(self) -> Identity:
        """What a run knows of these images. The names are those below the folder of the shards."""
        names, sizes = self._index.digests
        return Identity(len(self), hashlib.blake2b(f"{names} {self._what}".encode(), digest_size=16).hexdigest(), sizes)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One encoded image of a shard."""

    index: ShardIndex
    row: int

    @property
    def name(self) -> str:
        return self.index.name(self.row)

    def read(self) -> bytes:
        return self.index.read(self.row)

    def stamp(self) -> str:
        return f"{self.index.size[self.row]} {self.index.fingerprint}"


def read_member(path: str, start: int, size: int) -> bytes:
    """A member of a tar or a zip, whose places are those of `ShardIndex`.

    Raises:
        OSError, ValueError, zlib.error: It is not there or damaged.
    """
    if path.lower().endswith(".zip"):
        return _read_zipped(_open(path), start, size)
    return bytes(read_at(_open(path), start, size))


# a file evicted from the cache stays open while a reader uses it
@lru_cache(maxsize=256)
def _open(path: str) -> FileIO:
    return open_regular(Path(path))


def _read_zipped(file: BinaryIO, start: int, size: int) -> bytes:
    """A member of a zip: `size` bytes, stored or deflated, behind a header at `start`."""
    head = read_at(file, start, LOCAL_HEADER)
    if head[:4] != b"PK\x03\x04":
        raise ValueError("no member of the zip is there")
    flags, method, crc, name, extra = (
        int.from_bytes(head[i:j], "little") for i, j in ((6, 8), (8, 10), (14, 18), (26, 28), (28, 30))
    )
    packed = bytes(read_at(file, start + LOCAL_HEADER + name + extra, size))
    if method == DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflate.decompress(packed, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        if not inflate.eof:
            raise ValueError("it is truncated")
    else:
        data = packed
    # with bit 3, the checksum follows the member
    if not flags & 8 and zlib.crc32(data) != crc:
        raise ValueError("its checksum in the zip is another")
    return data
