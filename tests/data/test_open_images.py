"""The images of a configuration: each dataset with its size, its crop and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from fastle.config import ConfigError, DataConfig, RunConfig
from fastle.data import decode_files, open_images, open_training
from fastle.data.decode import BadFiles
from fastle.data.open import cache_key
from fastle.errors import DataError
from fastle.lengths import train_size
from fastle.presets import make_config
from tests.data.caches import config, everything, loading
from tests.data.pictures import oracle, picture, write_pictures


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


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
def test_small_images_are_enlarged_where_asked(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 3, width=20, height=26)
    # a larger one is as without the flag
    write_pictures(tmp_path / "train", 1, first=9, width=40, height=50)
    small = config(tmp_path, size=32)
    with pytest.raises(BadFiles, match="is 20x26, smaller than the 32x32 asked for; a run with --upscale enlarges"):
        open_images(small, "train", loading(decoder, "none"))
    large = replace(small, upscale=True)
    paths = sorted((tmp_path / "train").iterdir())
    expected = torch.stack([oracle(path.read_bytes(), 32, resize=True) for path in paths])
    for cache in ("none", "disk"):
        train, valid, _ = open_training(large, loading(decoder, cache))
        assert torch.equal(everything(train), expected) and len(valid) == 3
    assert torch.equal(decode_files(large, [tmp_path / "train" / "0000.png"])[0], expected[0])
    # the cache of one is not taken for that of the other
    assert cache_key(large, "train", gpu=False).path() != cache_key(small, "train", gpu=False).path()


def test_upscale_is_a_part_of_the_configuration_of_folders() -> None:
    plain, upscale = make_config("folder"), make_config("folder", upscale=True)
    assert (plain.data.upscale, upscale.data.upscale) == (False, True)
    assert RunConfig.from_dict(upscale.to_dict()) == upscale
    # a run from before there was a choice
    values = plain.to_dict()
    del values["data"]["upscale"]
    assert RunConfig.from_dict(values) == plain
    for dataset in ("shapes", "cifar10", "celeba"):
        with pytest.raises(ConfigError, match=f"--upscale has no effect with {dataset}, whose images are not resized"):
            make_config(dataset, upscale=True)
