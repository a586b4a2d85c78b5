"""The index of shards: which images they hold, where, and of which split. It is built once and kept beside the caches.

The file is in the safetensors format:

    names       uint8: the names of the images, one behind the other
    name_ends   int64 (N,): where each ends
    shard, start, size, split    (N,), see `ShardIndex`
    metadata    fingerprint of the shards' paths, sizes and times; digests of names and sizes; crc32 of the columns

Within a shard, images are sorted by their names, and shards by theirs, so that a zip of a folder has its order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from fastle.errors import DataError, FastleError
from fastle.files import one_line, open_regular, read_header, read_json, read_tensor, write_atomic
from fastle.folders import KINDS

from .cache import VERSION as CACHE_VERSION
from .cache import cache_folder, locked, why_read_only
from .loading import Loading
from .parquet import image_column, open_parquet
from .shard_members import shard_members
from .shards import SPLIT_CODES, ShardFiles, ShardIndex

VERSION = "1"
HEADER = 4096  # bytes, padded, because the header is written after the names that follow it
COLUMNS = {"name_ends": "int64", "shard": "int32", "start": "int64", "size": "int32", "split": "uint8"}
DTYPES = {"int64": "I64", "int32": "I32", "uint8": "U8"}
# how the first part of a path names a split: train/, and train-00000-of-00019.parquet
SPLIT_NAMES = re.compile(r"(train|valid|validation|val|test)(?:[-_.]\d.*)?")
NO_SPLIT = 255
SHARE = 20  # one image in so many is held out, as of a folder
LONGEST = 2**31 - 1

# those that this process has open: splits share them
_open_indexes: WeakValueDictionary[tuple[str, str], ShardIndex] = WeakValueDictionary()


def open_shards(root: Path, shards: Sequence[Path], loading: Loading) -> ShardIndex:
    """The index of shards, read from its file, which is built first if need be.

    Args:
        root: What the user gave: the shard, the folder that holds them or the pattern.
        shards: The shards.
        loading: Shows the progress.

    Raises:
        DataError: A shard is damaged or cannot be read in place, or there are no images or too few to split.
    """
    paths = [str(shard) for shard in shards]
    fingerprint = _fingerprint(paths)
    path = (
        cache_folder() / f"index-{hashlib.blake2b(os.fsencode(root.absolute()), digest_size=6).hexdigest()}.safetensors"
    )
    if (known := _open_indexes.get((str(path), fingerprint))) is not None:
        return known
    columns = [_column(path) for path in paths]
    fault = why_read_only(path.parent)
    try:
        index = fault or _stored_index(path, root, paths, columns, fingerprint, loading)
    except OSError as error:
        index = fault = one_line(error)
    if fault:
        index = _temporary_index(root, paths, columns, fingerprint, loading, fault)
    if isinstance(index, str):
        raise DataError(f"{path} is {index} right after it was written: the disk is failing; set XDG_CACHE_HOME")
    _open_indexes[str(path), fingerprint] = index
    return index


def _stored_index(
    path: Path, root: Path, paths: list[str], columns: list[str], fingerprint: str, loading: Loading
) -> ShardIndex | str:
    """The index in its file, built if need be, or what is wrong with it even then."""
    with locked(path, loading):
        index = _read(path, paths, columns, fingerprint)
        if not isinstance(index, str):
            return index
        if path.exists():
            loading.say(f"index: {path} is {index}: building it again")
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("w+b") as file:
                _build(file, root, paths, fingerprint, loading)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        loading.say(f"index: of {len(paths):,} shards, {path} (built)")
        return _read(path, paths, columns, fingerprint)


def known_faults(files: ShardFiles, rules: str, find: Callable[[], dict[int, str]]) -> dict[int, str]:
    """The bad images among those of shards. Each set is checked once, since millions of images take hours.

    Args:
        files: The images.
        rules: What else makes an image good or bad, such as the size asked for.
        find: Checks all images, see `find_faults`.
    """
    key = hashlib.blake2b(f"{CACHE_VERSION} {files.fingerprint()} {rules}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / f"checked-{key[:12]}.json"
    try:
        known = read_json(path)
        if isinstance(known, dict) and known.get("of") == key:
            return {int(position): fault for position, fault in known["faults"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        # missing or damaged: they are checked again
        pass
    faults = find()
    with suppress(FastleError, OSError):
        # an unwritable cache folder has been reported when the index was built
        write_atomic(path, json.dumps({"of": key, "faults": faults}).encode())
    return faults


def _temporary_index(
    root: Path, paths: list[str], columns: list[str], fingerprint: str, loading: Loading, fault: str
) -> ShardIndex | str:
    """An index in a temporary file, because none can be written to the cache folder."""
    loading.say(f"index: not kept, so that every start reads all shards: {cache_folder()} cannot be written ({fault})")
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the index holds it)
    _build(file, root, paths, fingerprint, loading)
    file.flush()
    return load_index(file, paths, columns, fingerprint)


def _fingerprint(paths: Sequence[str]) -> str:
    digest = hashlib.blake2b(VERSION.encode(), digest_size=16)
    for path in paths:
        status = os.stat(path)  # noqa: PTH116 (as of images: there may be very many)
        whole = os.path.abspath(path)  # noqa: PTH100 (as above)
        digest.update(os.fsencode(f"{whole}\0{status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()


def _column(path: str) -> str:
    if not path.lower().endswith(".parquet"):
        return ""
    with open_parquet(path) as parquet:
        return image_column(parquet, path)


def _read(path: Path, paths: list[str], columns: list[str], fingerprint: str) -> ShardIndex | str:
    """The index in a file, or why it cannot be used."""
    if not path.exists():
        return "missing"
    try:
        file = open_regular(path)
    except OSError as error:
        return f"damaged ({one_line(error)})"
    return load_index(file, paths, columns, fingerprint)


def load_index(file: BinaryIO, paths: list[str], columns: list[str], fingerprint: str) -> ShardIndex | str:
    """The index in an open file, which it keeps open, or why that cannot be used.

    Args:
        file: Opened without a buffer.
        paths, columns, fingerprint: What it must be of, see `ShardIndex`.
    """
    try:
        header = read_header(file)
        about = header.metadata
        if about.get("fastle_shards") != VERSION:
            return "of another version of fastle"
        if about.get("fingerprint") != fingerprint:
            return "out of date: some shards have changed since"
        entries = header.entries
        values = {name: read_tensor(file, entries[name]).numpy() for name in COLUMNS if name != "name_ends"}
        crc = 0
        for column in values.values():
            crc = zlib.crc32(column.data, crc)
        if about["crc32"] != str(crc):
            return "damaged (its checksum is another)"
        return ShardIndex(
            shards=paths, columns=columns, file=file, names=entries["names"], name_ends=entries["name_ends"],
            fingerprint=fingerprint, digests=(about["names"], about["sizes"]), **values,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        return f"damaged ({one_line(error)})"


@dataclass
class _Columns:
    """The columns of the index, with an entry for each image so far; splits are made of `code` and `place`."""

    name_ends: array[int] = field(default_factory=lambda: array("q"))
    shard: array[int] = field(default_factory=lambda: array("i"))
    start: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("i"))
    code: array[int] = field(default_factory=lambda: array("B"))
    place: array[int] = field(default_factory=lambda: array("Q"))


def _build(file: BinaryIO, root: Path, paths: list[str], fingerprint: str, loading: Loading) -> None:
    """Reads what the shards hold and writes the index."""
    images, names, sizes = _Columns(), hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    file.seek(HEADER)
    end = others = 0
    prefixes = shard_prefixes(paths, root)
    for number, path in enumerate(loading.track(paths, "indexing the shards", len(paths))):
        members, skipped = shard_members(path)
        others += skipped
        prefix = common_folder(members[0][0], members[-1][0]) if len(paths) == 1 and members else 0
        for member, start, size in members:
            written = os.fsencode(member)
            end += len(written)
            file.write(written)
            below = prefixes[number] + member[prefix:]
            code, rest = split_of(below)
            digest = hashlib.sha1(os.fsencode(rest)).digest()
            names.update(os.fsencode(below) + b"\0")
            images.name_ends.append(end)
            images.shard.append(number)
            images.start.append(start)
            images.size.append(min(size, LONGEST))
            images.code.append(code)
            images.place.append(int.from_bytes(digest[:8], "big"))
    if not images.shard:
        raise DataError(f"{root}: the shards hold no images ({KINDS}), but {others} other files: add images")
    split = make_splits(np.frombuffer(images.code, np.uint8), np.frombuffer(images.place, np.uint64), str(root))
    values: dict[str, NDArray[Any]] = {
        name: np.frombuffer(getattr(images, name), kind) for name, kind in COLUMNS.items() if name != "split"
    } | {"split": split}
    sizes.update(values["size"].data)
    write_columns(
        file, end, values, {"fingerprint": fingerprint, "names": names.hexdigest(), "sizes": sizes.hexdigest()}
    )


def write_columns(file: BinaryIO, end: int, values: dict[str, NDArray[Any]], about: dict[str, str]) -> None:
    """Writes the columns behind the names, and then the header in front of both."""
    crc, at = 0, end
    header: dict[str, Any] = {"names": {"dtype": "U8", "shape": (end,), "data_offsets": (0, end)}}
    for name, kind in COLUMNS.items():
        data = values[name].astype(kind, copy=False).data.cast("B")
        crc = zlib.crc32(data, crc) if name != "name_ends" else crc
        file.write(data)
        header[name] = {"dtype": DTYPES[kind], "shape": values[name].shape, "data_offsets": (at, at + len(data))}
        at += len(data)
    header["__metadata__"] = {"fastle_shards": VERSION, "crc32": str(crc), **about}
    file.seek(0)
    file.write((HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER - 8))


def shard_prefixes(paths: Sequence[str], root: Path) -> list[str]:
    """The prefix of the names of each shard's images: "" for a single shard, else the shard's path."""
    if len(paths) == 1:
        return [""]
    folder = root if root.is_dir() else Path(os.path.commonpath([os.path.dirname(path) for path in paths]))  # noqa: PTH120
    return [f"{Path(path).relative_to(folder).with_suffix('').as_posix()}/" for path in paths]


def common_folder(first: str, last: str) -> int:
    """The length of the folders that all names begin with, of which these are the first and the last in order."""
    return os.path.commonprefix([first, last]).rfind("/") + 1  # noqa: RUF071


def split_of(path: str) -> tuple[int, str]:
    """The split that a path names, as a code of `SPLIT_CODES` or `NO_SPLIT`, and the rest of the path."""
    first, _, rest = path.partition("/")
    match = SPLIT_NAMES.fullmatch(first) if rest else None
    if match is None:
        return NO_SPLIT, path
    return SPLIT_CODES[{"validation": "valid", "val": "valid"}.get(match[1], match[1])], rest


def make_splits(codes: NDArray[np.uint8], places: NDArray[np.uint64], root: str) -> NDArray[np.uint8]:
    """The splits of images, as `split_paths` makes those of a folder.

    Args:
        codes: (N,) the split that a path names, or `NO_SPLIT`.
        places: (N,) hashes of the paths: the images with the lowest are held out.
        root: For messages.

    Returns:
        (N,) of `SPLIT_CODES`, or `NO_SPLIT`.

    Raises:
        DataError: There are too few images.
    """
    train, valid, test = (SPLIT_CODES[name] for name in ("train", "valid", "test"))
    named = bool((codes == train).any() and (codes == test).any())
    if named and (codes == valid).any():
        return codes
    parts = (valid,) if named else (test, valid)
    split = codes.copy() if named else np.full(len(codes), train, np.uint8)
    rest = np.flatnonzero(split == train)
    if len(rest) <= len(parts):
        raise DataError(f"{root}: {len(rest)} images are too few for {len(parts) + 1} splits: add images")
    share = -(-len(rest) // SHARE)
    # sorting a twentieth is faster than sorting all
    least = np.argpartition(places[rest], share * len(parts) - 1)[: share * len(parts)]
    least = least[np.argsort(places[rest[least]], kind="stable")]
    for part, code in enumerate(parts):
        split[rest[least[part * share : (part + 1) * share]]] = code
    return split
