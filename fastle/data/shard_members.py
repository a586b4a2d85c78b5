"""What a shard holds: the images of a tar, a zip or a parquet file, where they lie, and the labels of WebDataset."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, cast

from fastle.errors import DataError
from fastle.files import one_line, open_regular
from fastle.folders import EXTENSIONS, UNSUPPORTED

from .header import download_fault
from .parquet import open_parquet
from .shards import DEFLATED, ROW_BITS, STORED, read_member

# the first bytes of compressed files that are named .tar
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LONGEST_CLASS = 200  # bytes of a label

Member = tuple[str, int, int]  # name, start, size


def shard_members(path: str) -> tuple[list[Member], int]:
    """(name, start, size) of each image of a shard, sorted by name, and the number of its other files."""
    try:
        if path.lower().endswith(".parquet"):
            return _rows(path), 0
        read = _zipped if path.lower().endswith(".zip") else _tarred
        members = list(read(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    images = sorted(member for member in members if _is_image(member[0]))
    return images, len(members) - len(images)


def member_classes(path: str) -> dict[str, str]:
    """The classes that a tar or a zip gives its images as WebDataset does: KEY.cls beside KEY.jpg.

    Returns:
        The text of each such entry, by its key; see `key_of`.

    Raises:
        DataError: The shard is damaged, or an entry is no line of text.
    """
    classes = {}
    try:
        for name, start, size in (_zipped if path.lower().endswith(".zip") else _tarred)(path):
            key = key_of(name)
            if name[len(key) :].lower() != ".cls":
                continue
            text = read_member(path, start, size).decode("utf-8", "replace").strip() if size <= LONGEST_CLASS else ""
            if not text.isprintable() or not text:
                raise DataError(f"{path}, {name} names no class: it must hold a number or a name, in one line")
            classes[key] = text
    except (OSError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    return classes


def key_of(name: str) -> str:
    """The key by which WebDataset groups the entries of a sample: the name up to the first dot behind its folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return not hidden and name.lower().endswith(EXTENSIONS + UNSUPPORTED)


def _tarred(path: str) -> Iterator[Member]:
    with open_regular(path) as file:
        head = file.read(512)
        kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
        if kind is not None:
            raise DataError(
                f"{path} is compressed as a whole by {kind}, so that no image can be read without all before it: "
                "unpack it to a .tar"
            )
        last = "its beginning"
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile keeps every member in a list that its type stubs omit; clear it to save memory
                    cast(Any, tar).members.clear()
                    last = member.name
                    if member.issparse():
                        raise DataError(f"{path}, {last} is stored sparse: pack it again without --sparse")
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                offset = tar.offset
        except (tarfile.TarError, EOFError, ValueError) as error:
            fault = download_fault(head) or f"is damaged behind {last} ({one_line(error)})"
            raise DataError(f"{path} {fault}: copy it again") from None
        # tarfile takes any invalid header for the end of the archive
        file.seek(offset)
        if file.read(512) != bytes(512):
            raise DataError(f"{path} is damaged or cut short behind {last}: copy it again")


def _zipped(path: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as zipped:
            for member in zipped.infolist():
                if member.is_dir():
                    continue
                if _is_image(member.filename) and (
                    member.flag_bits & 1 or member.compress_type not in (STORED, DEFLATED)
                ):
                    how = "encrypted" if member.flag_bits & 1 else "compressed otherwise than by deflate"
                    raise DataError(f"{path}, {member.filename} is {how}: pack it again, with zip -0")
                yield member.filename, member.header_offset, member.compress_size
    except (zipfile.BadZipFile, ValueError) as error:
        with open_regular(path) as file:
            fault = download_fault(file.read(256))
        raise DataError(f"{path} {fault or f'is damaged or no zip ({one_line(error)})'}: copy it again") from None


def _rows(path: str) -> list[Member]:
    with open_parquet(path) as parquet:
        counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return [
        (f"row group {group}, row {row}", group << ROW_BITS | row, 0)
        for group, count in enumerate(counts)
        for row in range(count)
    ]
