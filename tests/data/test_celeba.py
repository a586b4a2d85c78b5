from __future__ import annotations

import builtins
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor

from fastle.data.celeba import open_celeba
from fastle.data.decode import TorchvisionDecoder
from fastle.data.images import Split
from fastle.errors import DataError

Picture = Callable[..., Image.Image]

# the numbers of the images in each split; the partition does not have to be in blocks
PARTS: dict[Split, list[int]] = {"train": [1, 2, 3, 6], "valid": [4], "test": [5, 7]}
CODES = {number: code for code, numbers in enumerate(PARTS.values()) for number in numbers}
NUMBERS = sorted(CODES)
DECODER = TorchvisionDecoder(128, 3, resize=False)


def write_images(folder: Path, picture: Picture, numbers: Sequence[int] = NUMBERS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(folder / f"{number:06}.jpg", quality=90)


def write_txt(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{number:06}.jpg {CODES[number]}\n" for number in NUMBERS]
    (folder / "list_eval_partition.txt").write_text("".join(lines))


def write_csv(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Kaggle's file comes from Windows
    lines = ["image_id,partition\r\n", *(f"{number:06}.jpg,{CODES[number]}\r\n" for number in NUMBERS)]
    (folder / "list_eval_partition.csv").write_bytes("".join(lines).encode())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, picture: Picture, shards: Mapping[str, Sequence[int]]) -> None:
    """Files as `datasets` writes them, in row groups of two images."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in shards.items():
        rows = [{"bytes": png(picture(number)), "path": f"{number:06}.jpg"} for number in numbers]
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


@pytest.mark.parametrize("split", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_partition_are_enough(layout: str, split: Split, tmp_path: Path, picture: Picture) -> None:
    images_at, partition_at, write_partition = LAYOUTS[layout]
    write_images(tmp_path / images_at, picture)
    write_partition(tmp_path / partition_at)
    images = open_celeba(tmp_path, split, DECODER)
    assert len(images) == len(PARTS[split])
    paths = [next(tmp_path.rglob(f"{number:06}.jpg")) for number in PARTS[split]]
    data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    expected = torch.stack([CenterCrop(128)(decode_jpeg(jpeg, mode="RGB")) for jpeg in data])
    assert torch.equal(images.batch(range(len(images))), expected)


@pytest.mark.parametrize("split", PARTS)
@pytest.mark.parametrize("inside", ["", "data"], ids=["flat", "nested"])
def test_parquet_files_are_read_row_by_row(inside: str, split: Split, tmp_path: Path, picture: Picture) -> None:
    write_parquet(tmp_path / inside, picture, SHARDS)
    images = open_celeba(tmp_path, split, DECODER)
    expected = torch.stack([pil_to_tensor(CenterCrop(128)(picture(number))) for number in PARTS[split]])
    backwards = list(range(len(images)))[::-1]
    assert len(images) == len(PARTS[split])
    assert torch.equal(images.batch(backwards), expected.flip(0))


def refusal(root: Path, split: Split = "train") -> str:
    with pytest.raises(DataError) as error:
        open_celeba(root, split, DECODER)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "gone"):
        assert refusal(root).startswith(f"no CelebA at {root}: ")


@pytest.mark.parametrize("partition", [True, False], ids=["partition", "archive-alone"])
@pytest.mark.parametrize("base", ["", "celeba"])
def test_an_archive_that_is_not_extracted(base: str, partition: bool, tmp_path: Path) -> None:
    folder = tmp_path / base
    folder.mkdir(exist_ok=True)
    if partition:
        write_txt(folder)
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", b"")
    assert refusal(tmp_path) == (
        f"{folder / 'img_align_celeba.zip'} is not extracted yet: run unzip img_align_celeba.zip in {folder}"
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<title>Google Drive - Quota exceeded</title>", "is an HTML page"),
        (b"<html><head>", "is an HTML page"),
        (b"\x00" * 300, "is not a zip archive"),
    ],
    ids=["empty", "doctype", "html", "zeros"],
)
def test_what_a_failed_download_leaves_for_an_archive(content: bytes, fault: str, tmp_path: Path) -> None:
    write_txt(tmp_path)
    (tmp_path / "img_align_celeba.zip").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'img_align_celeba.zip'} {fault}")


@pytest.mark.parametrize(("content", "fault"), [(b"", "is empty"), (b"<html>quota</html>", "is an HTML page")])
def test_what_a_failed_download_leaves_for_the_partition(
    content: bytes, fault: str, tmp_path: Path, picture: Picture
) -> None:
    write_images(tmp_path / "img_align_celeba", picture, [1])
    (tmp_path / "list_eval_partition.txt").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'list_eval_partition.txt'} {fault}")


@pytest.mark.parametrize("line", ["000002.jpg 3", "000002.jpg", "a b c", "000002.jpg train"])
def test_a_partition_that_is_something_else(line: str, tmp_path: Path, picture: Picture) -> None:
    write_images(tmp_path / "img_align_celeba", picture, [1])
    partition = tmp_path / "list_eval_partition.txt"
    partition.write_text(f"000001.jpg 0\n{line}\n")
    assert refusal(tmp_path).startswith(f"{partition}, line 2: ")
    assert repr(line) in refusal(tmp_path)


@pytest.mark.parametrize("split", PARTS)
def test_fewer_images_than_the_partition_names(split: Split, tmp_path: Path, picture: Picture) -> None:
    folder = tmp_path / "img_align_celeba"
    write_images(folder, picture, [1, 2, 4, 7])
    write_txt(tmp_path)
    assert refusal(tmp_path, split) == (
        f"{folder}: 3 of the 7 images in list_eval_partition.txt are missing, 000003.jpg first: "
        "extract the archive again"
    )


def test_no_images_at_all(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "img_align_celeba").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}: no images: extract img_align_celeba.zip")


def test_images_without_a_partition(tmp_path: Path, picture: Picture) -> None:
    write_images(tmp_path / "celeba" / "img_align_celeba", picture, [1])
    assert "images without a partition: put list_eval_partition.txt" in refusal(tmp_path)


def test_an_image_smaller_than_the_crop(tmp_path: Path, picture: Picture) -> None:
    write_images(tmp_path / "img_align_celeba", picture)
    write_csv(tmp_path)
    path = tmp_path / "img_align_celeba" / "000004.jpg"
    picture(0, 178, 120).save(path)
    with pytest.raises(DataError) as error:
        open_celeba(tmp_path, "valid", DECODER).batch([0])
    assert str(error.value) == f"{path} is 178x120, smaller than the 128x128 asked for"


def test_a_parquet_file_that_is_missing(tmp_path: Path, picture: Picture) -> None:
    write_parquet(tmp_path, picture, {"train-00001-of-00003.parquet": [1], "test-00000-of-00001.parquet": [5]})
    assert refusal(tmp_path) == (f"{tmp_path}: 2 of 3 files are missing, train-00000-of-00003.parquet first: fetch it")
    assert "no valid-*.parquet" in refusal(tmp_path, "valid")
    assert len(open_celeba(tmp_path, "test", DECODER)) == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is empty"), (b"<html>", "is an HTML page"), (b"PAR1" + b"\x00" * 50, "is damaged or not a parquet file")],
    ids=["empty", "html", "damaged"],
)
def test_what_a_failed_download_leaves_for_a_parquet_file(content: bytes, fault: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{path} {fault}")


def test_parquet_files_of_another_dataset(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["no image"]}), tmp_path / "train-00000-of-00001.parquet")
    assert "no column image" in refusal(tmp_path)


def test_a_parquet_row_without_an_image_is_named(tmp_path: Path, picture: Picture) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"bytes": png(picture(1)), "path": ""}, {"bytes": None, "path": ""}]
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pa.table({"image": rows}), path)
    with pytest.raises(DataError) as error:
        open_celeba(tmp_path, "train", DECODER).batch([0, 1])
    assert str(error.value) == f"{path}, row group 0, row 1 is empty"


def test_the_stamp_of_a_row_is_its_files(tmp_path: Path, picture: Picture) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, picture, SHARDS)
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
