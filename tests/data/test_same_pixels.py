"""The pixels are the same, whatever decodes and caches the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastle.config import Size
from fastle.data import open_images
from tests.data import pictures
from tests.data.caches import CACHES, config, everything, loading
from tests.data.pictures import GOOD, encoded, oracle, picture

pytestmark = pytest.mark.usefixtures("cache_home")


def every_kind(folder: Path, sizes: Sequence[tuple[int, int]]) -> dict[str, bytes]:
    """Writes files of all kinds in all these sizes, some with the extension of another; path → content."""
    contents: dict[str, bytes] = {}
    for number, (width, height) in enumerate(sizes):
        for seed, (kind, encode) in enumerate(GOOD.items()):
            extension = ("jpg", "png", "webp", "JPEG")[(number + seed) % 4]
            contents[f"{kind}-{number}.{extension}"] = encode(picture(seed, width, height))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all kinds of files, which are resized, with a few to validate."""
    root = tmp_path_factory.mktemp("folder")
    every_kind(root / "train", [(178, 218), (45, 37)])
    pictures.write_pictures(root / "valid", 5, width=37, height=46)
    pictures.write_pictures(root / "test", 5, first=5, width=37, height=46)
    return root


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's layout of all kinds of files, which are cropped, in CelebA's size and an odd one."""
    root = tmp_path_factory.mktemp("celeba")
    contents = every_kind(root / "all", [(178, 218), (45, 37)])
    pictures.write_celeba(root, [(f"{i:06}.jpg", data) for i, data in enumerate(contents.values(), start=1)], valid=4)
    return root


def expected_of(dataset: str, root: Path, size: Size) -> Tensor:
    folder = root / "train" if dataset == "folder" else root / "celeba" / "img_align_celeba"
    paths = sorted(folder.iterdir())[: None if dataset == "folder" else -4]
    return torch.stack([oracle(path.read_bytes(), size, resize=dataset == "folder") for path in paths])


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
@pytest.mark.parametrize(
    ("dataset", "size"), [("folder", 32), ("folder", (24, 32)), ("celeba", 32), ("celeba", (32, 24))]
)
def test_every_cache_has_the_pixels_of_the_oracle(
    dataset: str, size: Size, decoder: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(dataset)
    expected, data = expected_of(dataset, root, size), config(root, dataset=dataset, size=size)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    for cache in CACHES:
        # the second time, the cache of the first is reused
        for _ in range(2):
            images = open_images(data, "train", loading(decoder, cache))
            batch = everything(images)
            assert batch.dtype == torch.uint8 and torch.equal(batch, expected), cache
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images.batch(order.tolist()), expected[order])
            with pytest.raises(IndexError):
                images.batch([len(images)])
        # writing to a batch does not change the images
        batch.zero_()
        assert torch.equal(images.batch([0, 1]), expected[:2])


@pytest.mark.filterwarnings("ignore:Webp does not support grayscale")
def test_grey_images_are_the_same_for_every_cache(folder: Path) -> None:
    """DALI decodes to RGB only, so grey comes from torchvision."""
    batches = [everything(open_images(config(folder, channels=1), "train", loading("auto", cache))) for cache in CACHES]
    assert batches[0].shape[1] == 1
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_parquet_rows_are_the_same_for_every_cache(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    contents = [encoded(picture(seed, 45, 51), kind) for seed in range(9) for kind in ("PNG", "JPEG")]
    rows = [{"bytes": data, "path": ""} for data in contents]
    pyarrow.parquet.write_table(pa.table({"image": rows}), tmp_path / "train-00000-of-00001.parquet", row_group_size=4)
    expected = torch.stack([oracle(data, 32, resize=False) for data in contents])
    for cache in CACHES:
        images = open_images(config(tmp_path, dataset="celeba", size=32), "train", loading("auto", cache))
        assert torch.equal(everything(images), expected)
