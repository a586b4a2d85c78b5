"""The packed cache: what is in it, when it is used again, and that nothing spoils it unnoticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastle.config import DataConfig
from fastle.data import Images, Loading, open_images
from fastle.data.cache import cache_folder
from fastle.errors import DataError
from tests.data import pictures
from tests.data.caches import MANY, SIDE, SIZE, config, opened, pixels, write_splits
from tests.data.pictures import encoded, picture

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return write_splits(tmp_path / "few", 20)


def everything(images: Images) -> Tensor:
    return images.batch(range(len(images)))


def files() -> list[Path]:
    """What lies in the cache, locks apart."""
    folder = cache_folder()
    found = folder.rglob("*") if folder.exists() else iter(())
    return sorted(path for path in found if path.is_file() and path.suffix != ".lock")


def the_file() -> Path:
    (path,) = files()
    assert path.suffix != ".partial"
    return path


def identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def refusal(act: Callable[[], object]) -> str:
    """The one line of an error that a user can mend."""
    with pytest.raises(DataError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache" / "fastle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastle"


def test_any_tool_opens_it(many: Path) -> None:
    expected = pixels(many)
    opened(many)
    with safe_open(the_file(), framework="pt") as file:
        assert {"images", "checksums"} <= set(file.keys())
        images, checksums = file.get_tensor("images"), file.get_tensor("checksums")
        metadata = file.metadata()
    assert images.dtype == torch.uint8 and torch.equal(images.permute(0, 3, 1, 2), expected)
    assert checksums.dtype == torch.int64
    assert checksums.tolist() == [zlib.crc32(block.numpy().tobytes()) for block in images.split(256)]
    assert {"fingerprint", "decoder"} <= set(metadata)


@pytest.mark.parametrize("cache", ["disk", "host", "auto"])
def test_a_second_opening_reuses_it_whatever_decodes(cache: str, many: Path) -> None:
    expected = pixels(many)
    images, said = opened(many, cache)
    assert torch.equal(everything(images), expected)
    kind = "host" if cache == "auto" else cache
    assert re.search(rf"cache: {kind}\b.*\d MB", said) and str(cache_folder()) in said and "reused" not in said
    before = identity(the_file())
    # nothing has to be decoded any more, so it does not matter who would
    for again, decoder in (("disk", "torchvision"), ("host", "auto"), (cache, "auto")):
        images, said = opened(many, again, decoder)
        assert "reused" in said and f"cache: {'host' if again == 'auto' else again}" in said
        assert torch.equal(everything(images), expected)
    assert identity(the_file()) == before


@pytest.mark.parametrize("cache", ["disk", "host"])
def test_bad_files_are_left_out_of_every_block(cache: str, tmp_path: Path) -> None:
    """By their headers, by decoding those in doubt, and while the cache is built."""
    root = write_splits(tmp_path / "photographs", MANY)
    paths, bad = sorted((root / "train").iterdir()), [3, 255, 256, 300, 400, 500, 599]
    expected = pixels(root)[[i for i in range(MANY) if i not in bad]]
    for position in bad:
        paths[position].write_bytes(pictures.damaged_png(picture(position, 29, 36)))
    paths[400].write_bytes(b"<html>the network share is gone</html>")
    paths[500].write_bytes(pictures.half(encoded(picture(500, 29, 36), "PNG")))
    for how in ("built", "reused"):
        images, said = opened(root, cache, bad_images="skip")
        assert torch.equal(everything(images), expected) and f"({how})" in said
        assert re.search(r"\b7\b", said), said
    with pytest.raises(DataError) as error:
        opened(root, cache)
    assert all(paths[position].name in str(error.value) for position in bad)


def test_without_a_cache_the_check_leaves_them_out_wherever_they_are(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "photographs", MANY)
    paths, bad = sorted((root / "train").iterdir()), [3, 400, 500]
    expected = pixels(root)[[i for i in range(MANY) if i not in bad]]
    for position in bad:
        paths[position].write_bytes(b"<html>the network share is gone</html>")
    # in doubt until it is decoded
    paths[500].write_bytes(pictures.half(encoded(picture(500, 29, 36), "PNG")))
    images, said = opened(root, "none", bad_images="skip")
    assert torch.equal(everything(images), expected) and re.search(r"\b3\b", said)
    with pytest.raises(DataError) as error:
        opened(root, "none")
    assert all(paths[position].name in str(error.value) for position in bad)


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_header_that_ends_behind_what_the_check_reads_is_no_fault(cache: str, tmp_path: Path) -> None:
    """Photographs with colour profiles and thumbnails of their own come with a hundred kilobytes before their size."""
    root = write_splits(tmp_path / "photographs", 5)
    data = encoded(picture(9, 29, 36), "JPEG", quality=95)
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)
    (root / "train" / "long.jpg").write_bytes(data[:2] + 2 * comment + data[2:])
    images, _ = opened(root, cache)
    assert len(images) == 6 and torch.equal(everything(images), pixels(root))


def test_the_decoder_is_a_part_of_a_cache_but_not_of_its_name(few: Path) -> None:
    pictures.dali_or_skip()
    opened(few, decoder="dali")
    before = identity(the_file())
    assert "reused" in opened(few, decoder="torchvision")[1]
    assert identity(the_file()) == before


def test_splits_and_sizes_have_files_of_their_own(few: Path) -> None:
    for _ in range(2):
        for split, size in (("train", SIZE), ("valid", SIZE), ("train", SIDE)):
            images, _ = opened(few, split=split, size=size)
            assert len(images) == (20 if split == "train" else 5) and images.batch([0]).shape[-1] == size
    assert len(files()) == 3
    assert all("reused" in opened(few, split=split)[1] for split in ("train", "valid"))


def test_no_cache_leaves_no_file(few: Path) -> None:
    opened(few, "none")
    assert files() == []


def test_progress_is_told(few: Path) -> None:
    told: list[tuple[str, float | None, int]] = []

    def track(items: Any, description: str, total: float | None) -> Iterator[Any]:
        seen = list(items)
        told.append((description, total, len(seen)))
        return iter(seen)

    loading = Loading(decoder="torchvision", cache="disk", track=track, say=lambda text: None)
    open_images(config(few), "train", loading)
    assert told and all(description for description, _, _ in told)


# what happens to a source, and whether fewer or more images are there afterwards
def rewrite(folder: Path) -> None:
    (folder / "0003.png").write_bytes(encoded(picture(77, 24, 24), "PNG"))


def add(folder: Path) -> None:
    (folder / "0003b.png").write_bytes(encoded(picture(78, 24, 24), "PNG"))


def touch(folder: Path) -> None:
    # as a copy or a download would, with the same bytes
    status = (folder / "0003.png").stat()
    os.utime(folder / "0003.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def rename(folder: Path) -> None:
    (folder / "0003.png").rename(folder / "0019b.png")


def swap(folder: Path) -> None:
    # both have the size and the time that they had, under each other's name
    (folder / "0003.png").rename(folder / "swap")
    (folder / "0004.png").rename(folder / "0003.png")
    (folder / "swap").rename(folder / "0004.png")


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": rewrite,
    "added": add,
    "removed": lambda folder: (folder / "0003.png").unlink(),
    "touched": touch,
    "renamed": rename,
    "swapped": swap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_is_said_and_built_again(change: str, few: Path) -> None:
    opened(few)
    CHANGES[change](few / "train")
    images, said = opened(few)
    assert torch.equal(everything(images), pixels(few))
    assert "changed" in said and "reused" not in said
    assert "reused" in opened(few)[1]
    the_file()


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def layout(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of the header with its length, and where each tensor lies in the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    places = {name: tuple(8 + length + offset for offset in entry["data_offsets"]) for name, entry in header.items()}
    return 8 + length, places


@pytest.mark.parametrize("cache", ["disk", "host"])
def test_a_flipped_byte_of_an_image_is_found_and_mended(cache: str, many: Path) -> None:
    expected = pixels(many)
    opened(many)
    path, image = the_file(), SIZE * SIZE * 3
    kept, start = path.read_bytes(), layout(path)[1]["images"][0]
    blocks = []
    for at in (0, 255 * image, 256 * image, 400 * image + 5, 512 * image, MANY * image - 1):
        flip(path, start + at, bit=1 << at % 8)
        images, said = opened(many, cache)
        assert torch.equal(everything(images), expected)
        found = re.search(r"damaged \(block (\d+)\)", said)
        assert found and "reused" not in said
        blocks.append(int(found[1]))
        assert "reused" in opened(many, cache)[1]
        assert the_file().read_bytes() == kept
    # each block is named by its number, from 0 or from 1
    assert [block - blocks[0] for block in blocks] == [0, 0, 1, 1, 2, 2] and blocks[0] in (0, 1)


def test_a_flipped_byte_of_a_checksum_is_found_and_mended(many: Path) -> None:
    expected = pixels(many)
    opened(many)
    path = the_file()
    start, stop = layout(path)[1]["checksums"]
    assert stop - start == 8 * 3
    for at in (start, start + 8 + 3, stop - 1):
        flip(path, at)
        images, said = opened(many)
        assert "damaged" in said and "reused" not in said
        assert torch.equal(everything(images), expected)


def test_a_flipped_byte_of_the_header_is_found_and_mended(few: Path) -> None:
    """Among them the fingerprint and the list of what was left out; who asks gets the right images, and is told."""
    (few / "train" / "bad.jpg").touch()

    def open_it() -> tuple[Images, str]:
        return opened(few, bad_images="skip")

    open_it()
    path = the_file()
    expected, kept, length = everything(open_it()[0]), path.read_bytes(), layout(path)[0]
    assert len(expected) == 20
    unnoticed = []
    # all of what it says, and a little of what it is filled up with
    used = len(kept[:length].rstrip())
    for at in (*range(0, used, 4), *range(used, length, 600), length - 1):
        flip(path, at)
        images, said = open_it()
        assert torch.equal(everything(images), expected), kept[:length]
        if "reused" in said or path.read_bytes() != kept:
            unnoticed.append(kept[max(at - 20, 0) : at + 20])
            path.write_bytes(kept)
    assert unnoticed == []


def test_a_file_that_is_cut_short_is_built_again(few: Path) -> None:
    expected = pixels(few)
    opened(few)
    path = the_file()
    kept, length = path.read_bytes(), layout(path)[0]
    for size in (0, 5, 8, length - 1, length, len(kept) // 2, len(kept) - 1):
        path.write_bytes(kept[:size])
        for cache in ("disk", "host"):
            images, said = opened(few, cache)
            assert ("reused" in said) == (cache == "host")
            assert torch.equal(everything(images), expected)
        assert path.read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"half a cache", b"\xff" * 5000], ids=["empty", "text", "garbage"])
def test_a_partial_file_is_in_nobodys_way(content: bytes, few: Path) -> None:
    opened(few)
    path = the_file()
    path.unlink()
    # with the ending or without it: one of the two is the name that a build takes
    for partial in (path.with_suffix(".partial"), path.with_name(path.name + ".partial")):
        partial.write_bytes(content)
    images, said = opened(few)
    assert torch.equal(everything(images), pixels(few)) and "reused" not in said
    assert path in files() and len(files()) == 2


def test_a_cache_that_is_open_outlives_its_file(few: Path) -> None:
    """Another run builds it again, or a user tidies up, while this one trains."""
    expected = pixels(few)
    images, _ = opened(few, "disk")
    touch(few / "train")
    opened(few, "disk")
    assert torch.equal(everything(images), expected)
    shutil.rmtree(cache_folder())
    assert torch.equal(everything(images), expected)


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Every file system says that so much is left of it."""
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        values = list(real(path))
        # block size, fragment size, blocks, free, available
        values[:5] = [1, 1, max(values[2], free), free, free]
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", statvfs)
    total = max(free, 10**12)
    usage = type(shutil.disk_usage("/"))(total, total - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def assert_full_disk(message: str, folder: Path) -> None:
    assert str(folder) in message
    assert "XDG_CACHE_HOME" in message and "--cache none" in message
    # what it takes and what there is
    assert len(re.findall(r"\d[\d.,]* ?(?:bytes|B|kB|KB|MB|GB|KiB|MiB|GiB)\b", message)) >= 2, message


@pytest.mark.parametrize("cache", ["disk", "host"])
def test_a_disk_that_is_full_before(cache: str, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 100_000)
    assert_full_disk(refusal(lambda: opened(many, cache)), cache_folder())
    assert files() == []


def test_auto_does_without_where_there_is_no_room(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 100_000)
    images, said = opened(many, "auto")
    assert "cache: none" in said
    assert torch.equal(everything(images), pixels(many))
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
    # lazily: a cache may still be mapped
    subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.parametrize("lies", [False, True], ids=["before", "while-writing"])
def test_a_small_disk(lies: bool, small_disk: Path, many: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    opened(few)
    small = the_file()
    with monkeypatch.context() as patch:
        if lies:
            # quotas, and other processes that write meanwhile
            free_bytes(patch, 10**12)
        assert_full_disk(refusal(lambda: opened(many)), cache_folder())
    assert files() == [small]
    assert "reused" in opened(few)[1]


def test_a_cache_folder_that_cannot_be_written(few: Path, cache_home: Path) -> None:
    cache_home.write_text("a file is in the way")
    for cache in ("disk", "host"):
        message = refusal(lambda cache=cache: opened(few, cache))  # type: ignore[misc]
        assert str(cache_folder()) in message
        assert "XDG_CACHE_HOME" in message or "--cache none" in message
    assert everything(opened(few, "none")[0]).shape[0] == 20


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_without_permission(few: Path, cache_home: Path) -> None:
    cache_home.mkdir(mode=0o500)
    assert str(cache_folder()) in refusal(lambda: opened(few))


def test_a_gpu_that_is_not_there(few: Path) -> None:
    assert re.search(r"device|GPU|cuda", refusal(lambda: opened(few, "device")))
    assert files() == []


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_shapes_are_in_memory_already(cache: str) -> None:
    shapes = DataConfig(dataset="shapes", root=None, size=16, channels=1)
    expected = everything(open_images(shapes, "valid", Loading(cache="auto", say=lambda text: None)))
    host = open_images(shapes, "valid", Loading(cache="host", say=lambda text: None))
    assert torch.equal(everything(host), expected)
    with pytest.raises(DataError, match="memory") as error:
        open_images(shapes, "valid", Loading(cache=cache, say=lambda text: None))  # type: ignore[arg-type]
    assert f"--cache {cache}" in str(error.value) and "\n" not in str(error.value)
    assert files() == []
