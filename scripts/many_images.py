"""Measures what an index of very many images in shards takes: memory, and the time to open, to shuffle and to resume.

    python scripts/many_images.py --images 100000000
    python scripts/many_images.py --images 100000000 --members 100000  # also how fast real shards are indexed

The images need not exist: the index of them is written as `fastle.data.shard_index` writes it, and opened, split,
shuffled and looked up as a training does. It takes 38 bytes of disk for each image, and 60 of memory while it is made.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from bench.common.memory import resident_memory
from fastle.data.order import batch_indices
from fastle.data.shard_index import HEADER, NO_SPLIT, load_index, make_splits, write_columns
from fastle.data.shard_members import shard_members
from fastle.lengths import steps_per_epoch

PER_SHARD = 10_000
CHUNK = 1_000_000
BATCH = 256


@contextmanager
def timed(what: str) -> Iterator[None]:
    began, worked = time.perf_counter(), time.process_time()
    yield
    # on a machine that others use too, elapsed time says little
    passed, worked = time.perf_counter() - began, time.process_time() - worked
    held = resident_memory() / 1e9
    print(f"{what:<44} {worked:8.2f} s of CPU, {passed:8.2f} s passed   {held:6.2f} GB resident", flush=True)


def write(path: Path, count: int) -> None:
    """Writes the index of images that are named by their numbers."""
    with path.open("wb") as file:
        file.seek(HEADER)
        for start in range(0, count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, count))
            file.write(np.char.add(np.char.zfill(numbers.astype("S9"), 9), b".jpg").tobytes())
        places = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
        values: dict[str, NDArray[Any]] = {
            "name_ends": np.arange(1, count + 1) * 13,
            "shard": (np.arange(count) // PER_SHARD).astype(np.int32),
            "start": np.arange(count) % PER_SHARD * 10_240 + 512,
            "size": np.full(count, 9_000, np.int32),
            "split": make_splits(np.full(count, NO_SPLIT, np.uint8), places, "made"),
        }
        write_columns(file, count * 13, values, {"fingerprint": "made", "names": "made", "sizes": "made"})


def measure_index(folder: Path, count: int) -> None:
    path = folder / "index"
    with timed("written, with its splits"):
        write(path, count)
    print(f"{'on disk':<44} {path.stat().st_size / 1e9:8.2f} GB")
    shards = [f"{number:06}.tar" for number in range(-(-count // PER_SHARD))]
    with timed("opened and checked"):
        index = load_index(path.open("rb", buffering=0), shards, [""] * len(shards), "made")
    if isinstance(index, str):
        raise RuntimeError(index)
    with timed("training split found"):
        files = index.of_split("train")
    order = {"batch_size": BATCH, "seed": 0, "rank": 0, "world_size": 1}
    epoch = steps_per_epoch(len(files), BATCH)
    with timed("shuffled, and the first batch of an epoch"):
        batch_indices(len(files), step=0, **order)
    with timed("resumed in the middle of the third"):
        picked = batch_indices(len(files), step=2 * epoch + epoch // 2, **order).tolist()
    with timed(f"names and places of {BATCH} images"):
        looked_up = [(files[i].name, files[i].stamp()) for i in picked]
    print(f"such as {looked_up[0][0]}")


def measure_shards(folder: Path, count: int) -> None:
    data = bytes(500)
    with tarfile.open(folder / "a.tar", "w") as tar, zipfile.ZipFile(folder / "a.zip", "w") as zipped:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:09}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            zipped.writestr(member.name, data)
    for name in ("a.tar", "a.zip"):
        with timed(f"{count:,} members of {name} listed"):
            shard_members(str(folder / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="of the index (default: %(default)s)")
    parser.add_argument("--members", type=int, help="of a real tar and a real zip")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if flags.members is not None:
            measure_shards(Path(folder), flags.members)
        measure_index(Path(folder), flags.images)


if __name__ == "__main__":
    main()
