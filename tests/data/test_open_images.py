"""The images of a configuration: each dataset with its size, its crop and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from fastle.config import DataConfig
from fastle.data import open_images, train_size
from fastle.errors import DataError
from tests.data.pictures import picture, write_pictures


def test_a_folder_is_resized_and_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, 30, width=40, height=50)
    config = DataConfig(dataset="folder", root=str(tmp_path), size=32, channels=3)
    images = open_images(config, "train")
    assert train_size(config) == len(images) == 26
    assert images.batch([0]).shape == (1, 3, 32, 32)


def test_celeba_is_cropped_not_resized(tmp_path: Path) -> None:
    image = picture(0)
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    image.save(folder / "000001.jpg", "PNG")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 2\n")
    config = DataConfig(dataset="celeba", root=str(tmp_path), size=128, channels=3)
    batch = open_images(config, "test").batch([0])
    assert torch.equal(batch[0], pil_to_tensor(image.crop((25, 45, 153, 173))))
    assert train_size(config) == 162_770


def test_shapes_need_no_root() -> None:
    config = DataConfig(dataset="shapes", root=None, size=32, channels=1)
    assert train_size(config) == len(open_images(config, "train")) == 12_000
    assert open_images(config, "valid").batch([0]).shape == (1, 1, 32, 32)


def test_sizes_are_known_without_the_data(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    assert train_size(DataConfig(dataset="cifar10", root=gone, size=32, channels=3)) == 45_000
    assert train_size(DataConfig(dataset="celeba", root=gone, size=128, channels=3)) == 162_770
    assert train_size(DataConfig(dataset="folder", root=gone, size=128, channels=3)) is None


def test_faults_are_one_line_each(tmp_path: Path) -> None:
    shapes = DataConfig(dataset="shapes", root=None, size=32, channels=1)
    with pytest.raises(DataError, match=r"^unknown split 'validation': did you mean 'valid'\?$"):
        open_images(shapes, "validation")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^celeba needs --data"):
        open_images(DataConfig(dataset="celeba", root=None, size=128, channels=3), "train")
    with pytest.raises(DataError, match=r"^--size 64 cannot be"):
        open_images(DataConfig(dataset="cifar10", root=str(tmp_path), size=64, channels=3), "train")
