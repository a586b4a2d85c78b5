"""CelebA in the three layouts it is distributed in: torchvision's, Kaggle's and the parquet files on Hugging Face.

Only the aligned images and the partition are needed. Identities, attributes and landmarks are not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastle.errors import DataError
from fastle.extras import missing_extra
from fastle.folders import SPLITS, Split
from fastle.hub import download_dataset
from fastle.lengths import TRAIN_IMAGES

from .decode import Decoder, DiskFile, ImageFile, file_stamp
from .header import download_fault
from .images import EncodedImages
from .parquet import open_parquet, read_row

TRAIN = TRAIN_IMAGES["celeba"]
COLUMN = "image.bytes"  # of the parquet files
HUB_DATASET = "flwrlabs/celeba"
HUB_FILES = ("img_align+identity+attr/*.parquet", "LICENSE")
TERMS = f"""\
CelebA is for non-commercial research only. Its makers, the Multimedia Laboratory of the Chinese University of Hong
Kong, allow no other use, no sale and no copies for others: https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
By downloading it you agree to that. Ctrl-C stops; the same command goes on.
downloading 12 GB of https://huggingface.co/datasets/{HUB_DATASET}, with its LICENSE"""
MAX_PARTITION = 2**27  # bytes


def open_celeba(root: Path, split: Split, decoder: Decoder) -> EncodedImages:
    """Opens the aligned images of a split, in the order of the partition.

    Args:
        root: The folder that holds the images and list_eval_partition.txt or .csv, or the parquet files; or its parent,
            if the folder is called "celeba" (torchvision), "img_align+identity+attr" or "data" (Hugging Face).
        split: The split.
        decoder: Decodes the images.

    Raises:
        DataError: The folder has none of these layouts, or is not complete. The message says what to do.
    """
    return EncodedImages(find_files(root, split), decoder)


def find_files(root: Path, split: Split) -> Sequence[ImageFile]:
    """The files of a split; see `open_celeba`."""
    bases = [base for base in (root, root / "celeba", root / "img_align+identity+attr", root / "data") if base.is_dir()]
    for base in bases:
        for partition in (base / "list_eval_partition.txt", base / "list_eval_partition.csv"):
            if partition.is_file():
                return _partition_files(base, partition, split)
        if shards := sorted(shard for shard in base.glob(f"{split}-*.parquet") if shard.is_file()):
            return _parquet_rows(shards)
    for base in bases:
        _refuse_archive(base)
        if any(base.glob("*.parquet")):
            raise DataError(f"{base}: no {split}-*.parquet beside the other parquet files: download it")
        if folder := _image_folder(base):
            raise DataError(f"{folder}: images without a partition: put list_eval_partition.txt or .csv in {base}")
    raise DataError(
        f"no CelebA at {root}: --data needs a folder with img_align_celeba and list_eval_partition, or parquet files, "
        "which --download fetches"
    )


def download_celeba(root: Path, say: Callable[[str], object]) -> None:
    """Downloads CelebA from the Hugging Face hub to where `open_celeba` looks for it, unless it is there already.

    Args:
        root: The folder, created if need be. What an interrupted download left there is used.
        say: Shows a line: the terms of CelebA, before anything is fetched.

    Raises:
        FastleError: A package is missing, the hub cannot be reached, or its files are not complete.
    """
    try:
        for split in SPLITS:
            find_files(root, split)
        return
    except DataError:
        pass
    try:
        # before the download, which takes hours
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error, "to read CelebA's parquet files") or error from None
    say(TERMS)
    download_dataset(HUB_DATASET, HUB_FILES, root)
    for split in SPLITS:
        find_files(root, split)


def _partition_files(base: Path, partition: Path, split: Split) -> list[DiskFile]:
    splits = _read_partition(partition)
    folder = _image_folder(base)
    if folder is None:
        _refuse_archive(base)
        raise DataError(f"{base}: no images: extract img_align_celeba.zip to {base / 'img_align_celeba'}")
    present = {entry.name for entry in os.scandir(folder)}
    missing = [name for name in splits if name not in present]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of the {len(splits)} images in {partition.name} are missing, "
            f"{missing[0]} first: extract the archive again"
        )
    return [DiskFile(f"{folder}{os.sep}{name}") for name, of_image in splits.items() if of_image == split]


def _read_partition(path: Path) -> dict[str, Split]:
    """Maps file names to splits, from lines "000001.jpg 0" (torchvision), or "000001.jpg,0" below a header (Kaggle)."""
    if path.stat().st_size > MAX_PARTITION:
        raise DataError(f"{path} is larger than any partition of CelebA: download it again")
    data = path.read_bytes()
    if fault := download_fault(data):
        raise DataError(f"{path} {fault}")
    codes = {str(code): split for code, split in enumerate(SPLITS)}
    splits: dict[str, Split] = {}
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), start=1):
        match line.replace(",", " ").split():
            case [name, code] if code in codes:
                splits[name] = codes[code]
            case [] | ["image_id", "partition"]:
                pass
            case _:
                raise DataError(
                    f"{path}, line {number}: {line[:60]!r} is not an image and its split (0, 1 or 2): download it again"
                )
    return splits


def _image_folder(base: Path) -> Path | None:
    """The folder of the images. Archives differ in whether they contain the folder; Kaggle's contains it twice."""
    name = "img_align_celeba"
    for folder in (base / name / name, base / name, base):
        if folder.is_dir() and any(entry.name.endswith(".jpg") for entry in os.scandir(folder)):
            return folder
    return None


def _refuse_archive(base: Path) -> None:
    """Raises DataError for an archive that has not been extracted, or for what a failed download left in its place."""
    for archive in sorted(archive for archive in base.glob("*.zip") if archive.is_file()):
        with archive.open("rb") as file:
            head = file.read(256)
        if fault := download_fault(head):
            raise DataError(f"{archive} {fault}")
        if not head.startswith(b"PK"):
            raise DataError(f"{archive} is not a zip archive: download it again")
        raise DataError(f"{archive} is not extracted yet: run unzip {archive.name} in {base}")


@dataclass(frozen=True, slots=True)
class _ParquetRow:
    """An image in a parquet file: a row of one of its row groups."""

    shard: str
    group: int
    row: int

    @property
    def name(self) -> str:
        return f"{self.shard}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        return read_row(self.shard, COLUMN, self.group, self.row)

    def stamp(self) -> str:
        return file_stamp(self.shard)


def _parquet_rows(shards: Sequence[Path]) -> list[ImageFile]:
    _check_shards(shards)
    rows: list[ImageFile] = []
    for shard in shards:
        with open_parquet(str(shard)) as parquet:
            if COLUMN not in [column.path for column in parquet.schema]:
                raise DataError(f"{shard}: no column image.bytes: this is not flwrlabs/celeba, download that")
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                rows += [_ParquetRow(str(shard), group, row) for row in range(count)]
    return rows


def _check_shards(shards: Sequence[Path]) -> None:
    """Raises DataError if one of "split-00000-of-00019.parquet" to "split-00018-of-00019.parquet" is missing."""
    numbered = re.fullmatch(r"(.+)-\d+-of-(\d+)\.parquet", shards[0].name)
    if numbered:
        present = {shard.name for shard in shards}
        expected = [f"{numbered[1]}-{i:05}-of-{numbered[2]}.parquet" for i in range(int(numbered[2]))]
        missing = [name for name in expected if name not in present]
        if missing:
            folder = shards[0].parent
            raise DataError(
                f"{folder}: {len(missing)} of {len(expected)} files are missing, {missing[0]} first: download them"
            )
