"""Images in tar, zip and parquet files, read in place: those of a folder in the same order, or an error in one line."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastle.data.open
from fastle.data import Loading, open_training, open_tree
from fastle.data.cache import cache_folder
from fastle.data.images import EncodedImages
from fastle.data.order import batch_indices
from fastle.data.shard_index import NO_SPLIT, make_splits
from fastle.data.shards import ShardIndex
from fastle.errors import DataError, FastleError
from fastle.files import Entry
from fastle.folders import SPLITS, Split
from tests.data.caches import config, everything, opened
from tests.data.pictures import encoded, picture

pytestmark = pytest.mark.usefixtures("cache_home")
COUNT = 45


def contents(count: int = COUNT, below: str = "") -> dict[str, bytes]:
    """Image files in folders, by path, in an order that is not that of their names; and what is no image."""
    images = {
        f"{below}{number % 3}/{number * 7 % 100:03}.{'jpg' if number % 4 else 'png'}": encoded(
            picture(number, 20 + number, 24), "JPEG" if number % 4 else "PNG"
        )
        for number in range(count)
    }
    return images | {f"{below}0/about.json": b"{}", f"{below}.hidden/a.jpg": b"", f"{below}__MACOSX/._a.jpg": b""}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return path


def write_parquet(path: Path, images: list[bytes], column: str = "image") -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"bytes": data, "path": None} for data in images]
    table = pa.table({column: pa.array(values), "label": list(range(len(images)))})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=4)
    return path


def pixels_of(root: Path, cache: str = "none") -> dict[Split, torch.Tensor]:
    return {split: everything(opened(root, cache, split=split)[0]) for split in SPLITS}


def refusal(root: Path, cache: str = "none", split: Split = "train", **more: Any) -> str:
    with pytest.raises(FastleError) as error:
        opened(root, cache, split=split, **more)
    return str(error.value)


PACKED: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "zip": lambda root, files: write_zip(root / "images.zip", files),
    "stored zip": lambda root, files: write_zip(root / "images.zip", files, zipfile.ZIP_STORED),
    "tar": lambda root, files: write_tar(root / "images.tar", files),
    "tar in a folder": lambda root, files: write_tar(root / "tars" / "images.tar", files).parent,
    # as `zip -r photographs.zip photographs` packs it
    "zip of a folder": lambda root, files: write_zip(root / "i.zip", {f"photographs/{n}": d for n, d in files.items()}),
}


@pytest.mark.parametrize("kind", PACKED)
def test_one_shard_is_the_folder_that_was_packed(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", contents())
    root = PACKED[kind](tmp_path / "packed", contents())
    expected, packed = pixels_of(folder), pixels_of(root)
    assert {split: len(batch) for split, batch in packed.items()} == {"train": 39, "valid": 3, "test": 3}
    assert all(torch.equal(packed[split], expected[split]) for split in SPLITS)
    if kind == "zip":
        # and so are its caches, the second time too
        for _ in range(2):
            assert torch.equal(everything(opened(root, "disk")[0]), expected["train"])


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_splits_of_their_own(kind: str, tmp_path: Path) -> None:
    files = {split: contents(6 + i, f"{split}/") for i, split in enumerate(SPLITS)}
    folder = write_folder(tmp_path / "folder", {name: data for some in files.values() for name, data in some.items()})
    expected = pixels_of(folder)
    if kind == "zip":
        root = write_zip(tmp_path / "all.zip", {name: data for some in files.values() for name, data in some.items()})
    else:
        for split, some in files.items():
            below = {name.removeprefix(f"{split}/"): data for name, data in some.items()}
            write_tar(tmp_path / "shards" / split / "000.tar", below)
        root = tmp_path / "shards"
    packed = pixels_of(root)
    assert all(torch.equal(packed[split], expected[split]) for split in SPLITS)


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    images = [data for name, data in contents(21).items() if not name.endswith(("json", "a.jpg"))]
    shards = tmp_path / "shards"
    write_parquet(shards / "train-00000-of-00002.parquet", images[:9])
    write_parquet(shards / "train-00001-of-00002.parquet", images[9:15])
    write_parquet(shards / "validation-00000-of-00001.parquet", images[15:18])
    write_parquet(shards / "test-00000-of-00001.parquet", images[18:])
    folder = write_folder(tmp_path / "folder", {f"{i:03}.png": data for i, data in enumerate(images)})
    packed = pixels_of(shards)
    assert torch.equal(torch.cat([packed[split] for split in SPLITS]), everything(open_tree(config(folder), folder)))


def test_several_shards_and_a_pattern_of_them(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number:06}.tar", {f"{i}.jpg": encoded(picture(i, 24, 24), "JPEG") for i in range(12)})
    images, said = opened(tmp_path / "*.tar")
    assert len(images) == 42 and "index: of 4 shards" in said
    assert "index" not in opened(tmp_path / "*.tar", "none")[1]
    train = opened(tmp_path, "none")[0]
    assert isinstance(train, EncodedImages)
    names = [file.name for file in train.files]
    assert names == sorted(names, key=lambda name: (name.split(", ")[0], name.split(", ")[1])) and len(set(names)) == 42
    # the same member of several shards is not held out of all of them at once by its name alone
    assert len({name.split(", ")[1] for name in names}) == 12


def test_an_index_is_built_again_when_a_shard_has_changed(tmp_path: Path) -> None:
    root = write_tar(tmp_path / "a.tar", contents(30))
    assert "(built)" in opened(root, "none")[1]
    assert "index" not in opened(root, "none")[1]
    write_tar(root, contents(40))
    images, said = opened(root, "none")
    assert "out of date: some shards have changed since: building it again" in said and len(images) == 36
    (path,) = cache_folder().glob("index-*.safetensors")
    # another look at it, while this process holds it, would find what it holds
    del images
    flipped(path, -40)
    assert "damaged (its checksum is another): building it again" in opened(root, "none")[1]


def test_a_cache_folder_that_cannot_be_written_costs_the_index_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images, said = opened(write_tar(tmp_path / "a.tar", contents(30)), "none")
    assert len(images) == 26 and "index: not kept, so that every start reads all shards" in said


def test_a_run_knows_its_shards_again(tmp_path: Path) -> None:
    def identity(root: Path) -> Any:
        return open_training(config(root), Loading())[2]

    one = identity(write_zip(tmp_path / "one" / "a.zip", contents(30)))
    assert one.count == 26
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.zip").rename(tmp_path / "two" / "b.zip")
    assert one.difference(identity(tmp_path / "two" / "b.zip")) is None
    files = contents(30)
    files["0/000.png"] += b"more"
    assert "sizes" in identity(write_zip(tmp_path / "b.zip", files)).difference(one)
    files["0/zzz.png"] = files.pop("0/000.png")
    assert "names" in identity(write_zip(tmp_path / "c.zip", files)).difference(one)


def test_bad_members_are_named_with_their_shards_and_can_be_skipped(tmp_path: Path) -> None:
    files, root = contents(30), tmp_path / "a.tar"
    good = opened(write_tar(root, files), "none")[0]
    assert isinstance(good, EncodedImages)
    bad = [name for file in good.files if (name := file.name.split(", ")[1]).endswith("jpg")]
    files[bad[0]], files[bad[1]], files[bad[2]] = b"", files[bad[1]][:-200], b"<html>"
    write_tar(root, files)
    for cache in ("none", "disk"):
        faults = refusal(root, cache)
        assert f"{root}, {bad[2]} is an HTML page" in faults and f"{root}, {bad[0]} is empty" in faults
        assert f"{root}, {bad[1]} does not decode" in faults
        assert len(opened(root, cache, bad_images="skip")[0]) == 26 - 3


def test_images_of_shards_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = contents(30)
    root = write_tar(tmp_path / "a.tar", files | {"0/9.jpg": b"", "1/9.jpg": b"", "2/9.jpg": b""})
    usable = len(opened(root, "none", bad_images="skip")[0])
    with monkeypatch.context() as patched:
        patched.setattr(fastle.data.open, "find_faults", lambda *_, **__: pytest.fail("checked again"))
        assert len(opened(root, "none", bad_images="skip")[0]) == usable < 30
    # but anew for another size, which some may be too small for
    assert "smaller than the 24x24 asked for" in refusal(root, size=24)
    write_tar(root, files)
    assert len(opened(root, "none")[0]) == 26


def cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def flipped(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    return path


def gzipped(path: Path, name: str) -> Path:
    made = path.with_name(name)
    made.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return made


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut tar": (lambda p: cut(write_tar(p / "a.tar", contents()), 0.5), r"a\.tar is damaged .*behind \d/\d+\.\w+"),
    "cut at a member": (
        lambda p: written(p / "a.tar", write_tar(p / "b.tar", {"a.jpg": bytes(512)}).read_bytes()[:1024]),
        r"a\.tar is damaged or cut short behind a\.jpg: copy it again",
    ),
    "damaged header": (
        lambda p: flipped(write_tar(p / "a.tar", {f"{i}.jpg": bytes(100) for i in range(9)}), 1024 + 10),
        r"a\.tar is damaged or cut short behind 0\.jpg: copy it again",
    ),
    "no tar": (lambda p: written(p / "a.tar", b"<!doctype html>" + bytes(999)), r"a\.tar is an HTML page"),
    "gzip by name": (lambda p: gzipped(write_tar(p / "a.tar", contents(3)), "a.tar.gz"), "unpack it to a .tar"),
    "gzip in a folder": (
        lambda p: gzipped(write_tar(p / "d" / "a.tar", contents(3)), "a.tgz").parent, r"a\.tgz .*unpack it to a .tar"
    ),
    "gzip in disguise": (
        lambda p: written(p / "a.tar", gzip.compress(bytes(99))), r"a\.tar is compressed as a whole by gzip"
    ),
    "cut zip": (lambda p: cut(write_zip(p / "a.zip", contents()), 0.5), r"a\.zip is damaged or no zip"),
    "other compression": (
        lambda p: write_zip(p / "a.zip", {"x/a.jpg": b"1", "x/b.jpg": b"2"}, zipfile.ZIP_LZMA),
        r"a\.zip, x/a\.jpg is compressed otherwise than by deflate: pack it again, with zip -0",
    ),
    "flipped in a zip": (
        lambda p: flipped(write_zip(p / "a.zip", contents(), zipfile.ZIP_STORED), 400),
        r"a\.zip, 0/000\.png cannot be read: its checksum in the zip is another, copy the shard again",
    ),
    "no images": (
        lambda p: write_tar(p / "a.tar", {"a.txt": b"", "b.txt": b""}), r"hold no images .* but 2 other files"),
    "too few": (lambda p: write_tar(p / "a.tar", {"a.jpg": b"", "b.jpg": b""}), "2 images are too few for 3 splits"),
    "no match": (lambda p: p / "*.tar", r"\*\.tar matches no shard"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_one_error_that_names_it(kind: str, tmp_path: Path) -> None:
    write, fault = DAMAGE[kind]
    root = write(tmp_path)
    said = "".join(text for split in SPLITS if (text := _fault(root, split)))
    assert re.search(fault, said), said


def _fault(root: Path, split: Split) -> str:
    try:
        opened(root, "none", split=split)
    except DataError as error:
        return str(error)
    # the checksum of a member is looked at when the member is read
    return ""


def test_a_folder_of_images_may_hold_an_archive_too(tmp_path: Path) -> None:
    write_folder(tmp_path, contents(30))
    write_zip(tmp_path / "0" / "old.zip", contents(3))
    assert len(opened(tmp_path, "none")[0]) == 26


def test_a_parquet_file_without_images(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "a.parquet", [b"1"] * 9, column="picture")
    pa = pytest.importorskip("pyarrow")
    assert "row group" in refusal(root)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": ["a"], "number": [1]}), root)
    assert "a.parquet: no column of image bytes (text, number)" in refusal(root)
    parquet.write_table(pa.table({"left": [b"a"], "right": [b"b"]}), root)
    assert 'several columns of image bytes (left, right): name the one to take "image"' in refusal(root)


def an_index(count: int, tmp_path: Path) -> ShardIndex:
    """An index of images that need not exist."""
    width = 9
    names = np.char.zfill(np.arange(count).astype("S9"), width)
    ends = np.arange(1, count + 1, dtype=np.int64) * width
    path = tmp_path / "index"
    path.write_bytes(names.tobytes() + ends.tobytes())
    places = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    return ShardIndex(
        shards=[f"{i}.tar" for i in range(-(-count // 10_000))], columns=[],
        shard=np.arange(count, dtype=np.int32) // 10_000, start=np.arange(count, dtype=np.int64) * 8192,
        size=np.full(count, 8000, np.int32), split=make_splits(np.full(count, NO_SPLIT, np.uint8), places, "x"),
        file=path.open("rb", buffering=0), names=Entry(torch.uint8, (count * width,), 0, count * width),
        name_ends=Entry(torch.int64, (count,), count * width, count * (width + 8)),
        fingerprint="f", digests=("n", "s"),
    )  # fmt: skip


def test_a_million_images_take_bytes_and_no_objects(tmp_path: Path) -> None:
    count = 1_000_000
    index = an_index(count, tmp_path)
    files = index.of_split("train")
    assert len(files) == 900_000
    held = sum(column.nbytes for column in (index.shard, index.start, index.size, index.split, files.rows))
    assert held <= 21 * count
    splits = [set(index.of_split(split).rows.tolist()) for split in ("valid", "test")]
    assert [len(split) for split in splits] == [50_000, 50_000] and not splits[0] & splits[1]
    # batches look up their images, each known by its name
    picked = batch_indices(len(files), step=123, batch_size=64, seed=1, rank=1, world_size=2).tolist()
    assert [files[i].name for i in picked] == [f"{files.rows[i] // 10_000}.tar, {files.rows[i]:09}" for i in picked]
    # a cache without some of them is another
    assert files.fingerprint() != files.without({0}).fingerprint()
    assert files.identity().count == len(files) and files.without({0, 5})[0].row == files.rows[1]
