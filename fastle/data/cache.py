"""The packed cache: a split decoded once into one file, which later runs read instead of decoding again.

The file is in the safetensors format, so that anything can open it:

    images      uint8 (N, H, W, C)
    checksums   int64 (blocks,): crc32 of every `BLOCK` images
    skipped     uint8: JSON, a list of what is wrong with the files that are left out
    metadata    which files these images are of, and how they were decoded

It is written to another name, flushed and renamed, by one process at a time. Reading it checks every block.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastle.errors import DataError
from fastle.machine import format_bytes

from .decode import BadFiles, ImageFile, default_threads
from .images import ArrayImages, EncodedImages, Images
from .loading import Loading

BLOCK = 256  # images
HEADER = 4096  # bytes, padded: it is written last, in front of the images
VERSION = "1"

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What a cache file is of; everything but the files' own bytes.

    Attributes:
        name: of the file, for people: dataset, split and size.
        root: of the images.
        size, channels, resize: see `TorchvisionDecoder`.
        pixels: "cpu", the same for every CPU decoder, or "gpu".
    """

    name: str
    root: str
    size: int
    channels: int
    resize: bool
    pixels: Literal["cpu", "gpu"]

    def path(self) -> Path:
        """Where the file lies."""
        told = json.dumps([self.root, self.size, self.channels, self.resize, self.pixels])
        digest = hashlib.blake2b(told.encode(), digest_size=6).hexdigest()
        return cache_folder() / f"{self.name}-{digest}.safetensors"

    def bytes(self, count: int) -> int:
        """Of so many images."""
        return count * self.channels * self.size**2

    def metadata(self, fingerprint: str) -> dict[str, str]:
        """What the file says of itself."""
        rule = f"shorter side resized to {self.size}, centre cut out" if self.resize else f"centre {self.size} cut out"
        return {
            "fastle_cache": VERSION,
            "fingerprint": fingerprint,
            "root": self.root,
            "crop": rule,
            "decoder": self.pixels,
        }


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastle, or ~/.cache/fastle."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastle"


def packed(images: EncodedImages, packing: Packing, loading: Loading) -> tuple[Images, list[str]]:
    """The images of a split out of its cache, which is built if need be, and what is wrong with those left out.

    Where "auto" finds no room on disk the images are given back as they are, to be decoded again in every epoch.

    Raises:
        DataError: there is no room, or the cache cannot be written; the message says what to do.
    """
    path, count = packing.path(), len(images)
    place = _pick(loading, packing.bytes(count), path)
    if place is None:
        return images, []
    fingerprint = _fingerprint(images.files)
    with _only_one(path, loading):
        fault = _outdated(path, packing.metadata(fingerprint))
        found = None if fault else _read(path, place, loading)
        if isinstance(found, str) or (fault and path.exists()):
            loading.say(f"cache: {path} is {found or fault}: building it again")
        reused = isinstance(found, _Contents)
        if not isinstance(found, _Contents):
            _build(path, images, packing, fingerprint, loading)
            found = _read(path, place, loading)
        if isinstance(found, str):
            raise DataError(f"{path} is {found} right after it was written: the disk is failing; use --cache none")
    how = "reused" if reused else "built"
    where = {"device": "on the GPU", "host": "in memory", "disk": "mapped from disk"}[place]
    size = format_bytes(packing.bytes(len(found.images)))
    loading.say(f"cache: {place}, {size} {where}, {path} ({how})")
    return Packed(found.images), found.skipped


class Packed:
    """Images held in one array: uint8 (N, H, W, C). Batches are channels-last."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        if self._images.is_cuda:
            rows = ArrayImages(self._images).batch(indices)
        else:
            # not by torch: its threads take ten times as long when the caller is not the main thread, as the feed's is
            rows = torch.from_numpy(self._images.numpy().take(indices, axis=0))
        return rows.permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a whole cache file holds."""

    images: Tensor
    skipped: list[str]


def _pick(loading: Loading, size: int, path: Path) -> Place | None:
    """Where decoded images of so many bytes go; None is nowhere."""
    choice = loading.cache
    if choice == "none":
        return None
    if choice == "device" and loading.device.type != "cuda":
        raise DataError(f"--cache device needs a CUDA GPU, not a {loading.device.type}: use host or disk")
    if choice != "auto":
        return choice
    # the file itself is written with room to spare, unless it is there
    folder = _first_existing(path.parent)
    if not path.exists() and 2 * size > (free := shutil.disk_usage(folder).free):
        loading.say(
            f"cache: none: {format_bytes(size)} of decoded images would fill {folder}, where {format_bytes(free)} are "
            "free, so that every epoch decodes them again; set XDG_CACHE_HOME to a larger disk"
        )
        return None
    if loading.device.type == "cuda" and 3 * size <= torch.cuda.mem_get_info(loading.device)[0]:
        return "device"
    return "host" if 2 * size * loading.processes <= _free_memory() else "disk"


