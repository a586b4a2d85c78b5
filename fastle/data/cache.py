"""The packed cache: a split is decoded once into one file, which later runs read instead of decoding again.

One process at a time writes it, to a temporary name, flushes and renames it. Opening it checks every block. See
`cache_file` for its format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fastle.config import Size, sides_of
from fastle.errors import DataError
from fastle.files import one_line, open_regular, read_header
from fastle.machine import format_bytes, free_memory
from fastle.options import pair_text

from .bits import dtype_of, unit
from .cache_file import BLOCK, Checksums, ImagesOnDisk, check_blocks, read_layout
from .decode import BadFiles, ImageFile
from .images import ArrayImages, EncodedImages, Images
from .loading import Loading
from .shards import ShardFiles

HEADER = 4096  # bytes, padded, because the header is written after the images that follow it
# version of the decoding rules; version 1 ignored EXIF orientation
VERSION = "2"

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """Identifies a cache file: everything that its pixels depend on, except the contents of the source files.

    Attributes:
        name: The beginning of the file's name, for people: dataset, split and size.
        root: The folder of the images.
        size, channels, resize, upscale, bits: See `TorchvisionDecoder`.
        pixels: "cpu" (all CPU decoders give the same pixels) or "gpu".
    """

    name: str
    root: str
    size: Size
    channels: int
    resize: bool
    upscale: bool = False
    bits: int = 8
    pixels: Literal["cpu", "gpu"]

    def path(self) -> Path:
        """The path of the cache file."""
        fields: list[object] = [self.root, self.size, self.channels, self.resize, self.pixels]
        # omit default values, so that the path stays that of earlier versions and the old file is replaced
        fields += ["upscale"] if self.upscale else []
        fields += [f"{self.bits} bits"] if self.bits != 8 else []
        digest = hashlib.blake2b(json.dumps(fields).encode(), digest_size=6).hexdigest()
        return cache_folder() / f"{self.name}-{digest}.safetensors"

    def bytes(self, count: int) -> int:
        """The size of `count` decoded images."""
        return count * self.channels * math.prod(sides_of(self.size)) * self.bits // 8

    def metadata(self, fingerprint: str) -> dict[str, str]:
        """The metadata of the cache file of source files with this fingerprint."""
        size = pair_text(self.size)
        resized = f"shorter side resized to {size}" if isinstance(self.size, int) else f"resized to cover {size}"
        rule = f"{resized}, centre cut out" if self.resize else f"centre {size} cut out"
        return {
            "fastle_cache": VERSION,
            "fingerprint": fingerprint,
            # a folder may have a name that is no text
            "root": os.fsencode(self.root).decode("utf-8", "backslashreplace"),
            "crop": rule,
            "decoder": self.pixels,
        }


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastle, or ~/.cache/fastle."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastle"


def open_cached(images: EncodedImages, key: CacheKey, loading: Loading) -> tuple[Images, list[str]]:
    """Opens a split from its cache, which is built first if need be.

    Returns:
        The images, and the faults of the files that were left out. If the cache is "auto" and the disk has no room, the
        images are returned as they came, to be decoded again in every epoch.

    Raises:
        DataError: There is no room, or the cache cannot be written. The message says what to do.
    """
    path, count = key.path(), len(images)
    place = _choose_place(loading, key.bytes(count), path)
    if place is None:
        return images, []
    fingerprint = _fingerprint(images.files)

    def read() -> _Contents | str:
        return _read(path, key, fingerprint, count, place, loading)

    # without the lock: a file is complete or absent, and several ranks can read a large one at the same time
    seen, contents = _stamp(path), read()
    reused = isinstance(contents, _Contents)
    if isinstance(contents, str):
        with locked(path, loading):
            if _stamp(path) != seen:
                # the process that held the lock has built it
                contents = read()
                reused = isinstance(contents, _Contents)
            if isinstance(contents, str):
                if path.exists():
                    loading.say(f"cache: {path} is {contents}: building it again")
                _build(path, images, key, fingerprint, loading)
                contents = read()
        if isinstance(contents, str):
            raise DataError(f"{path} is {contents} right after it was written: the disk is failing; use --cache none")
    how = "reused" if reused else "built"
    where = {"device": "on the GPU", "host": "in memory", "disk": "read from disk"}[place]
    images_held = contents.images
    size = format_bytes(key.bytes(len(images_held))) + ("" if key.bits == 8 else f" in {key.bits} bits")
    loading.say(f"cache: {place}, {size} {where}, {path} ({how})")
    return images_held, contents.skipped


class CachedImages:
    """Images held in one array, uint8 or uint16 (N, H, W, C), on the GPU or in memory. Batches are channels-last."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        if self._images.is_cuda:
            # torch indexes no uint16 on a GPU
            plain = self._images.view(torch.int16) if self._images.dtype == torch.uint16 else self._images
            rows = ArrayImages(plain).batch(indices).view(self._images.dtype)
        else:
            # NumPy, because torch takes ten times as long when the caller is not the main thread, like the feed's
            rows = torch.from_numpy(self._images.numpy().take(indices, axis=0))
        return unit(rows.permute(0, 3, 1, 2))


