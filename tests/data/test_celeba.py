"""CelebA: its three layouts, and what is said of one that is not complete."""

from __future__ import annotations

import builtins
import inspect
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastle.data import celeba
from fastle.data.celeba import download_celeba, open_celeba
from fastle.data.decode import TorchvisionDecoder
from fastle.errors import DataError, FastleError
from fastle.folders import Split
from tests.data.pictures import encoded, oracle, picture

# the numbers of the images in each split; the partition does not have to be in blocks
PARTS: dict[Split, list[int]] = {"train": [1, 2, 3, 6], "valid": [4], "test": [5, 7]}
CODES = {number: code for code, numbers in enumerate(PARTS.values()) for number in numbers}
NUMBERS = sorted(CODES)
DECODER = TorchvisionDecoder(128, 3, resize=False)


def write_images(folder: Path, numbers: Sequence[int] = NUMBERS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:06}.jpg").write_bytes(encoded(picture(number), "JPEG"))


def write_txt(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{number:06}.jpg {CODES[number]}\n" for number in NUMBERS]
    (folder / "list_eval_partition.txt").write_text("".join(lines))


def write_csv(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Kaggle's file comes from Windows
    lines = ["image_id,partition\r\n", *(f"{number:06}.jpg,{CODES[number]}\r\n" for number in NUMBERS)]
    (folder / "list_eval_partition.csv").write_bytes("".join(lines).encode())


def write_parquet(folder: Path, shards: Mapping[str, Sequence[int]]) -> None:
    """Files as `datasets` writes them, in row groups of two images."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in shards.items():
        rows = [{"bytes": encoded(picture(number), "PNG"), "path": f"{number:06}.jpg"} for number in numbers]
        table = pa.table({"image": rows, "celeb_id": list(numbers), "Smiling": [True] * len(rows)})
        pyarrow.parquet.write_table(table, folder / name, row_group_size=2)


SHARDS = {
    "train-00000-of-00002.parquet": [1, 2, 3],
    "train-00001-of-00002.parquet": [6],
    "valid-00000-of-00001.parquet": [4],
    "test-00000-of-00001.parquet": [5, 7],
}
# where the images lie, where the partition lies and how it is written
LAYOUTS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "torchvision": ("celeba/img_align_celeba", "celeba", write_txt),
    "torchvision-inside": ("img_align_celeba", "", write_txt),
    "kaggle": ("img_align_celeba/img_align_celeba", "", write_csv),
    "flat": ("", "", write_csv),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_partition_are_enough(layout: str, tmp_path: Path) -> None:
    images_at, partition_at, write_partition = LAYOUTS[layout]
    write_images(tmp_path / images_at)
    write_partition(tmp_path / partition_at)
    for split, numbers in PARTS.items():
        images = open_celeba(tmp_path, split, DECODER)
        expected = [oracle(encoded(picture(number), "JPEG"), 128, resize=False) for number in numbers]
        assert torch.equal(images.batch(range(len(images))), torch.stack(expected))


@pytest.mark.parametrize("inside", ["", "data"], ids=["flat", "nested"])
def test_parquet_files_are_read_row_by_row(inside: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / inside, SHARDS)
    for split, numbers in PARTS.items():
        images = open_celeba(tmp_path, split, DECODER)
        expected = [oracle(encoded(picture(number), "PNG"), 128, resize=False) for number in numbers]
        assert torch.equal(images.batch(list(range(len(images)))[::-1]), torch.stack(expected[::-1]))


def refusal(root: Path, split: Split = "train") -> str:
    with pytest.raises(DataError) as error:
        open_celeba(root, split, DECODER)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "gone"):
        assert refusal(root).startswith(f"no CelebA at {root}: ")


@pytest.mark.parametrize("partition", [True, False], ids=["partition", "archive-alone"])
def test_an_archive_that_is_not_extracted(partition: bool, tmp_path: Path) -> None:
    folder = tmp_path / "celeba"
    folder.mkdir()
    if partition:
        write_txt(folder)
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", b"")
    assert refusal(tmp_path) == (
        f"{folder / 'img_align_celeba.zip'} is not extracted yet: run unzip img_align_celeba.zip in {folder}"
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is empty"), (b"<!DOCTYPE html>\n<title>Quota exceeded</title>", "is an HTML page"), (b"\0" * 300, None)],
    ids=["empty", "page", "zeros"],
)
@pytest.mark.parametrize(
    ("name", "fault_of_zeros"),
    [("img_align_celeba.zip", " is not a zip"), ("train-00000-of-00001.parquet", " is damaged or not a parquet"),
     ("list_eval_partition.txt", ", line 1: ")],
)  # fmt: skip
def test_what_a_failed_download_leaves(
    name: str, fault_of_zeros: str, content: bytes, fault: str | None, tmp_path: Path
) -> None:
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    if "partition" in name:
        write_images(tmp_path / "img_align_celeba", [1])
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / name}" + (fault_of_zeros if fault is None else f" {fault}"))


@pytest.mark.parametrize("line", ["000002.jpg 3", "000002.jpg", "a b c"])
def test_a_line_of_the_partition_that_is_something_else(line: str, tmp_path: Path) -> None:
    write_images(tmp_path / "img_align_celeba", [1])
    partition = tmp_path / "list_eval_partition.txt"
    partition.write_text(f"000001.jpg 0\n{line}\n")
    assert refusal(tmp_path).startswith(f"{partition}, line 2: ")
    assert repr(line) in refusal(tmp_path)


def test_fewer_images_than_the_partition_names(tmp_path: Path) -> None:
    folder = tmp_path / "img_align_celeba"
    write_images(folder, [1, 2, 4, 7])
    write_txt(tmp_path)
    assert refusal(tmp_path) == (
        f"{folder}: 3 of the 7 images in list_eval_partition.txt are missing, 000003.jpg first: "
        "extract the archive again"
    )


def test_no_images_at_all(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "img_align_celeba").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}: no images: extract img_align_celeba.zip")


def test_images_without_a_partition(tmp_path: Path) -> None:
    write_images(tmp_path / "celeba" / "img_align_celeba", [1])
    assert "images without a partition: put list_eval_partition.txt" in refusal(tmp_path)


def test_a_parquet_file_that_is_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"train-00001-of-00003.parquet": [1], "test-00000-of-00001.parquet": [5]})
    assert f"{tmp_path}: 2 of 3 files are missing, train-00000-of-00003.parquet first" in refusal(tmp_path)
    assert "no valid-*.parquet" in refusal(tmp_path, "valid")
    assert len(open_celeba(tmp_path, "test", DECODER)) == 1


def test_parquet_files_of_another_dataset(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["no image"]}), tmp_path / "train-00000-of-00001.parquet")
    assert "no column image.bytes" in refusal(tmp_path)


def test_a_parquet_row_without_an_image_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"bytes": encoded(picture(1), "PNG"), "path": ""}, {"bytes": None, "path": ""}]
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pa.table({"image": rows}), path)
    with pytest.raises(DataError) as error:
        open_celeba(tmp_path, "train", DECODER).batch([0, 1])
    assert str(error.value) == f"{path}, row group 0, row 1 is empty"


def test_the_stamp_of_a_row_is_that_of_its_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, SHARDS)
    files = open_celeba(tmp_path, "train", DECODER).files
    stamps = [file.stamp() for file in files]
    assert stamps[0] == stamps[1] == stamps[2]
    os.utime(tmp_path / "train-00000-of-00002.parquet", ns=(1, 1))
    assert [file.stamp() == stamp for file, stamp in zip(files, stamps, strict=True)] == [False, False, False, True]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pyarrow(name: str, *args: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args)  # type: ignore[arg-type]

    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert 'pip install "fastle[parquet]"' in refusal(tmp_path)


class Hub(ModuleType):
    """A stand-in for huggingface_hub, which fetches one file of a data set and then fails, until it has all."""

    def __init__(self, shards: Mapping[str, Sequence[int]]) -> None:
        super().__init__("huggingface_hub")
        self.shards, self.asked = dict(shards), list[tuple[object, ...]]()
        self.errors = ModuleType("huggingface_hub.errors")
        for name, kind in {"HfHubHTTPError": HubFault, "HFValidationError": ValueError}.items():
            setattr(self.errors, name, kind)

    def snapshot_download(
        self, repo_id: str, *, repo_type: str | None = None, allow_patterns: list[str] | str | None = None,
        local_dir: str | Path | None = None,
    ) -> str:  # fmt: skip
        assert local_dir is not None and allow_patterns is not None
        self.asked.append((repo_id, repo_type, local_dir))
        for name, numbers in self.shards.items():
            path = f"img_align+identity+attr/{name}"
            assert any(fnmatch(path, pattern) for pattern in allow_patterns)
            if not (Path(local_dir) / path).exists():
                write_parquet((Path(local_dir) / path).parent, {name: numbers})
                raise HubFault(f"broke off\nbehind {name}")
        return str(local_dir)


class HubFault(OSError): ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(SHARDS)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
    return made


def test_a_download_shows_the_terms_first_and_goes_on_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    said: list[object] = []
    for name in SHARDS:
        with pytest.raises(FastleError, match=rf"does not give flwrlabs/celeba; .* \(broke off behind {name}\)"):
            download_celeba(tmp_path / "celeba", lambda text: said.append((text, len(hub.asked))))
    download_celeba(tmp_path / "celeba", said.append)
    assert set(hub.asked) == {("flwrlabs/celeba", "dataset", tmp_path / "celeba")}
    assert said[0] == (celeba.TERMS, 0) and "non-commercial research only" in celeba.TERMS
    for split, numbers in PARTS.items():
        assert len(open_celeba(tmp_path / "celeba", split, DECODER)) == len(numbers)
    # what is there is not fetched, whatever its layout
    asked = len(hub.asked)
    write_images(tmp_path / "other")
    write_txt(tmp_path / "other")
    for root in (tmp_path / "celeba", tmp_path / "other"):
        download_celeba(root, lambda text: pytest.fail("nothing is fetched"))
    assert len(hub.asked) == asked


def test_what_a_download_needs_is_said_before_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.shards["valid-00000-of-00001.parquet"]
    for _ in range(3):
        with pytest.raises(FastleError, match="broke off"):
            download_celeba(tmp_path, lambda text: None)
    with pytest.raises(FastleError, match=r"no valid-\*\.parquet beside the other parquet files"):
        download_celeba(tmp_path, lambda text: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FastleError, match=r'takes huggingface_hub: pip install "fastle\[hub\]"'):
        download_celeba(tmp_path / "new", lambda text: None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FastleError, match=r'needs pyarrow, which is not installed: pip install "fastle\[parquet\]"'):
        download_celeba(tmp_path / "new", lambda text: pytest.fail("the terms of what cannot be used"))


def test_the_stand_in_is_like_huggingface_hub() -> None:
    real = inspect.signature(pytest.importorskip("huggingface_hub").snapshot_download).parameters
    for argument, parameter in list(inspect.signature(Hub.snapshot_download).parameters.items())[1:]:
        assert real[argument].kind is parameter.kind