def _first_existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _free_memory() -> int:
    """Bytes of the host's memory that could be had."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # elsewhere than on Linux: half of what there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _fingerprint(files: Sequence[ImageFile]) -> str:
    """Changes when a file is added, taken away, renamed or written to."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            stamp = file.stamp()
        except OSError:
            stamp = "gone"
        digest.update(f"{file.name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def _only_one(path: Path, loading: Loading) -> Iterator[None]:
    """While the others wait; a process that dies lets go."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            loading.say(f"cache: waiting for another process, which is at {path}")
            lock.acquire()
    except OSError as error:
        raise _cannot_write(path.parent, error) from None
    try:
        yield
    finally:
        lock.release()


def _outdated(path: Path, metadata: dict[str, str]) -> str | None:
    """Why a cache is not that of these images, or None."""
    if not path.exists():
        return "not there"
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (SafetensorError, OSError):
        return "damaged"
    if found.get("fastle_cache") != VERSION:
        return "of another version of fastle"
    if found.get("fingerprint") != metadata["fingerprint"]:
        return "of other images: some have changed since"
    return None if found == metadata else "damaged"


def _read(path: Path, place: Place, loading: Loading) -> _Contents | str:
    """The contents of a cache, every block checked, or what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            # memory-mapped
            images, checksums, skipped = (file.get_tensor(name) for name in ("images", "checksums", "skipped"))
        told = json.loads(bytes(skipped.numpy()))
        if told["crc32"] != zlib.crc32(json.dumps(told["faults"]).encode()):
            return "damaged (the list of skipped files)"
        faults: list[str] = told["faults"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return "damaged"
    kept = images
    if place != "disk":
        kept = torch.empty_like(images, device=loading.device if place == "device" else None)
    starts = range(0, len(images), BLOCK)
    if len(checksums) != len(starts):
        return "damaged"

    def check(start: int) -> bool:
        block = images[start : start + BLOCK]
        if place == "host":
            # what is checked is what is kept
            block = kept[start : start + BLOCK].copy_(block)
        elif place == "device":
            kept[start : start + BLOCK].copy_(block)
        return zlib.crc32(block.numpy().data) == int(checksums[start // BLOCK])

    with ThreadPoolExecutor(default_threads(), thread_name_prefix="cache") as pool:
        for start, whole in zip(
            starts, loading.track(pool.map(check, starts), "reading the cache", len(starts)), strict=True
        ):
            if not whole:
                return f"damaged (block {start // BLOCK})"
    return _Contents(kept, faults)


def _build(path: Path, images: EncodedImages, packing: Packing, fingerprint: str, loading: Loading) -> None:
    """Decodes every image and writes the file."""
    needed = packing.bytes(len(images)) + HEADER
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # an outdated one would take the room of its successor
        path.unlink(missing_ok=True)
        with partial.open("wb") as file:
            _write(file, images, packing, fingerprint, loading)
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


def _write(file: BinaryIO, images: EncodedImages, packing: Packing, fingerprint: str, loading: Loading) -> None:
    file.seek(HEADER)
    sums, faults = _Checksums(packing.bytes(BLOCK)), []
    starts = range(0, len(images), BLOCK)
    for start in loading.track(starts, "building the cache", len(starts)):
        batch, bad = _decode(images, range(start, min(start + BLOCK, len(images))))
        faults += bad
        if not len(batch):
            continue
        rows = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().data.cast("B")
        sums.add(rows)
        file.write(rows)
    count = sums.total // packing.bytes(1)
    checksums = torch.tensor(sums.blocks(), dtype=torch.int64).numpy().tobytes()
    skipped = json.dumps({"faults": faults, "crc32": zlib.crc32(json.dumps(faults).encode())}).encode()
    file.write(checksums + skipped)
    ends = [0, sums.total, sums.total + len(checksums), sums.total + len(checksums) + len(skipped)]
    header = {
        "__metadata__": packing.metadata(fingerprint),
        "images": _entry("U8", (count, packing.size, packing.size, packing.channels), ends[0:2]),
        "checksums": _entry("I64", (len(checksums) // 8,), ends[1:3]),
        "skipped": _entry("U8", (len(skipped),), ends[2:4]),
    }
    text = json.dumps(header).encode()
    file.seek(0)
    file.write((HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8))


def _entry(dtype: str, shape: tuple[int, ...], offsets: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _decode(images: EncodedImages, positions: range) -> tuple[Tensor, list[str]]:
    """The images that can be decoded, and the faults of the others."""
    try:
        return images.batch(positions), []
    except BadFiles as bad:
        good = [position for within, position in enumerate(positions) if within not in bad.faults]
        return images.batch(good) if good else torch.empty(0), list(bad.faults.values())


class _Checksums:
    """crc32 of every so many bytes of a stream."""

    def __init__(self, block: int) -> None:
        self.total = 0
        self._block = block
        self._done: list[int] = []
        self._open = 0

    def add(self, data: memoryview) -> None:
        """The bytes that come next."""
        while len(data):
            part = data[: self._block - self.total % self._block]
            self._open = zlib.crc32(part, self._open)
            self.total += len(part)
            if self.total % self._block == 0:
                self._done.append(self._open)
                self._open = 0
            data = data[len(part) :]

    def blocks(self) -> list[int]:
        """Those so far, the last one perhaps of fewer bytes."""
        return [*self._done, self._open] if self.total % self._block else list(self._done)


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written to {path}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that can, "
        "or use --cache none"
    )