@dataclass(frozen=True, slots=True)
class _Contents:
    """The contents of a cache file: its images, and the faults of the files left out."""

    images: CachedImages | ImagesOnDisk
    skipped: list[str]


def _choose_place(loading: Loading, size: int, path: Path) -> Place | None:
    """Where to keep `size` bytes of decoded images; None if they are not kept."""
    choice = loading.cache
    if choice == "none":
        return None
    if choice == "device" and loading.device.type != "cuda":
        raise DataError(f"--cache device needs a CUDA GPU, not a {loading.device.type}: use host or disk")
    if choice != "auto":
        return choice
    folder = first_existing(path.parent)
    if fault := why_read_only(path.parent):
        loading.say(
            f"cache: none: {path.parent} cannot be written to ({fault}), so that every epoch decodes the images again; "
            "set XDG_CACHE_HOME to a folder that can be written to"
        )
        return None
    # beside a new file, as much space again must stay free
    if not path.exists() and 2 * size > (free := shutil.disk_usage(folder).free):
        loading.say(
            f"cache: none: {format_bytes(size)} of decoded images would fill {folder}, where {format_bytes(free)} are "
            "free, so that every epoch decodes them again; set XDG_CACHE_HOME to a larger disk"
        )
        return None
    if loading.device.type == "cuda" and 3 * size <= free_memory(loading.device):
        return "device"
    return "host" if 2 * size * loading.processes <= free_memory(torch.device("cpu")) else "disk"


def first_existing(folder: Path) -> Path:
    """A folder, or what exists of the path that leads to it."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def why_read_only(folder: Path) -> str | None:
    """Why no file can be made in a folder, which may not exist yet; None if it can."""
    if not first_existing(folder).is_dir():
        return os.strerror(errno.ENOTDIR)
    try:
        # permissions would not show that a disk is mounted read-only, and they do not bind root
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _fingerprint(files: Sequence[ImageFile]) -> str:
    """A digest that changes when a file is added, removed, renamed or written to."""
    if isinstance(files, ShardFiles):
        return files.fingerprint()
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            stamp = file.stamp()
        except OSError:
            stamp = "missing"
        digest.update(f"{file.name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def locked(path: Path, loading: Loading) -> Iterator[None]:
    """Holds the lock of a file in the cache folder while other processes wait. If this one dies, it is released."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            loading.say(f"cache: waiting for another process that builds {path}")
            lock.acquire()
    except OSError as error:
        raise _cannot_write(path.parent, error) from None
    try:
        yield
    finally:
        lock.release()


