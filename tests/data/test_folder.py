"""Folders of images: which files are found, and how they are split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastle.data.decode import ImageFile
from fastle.data.folder import open_folder
from fastle.data.loading import Loading
from fastle.errors import DataError
from fastle.folders import EXTENSIONS, SPLITS, Split, find_images, split_paths


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(root: Path, split: Split | None) -> list[str]:
    return [path.relative_to(root).as_posix() for path in split_paths(root, split)]


def refusal(root: Path, split: Split | None = "train") -> str:
    with pytest.raises(DataError) as error:
        split_paths(root, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_are_found_by_name_in_the_order_of_their_paths(tmp_path: Path) -> None:
    root = touch(tmp_path, "b.jpg", "a/z.PNG", "a/b/c.JpEg", "a-b.webp", "a.txt", "c.gif", ".d.jpg", ".e/f.jpg", "jpg")
    elsewhere = touch(tmp_path.with_name("elsewhere"), "g.jpg")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "h.jpg").symlink_to(elsewhere / "g.jpg")
    assert find_images(root) == ["a-b.webp", "a/b/c.JpEg", "a/z.PNG", "b.jpg", "c.gif", "h.jpg"]
    assert names(root, None) == find_images(root)


def test_the_root_may_be_hidden_or_linked(tmp_path: Path) -> None:
    hidden = touch(tmp_path / ".cache", "a.jpg")
    (tmp_path / "link").symlink_to(hidden, target_is_directory=True)
    assert find_images(hidden) == find_images(tmp_path / "link") == ["a.jpg"]


@pytest.mark.parametrize(("n", "held_out"), [(3, 1), (20, 1), (21, 2), (100, 5)])
def test_a_hold_out_is_five_percent_of_the_images_per_split(n: int, held_out: int, tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{i % 3}/{i:03}.jpg" for i in range(n)))
    parts = {split: names(root, split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": n - 2 * held_out,
        "valid": held_out,
        "test": held_out,
    }
    assert all(part == sorted(part) for part in parts.values())
    assert sorted(path for part in parts.values() for path in part) == names(root, None)


def test_no_kind_of_photograph_is_left_out_without_a_word(tmp_path: Path) -> None:
    """JPEGs of all names are used, and what cannot be decoded is a bad file, which is reported."""
    kinds = "jfif jpe heif jxl dng cr2 nef arw tga jp2 psd"
    root = touch(tmp_path, *(f"a.{kind}" for kind in kinds.split()), "B.HEIF", "notes.txt")
    assert find_images(root) == sorted(["B.HEIF", *(f"a.{kind}" for kind in kinds.split())])
    assert {".jfif", ".jpe", ".heif"} <= set(EXTENSIONS)


def test_a_hold_out_depends_on_the_paths_below_the_root_alone(tmp_path: Path) -> None:
    files = [f"{i:03}.jpg" for i in range(100)]
    one, two = touch(tmp_path / "one", *files), touch(tmp_path / "two" / "deep", *files[::-1])
    assert [names(one, split) for split in SPLITS] == [names(two, split) for split in SPLITS]
    # by hash, not by name
    assert names(one, "test") != files[:5]
    # pinned, because a test set that changes between versions leaks into training
    assert names(one, "test") == ["018.jpg", "041.jpg", "047.jpg", "094.jpg", "096.jpg"]
    # a new image moves an image or two, not all
    touch(one, "100.jpg")
    assert len(set(names(one, "test")) - set(names(two, "test"))) <= 2


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"train/{i:02}.jpg" for i in range(40)), "test/x/0.jpg", "test/1.jpg", "stray.jpg")
    train, valid = names(root, "train"), names(root, "valid")
    assert names(root, "test") == ["test/1.jpg", "test/x/0.jpg"]
    assert len(valid) == 2
    assert sorted(train + valid) == [f"train/{i:02}.jpg" for i in range(40)]
    touch(root, "valid/v.jpg")
    assert names(root, "valid") == ["valid/v.jpg"]
    assert names(root, "train") == [f"train/{i:02}.jpg" for i in range(40)]
    assert len(names(root, None)) == 44


def test_faults_are_one_line_each(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder: ")
    file = touch(tmp_path / "kinds", "a.txt", "b.svg") / "a.txt"
    assert refusal(file).startswith(f"{file} is not a folder: ")
    nothing = (
        f"{file.parent} holds no images (.jpg .png .webp .tif .bmp .gif .avif .heic), but 2 other files: add images"
    )
    assert refusal(file.parent) == nothing
    few = touch(tmp_path / "few", "a.jpg", "b.jpg")
    assert refusal(few) == f"{few}: 2 images are too few for 3 splits: add images"
    assert len(split_paths(few, None)) == 2
    one = touch(tmp_path / "one", "train/a.jpg", "test/b.jpg")
    assert refusal(one) == f"{one / 'train'}: 1 images are too few for 2 splits: add images"


def test_the_decoder_is_given_the_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")

    def decoder(files: Sequence[ImageFile]) -> Tensor:
        assert [file.name for file in files] == [str(tmp_path / "b.png"), str(tmp_path / "a.png")]
        return torch.tensor([len(file.read()) > 0 for file in files], dtype=torch.uint8).view(-1, 1, 1, 1)

    images = open_folder(tmp_path, None, decoder, Loading())
    assert len(images) == 2
    assert images.batch([1, 0]).flatten().tolist() == [0, 1]
