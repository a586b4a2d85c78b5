"""The packed cache: what it holds, when it is reused, and that no damage, change or full disk goes unnoticed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastle.config import DataConfig
from fastle.data import cache as cache_module
from fastle.data import open_images
from fastle.data.cache import CacheKey, cache_folder
from fastle.data.open import cache_key
from fastle.errors import DataError
from tests.data import pictures
from tests.data.caches import LARGE, MANY, SIZE, everything, loading, opened, pixels, write_splits
from tests.data.pictures import encoded, picture

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return write_splits(tmp_path / "few", 20)


def files() -> list[Path]:
    """The files in the cache folder, except locks."""
    return sorted(path for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock")


def the_file() -> Path:
    (path,) = files()
    assert path.suffix != ".partial"
    return path


def identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def refusal(act: Callable[[], object]) -> str:
    """The one line of a DataError."""
    with pytest.raises(DataError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_caches_are_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache" / "fastle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "fastle"


def test_other_tools_can_open_a_cache(many: Path) -> None:
    opened(many)
    with safe_open(the_file(), framework="pt") as file:
        images, checksums = file.get_tensor("images"), file.get_tensor("checksums")
        metadata = file.metadata()
    assert images.dtype == torch.uint8 and torch.equal(images.permute(0, 3, 1, 2), pixels(many))
    assert checksums.dtype == torch.int64
    assert checksums.tolist() == [zlib.crc32(block.numpy().tobytes()) for block in images.split(256)]
    assert {"fingerprint", "decoder"} <= set(metadata)


@pytest.mark.parametrize("cache", ["disk", "host", "auto"])
def test_nothing_is_decoded_a_second_time(cache: str, many: Path) -> None:
    expected = pixels(many)
    assert torch.equal(everything(opened(many, "none")[0]), expected) and files() == []
    images, said = opened(many, cache)
    assert torch.equal(everything(images), expected)
    kind = "host" if cache == "auto" else cache
    assert re.search(rf"cache: {kind}\b.*\d MB", said) and str(cache_folder()) in said and "reused" not in said
    before = identity(the_file())
    # nothing is decoded, so it does not matter what would decode it
    for again, decoder in (("disk", "torchvision"), ("host", "auto")):
        images, said = opened(many, again, decoder)
        assert "reused" in said and f"cache: {again}" in said
        assert torch.equal(everything(images), expected)
    assert identity(the_file()) == before


@pytest.mark.parametrize("cache", ["disk", "host", "none"])
def test_bad_files_of_every_block_are_left_out(cache: str, tmp_path: Path) -> None:
    """By their headers, by decoding those in doubt, and while a cache is built."""
    root = write_splits(tmp_path / "photographs", MANY)
    # without a cache, damage in the middle of a file is found by its batch only
    damaged = [] if cache == "none" else [3, 255, 256, 300, 599]
    paths, bad = sorted((root / "train").iterdir()), sorted([*damaged, 4, 400, 500])
    expected = pixels(root)[[i for i in range(MANY) if i not in bad]]
    for position in damaged:
        paths[position].write_bytes(pictures.damaged_png(picture(position, 29, 36)))
    for position in (4, 400):
        paths[position].write_bytes(b"<html>the network share is gone</html>")
    paths[500].write_bytes(pictures.half(encoded(picture(500, 29, 36), "PNG")))
    for _ in range(2):
        images, said = opened(root, cache, bad_images="skip")
        assert torch.equal(everything(images), expected) and f"skipped {len(bad)} images" in said
    with pytest.raises(DataError) as error:
        opened(root, cache)
    assert all(paths[position].name in str(error.value) for position in bad)


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_header_longer_than_the_check_reads_is_no_fault(cache: str, tmp_path: Path) -> None:
    """Photographs with profiles and thumbnails may have a hundred kilobytes in front of their size."""
    root = write_splits(tmp_path / "photographs", 5)
    data = encoded(picture(9, 29, 36), "JPEG", quality=95)
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)
    (root / "train" / "long.jpg").write_bytes(data[:2] + 2 * comment + data[2:])
    images, _ = opened(root, cache)
    assert len(images) == 6 and torch.equal(everything(images), pixels(root))


def test_splits_and_sizes_have_their_own_files(few: Path) -> None:
    for again in (False, True):
        for split, size in (("train", SIZE), ("valid", SIZE), ("train", LARGE)):
            images, said = opened(few, split=split, size=size)
            assert len(images) == (20 if split == "train" else 5) and images.batch([0]).shape[-1] == size
            assert ("reused" in said) == again
    assert len(files()) == 3


def touch(folder: Path) -> None:
    # as a copy or a download would, with the same bytes
    status = (folder / "0003.png").stat()
    os.utime(folder / "0003.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def swap(folder: Path) -> None:
    # each gets the name of the other, with its own size and time
    (folder / "0003.png").rename(folder / "swap")
    (folder / "0004.png").rename(folder / "0003.png")
    (folder / "swap").rename(folder / "0004.png")


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda folder: (folder / "0003.png").write_bytes(encoded(picture(77, 24, 24), "PNG")),
    "added": lambda folder: (folder / "0003b.png").write_bytes(encoded(picture(78, 24, 24), "PNG")),
    "removed": lambda folder: (folder / "0003.png").unlink(),
    "touched": touch,
    "renamed": lambda folder: (folder / "0003.png").rename(folder / "0019b.png"),
    "swapped": swap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_cache_is_built_again(change: str, few: Path) -> None:
    opened(few)
    CHANGES[change](few / "train")
    images, said = opened(few)
    assert torch.equal(everything(images), pixels(few))
    assert "changed" in said and "reused" not in said
    assert "reused" in opened(few)[1]
    the_file()


def test_a_cache_made_by_other_rules_is_built_again(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 did not turn images as their EXIF orientation asks."""
    with monkeypatch.context() as before:
        before.setattr("fastle.data.cache.VERSION", "1")
        opened(few)
    assert "is of another version of fastle: building it again" in opened(few)[1]
    assert "reused" in opened(few)[1]


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def layout(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """The length of the header in bytes, and where each tensor starts and ends in the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    places = {name: tuple(8 + length + offset for offset in entry["data_offsets"]) for name, entry in header.items()}
    return 8 + length, places


@pytest.mark.parametrize("cache", ["disk", "host"])
def test_a_flipped_bit_of_an_image_or_a_checksum_is_noticed(cache: str, many: Path) -> None:
    expected = pixels(many)
    opened(many)
    path, image = the_file(), SIZE * SIZE * 3
    kept, places = path.read_bytes(), layout(path)[1]
    start = places["images"][0]
    # the first and the last byte of a block, and a byte of the second checksum
    blocks = {start: 0, start + 256 * image - 1: 0, start + 256 * image: 1, start + MANY * image - 1: 2}
    for at, block in (blocks | {places["checksums"][0] + 8 + 3: 1}).items():
        flip(path, at, bit=1 << at % 8)
        images, said = opened(many, cache)
        assert torch.equal(everything(images), expected)
        assert f"damaged (block {block})" in said and "reused" not in said
        assert the_file().read_bytes() == kept
    assert "reused" in opened(many, cache)[1]


def test_a_flipped_bit_of_the_header_is_noticed(few: Path) -> None:
    """The header includes the fingerprint; the list of the files left out comes after it."""
    (few / "train" / "bad.jpg").touch()
    expected = everything(opened(few, bad_images="skip")[0])
    path = the_file()
    kept, (length, places) = path.read_bytes(), layout(path)
    assert len(expected) == 20
    # all of its content, a little of its padding, and the list of skipped files
    used = len(kept[:length].rstrip())
    for at in (*range(0, used, 9), *range(used, length, 900), length - 1, *range(*places["skipped"], 25)):
        flip(path, at)
        images, said = opened(few, bad_images="skip")
        assert torch.equal(everything(images), expected), kept[max(at - 20, 0) : at + 20]
        assert "reused" not in said and path.read_bytes() == kept, kept[max(at - 20, 0) : at + 20]


def test_a_file_that_is_cut_short_is_built_again(few: Path) -> None:
    expected = pixels(few)
    opened(few)
    path = the_file()
    kept, length = path.read_bytes(), layout(path)[0]
    for size in (0, 5, 8, length - 1, length, len(kept) // 2, len(kept) - 1):
        path.write_bytes(kept[:size])
        images, said = opened(few)
        assert "reused" not in said
        assert torch.equal(everything(images), expected)
        assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((16, 20, 16, 3), "U8"), ((3, 16, 16, 20), "U8"), ((20, 16, 48), "U8"), ((20, 16, 16, 3), "I8"),
        ((5, 16, 16, 3), "F32"),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_describes_the_same_bytes_otherwise_is_noticed(
    shape: tuple[int, ...], dtype: str, few: Path
) -> None:
    expected = pixels(few)
    opened(few)
    path = the_file()
    kept = path.read_bytes()
    length = int.from_bytes(kept[:8], "little")
    header = json.loads(kept[8 : 8 + length])
    header["images"] |= {"shape": shape, "dtype": dtype}
    path.write_bytes(kept[:8] + json.dumps(header).encode().ljust(length) + kept[8 + length :])
    images, said = opened(few)
    assert torch.equal(everything(images), expected)
    assert "is damaged" in said and "reused" not in said and path.read_bytes() == kept


@pytest.mark.parametrize("cache", ["disk", "host"])
def test_a_cache_that_is_truncated_while_it_is_open(cache: str, few: Path) -> None:
    """A mapped one would end the process with SIGBUS."""
    expected = pixels(few)
    images, _ = opened(few, cache)
    os.truncate(the_file(), 5000)
    if cache == "host":
        assert torch.equal(everything(images), expected)
        return
    assert torch.equal(images.batch([0]), expected[:1])
    assert f"{the_file()} cannot be read any more (it is truncated)" in refusal(lambda: images.batch([0, 19]))
    assert "--cache none" in refusal(lambda: images.batch([19]))


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    root = write_splits(tmp_path / os.fsdecode(b"caf\xe9"), 20)
    expected = pixels(root)
    for again in (False, True):
        images, said = opened(root)
        assert torch.equal(everything(images), expected) and ("reused" in said) == again
    with safe_open(the_file(), framework="pt") as file:
        assert file.metadata()["root"] == f"{tmp_path}/caf\\xe9"


def test_an_open_cache_outlives_its_file(few: Path) -> None:
    """Another run may rebuild it, or a user delete it, while a run trains."""
    expected = pixels(few)
    images, _ = opened(few, "disk")
    touch(few / "train")
    opened(few, "disk")
    assert torch.equal(everything(images), expected)
    shutil.rmtree(cache_folder())
    assert torch.equal(everything(images), expected)


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Makes every disk report so many free bytes."""
    total = max(free, 10**12)
    usage = type(shutil.disk_usage("/"))(total, total - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def assert_full_disk(message: str, folder: Path) -> None:
    assert str(folder) in message and "XDG_CACHE_HOME" in message and "--cache none" in message
    # what the cache takes, and what is free
    assert len(re.findall(r"\d[\d.,]* ?(?:bytes|B|kB|KB|MB|GB|KiB|MiB|GiB)\b", message)) >= 2, message


def test_a_disk_that_is_full_before_the_build(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 100_000)
    assert_full_disk(refusal(lambda: opened(many, "host")), cache_folder())
    images, said = opened(many, "auto")
    assert "cache: none" in said and torch.equal(everything(images), pixels(many))
    assert files() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    home = tmp_path / "small"
    home.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(home)]
    if shutil.which("mount") is None:
        pytest.skip("cannot mount a small tmpfs: no mount")
    mount = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.decode().strip()}")
    yield home
    # lazily: a cache may still be open
    subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_disk_that_fills_up_during_the_build(
    small_disk: Path, many: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    opened(few)
    small = the_file()
    with monkeypatch.context() as patch:
        # a quota, or other processes that write as well
        free_bytes(patch, 10**12)
        assert_full_disk(refusal(lambda: opened(many)), cache_folder())
    assert files() == [small]
    assert "reused" in opened(few)[1]


def test_a_cache_folder_that_is_not_writable(few: Path, cache_home: Path) -> None:
    cache_home.write_text("a file is in the way")
    message = refusal(lambda: opened(few))
    assert str(cache_folder()) in message and "XDG_CACHE_HOME" in message and "--cache none" in message
    assert len(opened(few, "none")[0]) == 20


def test_a_gpu_that_is_not_there(few: Path) -> None:
    assert re.search(r"device|GPU|cuda", refusal(lambda: opened(few, "device")))
    assert files() == []


def test_shapes_are_held_in_memory() -> None:
    shapes = DataConfig(dataset="shapes", root=None, size=16, channels=1)
    host, auto = (everything(open_images(shapes, "valid", loading("auto", cache))) for cache in ("host", "auto"))
    assert torch.equal(host, auto)
    for cache in ("disk", "none"):
        assert f"--cache {cache}" in refusal(lambda cache=cache: open_images(shapes, "valid", loading("auto", cache)))  # type: ignore[misc]
    assert "--decoder dali" in refusal(lambda: open_images(shapes, "valid", loading("dali", "host")))
    assert files() == []


def test_a_cache_folder_that_cannot_be_written_is_as_a_full_one(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", read_only)
        images, said = opened(few, "auto")
        assert len(images) == 20 and files() == []
        assert f"cache: none: {cache_folder()} cannot be written to (Read-only file system)" in said
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images, said = opened(few, "auto")
    assert len(images) == 20 and "fastle cannot be written to (Not a directory)" in said
    # what was asked for by name is no choice of fastle's
    assert "the cache cannot be written to" in refusal(lambda: opened(few, "disk"))


def test_a_square_has_the_cache_of_before_and_another_size_its_own() -> None:
    def key(size: int | tuple[int, int]) -> CacheKey:
        return cache_key(DataConfig(dataset="folder", root="/photographs", size=size, channels=3), "train", gpu=False)

    assert key(64).path().name == key((64, 64)).path().name == "folder-train-64-59e7e7c71944.safetensors"
    assert key(64).metadata("f")["crop"] == "shorter side resized to 64, centre cut out"
    assert key((64, 96)).bytes(2) == 2 * 3 * 64 * 96
    assert len({key(size).path() for size in (64, 96, (64, 96), (96, 64))}) == 4


def test_a_whole_cache_is_read_without_the_lock(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(few)
    # ranks read at once, and not one after the other
    monkeypatch.setattr(cache_module, "FileLock", None)
    assert "reused" in opened(few)[1]