def _stamp(path: Path) -> tuple[int, int] | None:
    """A stamp that differs once another file has taken its place; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _why_stale(stored: dict[str, str], metadata: dict[str, str]) -> str | None:
    """Why a cache file with the metadata `stored` cannot be used for images with this metadata, or None if it can."""
    if stored.get("fastle_cache") != VERSION:
        return "of another version of fastle"
    if stored.get("fingerprint") != metadata["fingerprint"]:
        return "out of date: some images have changed since"
    return None if stored == metadata else "damaged"


def _read(path: Path, key: CacheKey, fingerprint: str, count: int, place: Place, loading: Loading) -> _Contents | str:
    """The contents of the cache file of `count` images, with every block checked, or what is wrong with it."""
    try:
        # it stays open while images are read from it, even if another process replaces it
        file = open_regular(path)
        if stale := _why_stale(read_header(file).metadata, key.metadata(fingerprint)):
            return stale
        entry, checksums, faults = read_layout(file)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"damaged ({one_line(error)})"
    held = entry.shape[0]
    if (
        entry.dtype != dtype_of(key.bits)
        or entry.shape[1:] != (*sides_of(key.size), key.channels)
        or held + len(faults) != count
    ):
        return f"damaged (it holds {held} images of {'x'.join(map(str, entry.shape[1:]))}, {entry.dtype})"
    kept = None
    if place != "disk":
        kept = torch.empty(entry.shape, dtype=entry.dtype, device=loading.device if place == "device" else None)
    bad = check_blocks(file, entry, checksums, loading, kept)
    if bad:
        return f"damaged ({bad})"
    return _Contents(ImagesOnDisk(path, file, entry) if kept is None else CachedImages(kept), faults)


def check_cache(path: Path, loading: Loading) -> tuple[int, str | None]:
    """Checks a cache file from end to end, without the images that it was made of.

    Returns:
        The number of its images, and what is wrong with it, or None.
    """
    try:
        with open_regular(path) as file:
            entry, checksums, _ = read_layout(file)
            return entry.shape[0], check_blocks(file, entry, checksums, loading)
    except (OSError, ValueError) as error:
        return 0, one_line(error)


def _build(path: Path, images: EncodedImages, key: CacheKey, fingerprint: str, loading: Loading) -> None:
    """Decodes every image and writes the cache file."""
    needed = key.bytes(len(images)) + HEADER
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # the stale file goes first, to make room for the new one
        path.unlink(missing_ok=True)
        with partial.open("wb") as file:
            _write(file, images, key, fingerprint, loading)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            room = f"the cache takes {format_bytes(needed)}, and {format_bytes(free)} are free"
            raise DataError(
                f"{path.parent}: {room}: make room, set XDG_CACHE_HOME to a larger disk, or use --cache none"
            ) from None
        raise _cannot_write(path, error) from None
    finally:
        partial.unlink(missing_ok=True)


def _write(file: BinaryIO, images: EncodedImages, key: CacheKey, fingerprint: str, loading: Loading) -> None:
    file.seek(HEADER)
    sums, faults = Checksums(key.bytes(BLOCK)), []
    starts = range(0, len(images), BLOCK)
    for start in loading.track(starts, "building the cache", len(starts)):
        batch, bad = _decode(images, range(start, min(start + BLOCK, len(images))))
        faults += bad
        if not len(batch):
            continue
        rows = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().data.cast("B")
        sums.add(rows)
        file.write(rows)
    count = sums.total // key.bytes(1)
    checksums = torch.tensor(sums.blocks(), dtype=torch.int64).numpy().tobytes()
    skipped = json.dumps({"faults": faults, "crc32": zlib.crc32(json.dumps(faults).encode())}).encode()
    file.write(checksums + skipped)
    ends = [0, sums.total, sums.total + len(checksums), sums.total + len(checksums) + len(skipped)]
    header = {
        "__metadata__": key.metadata(fingerprint),
        "images": _entry(f"U{key.bits}", (count, *sides_of(key.size), key.channels), ends[0:2]),
        "checksums": _entry("I64", (len(checksums) // 8,), ends[1:3]),
        "skipped": _entry("U8", (len(skipped),), ends[2:4]),
    }
    text = json.dumps(header).encode()
    file.seek(0)
    file.write((HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8))


def _entry(dtype: str, shape: tuple[int, ...], offsets: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _decode(images: EncodedImages, positions: range) -> tuple[Tensor, list[str]]:
    """Decodes the images at these positions: those that can be decoded, and the faults of the others."""
    try:
        return images.decoded(positions), []
    except BadFiles as bad:
        good = [position for within, position in enumerate(positions) if within not in bad.faults]
        return images.decoded(good) if good else torch.empty(0), list(bad.faults.values())


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written to {path}: {error.strerror or error}; set XDG_CACHE_HOME to "
        "another folder, or use --cache none"
    )
