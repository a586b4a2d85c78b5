"""The same seed gives the same order and the same pixels, whatever decodes, keeps and loads the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.config import DataConfig
from fastle.data import Feed, Images, Loading, open_images, open_training
from fastle.data.decode import BadFiles, Decoder, DiskFile, TorchvisionDecoder
from fastle.errors import DataError
from tests.data import pictures
from tests.data.pictures import GOOD, encoded, picture, plainly, write_celeba

CACHES = ("none", "disk", "host", "auto")
DECODERS = ("torchvision", "dali", "auto")
# CelebA's own size, then odd and even margins in every combination, and none at all; what is resized has them as well
SIZES = [
    (178, 218, 128), (179, 219, 128), (178, 219, 64), (181, 218, 33), (97, 131, 32), (97, 131, 37), (45, 64, 32),
    (37, 37, 37), (37, 50, 37), (300, 41, 40),
]  # fmt: skip
# of images that would have to be enlarged: one side, both, by a pixel, by a lot
TOO_SMALL = [(40, 51, 64), (40, 21, 32), (31, 40, 32), (40, 31, 32), (36, 36, 37), (16, 61, 32), (1, 1, 9)]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def decoder_of(name: str, size: int, resize: bool, threads: int | None = None) -> Decoder:
    if name == "dali":
        pictures.dali_or_skip()
        from fastle.data.dali import DaliDecoder

        return DaliDecoder(size, resize=resize, threads=threads)
    return TorchvisionDecoder(size, 3, resize, threads)


def loading(decoder: str, cache: str, said: list[str] | None = None) -> Loading:
    if decoder == "dali":
        pictures.dali_or_skip()
    return Loading(decoder=decoder, cache=cache, say=([] if said is None else said).append)  # type: ignore[arg-type]


def everything(images: Images) -> Tensor:
    return images.batch(range(len(images)))


def every_kind(folder: Path, sizes: Sequence[tuple[int, int]]) -> dict[str, bytes]:
    """All kinds of files in all these sizes, some under the ending of another; path below `folder` → content."""
    contents: dict[str, bytes] = {}
    for number, (width, height) in enumerate(sizes):
        for seed, (kind, encode) in enumerate(GOOD.items()):
            ending = ("jpg", "png", "webp", "JPEG")[(number + seed) % 4]
            contents[f"{kind}-{number}.{ending}"] = encode(picture(seed, width, height))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return contents


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_every_decoder_has_the_pixels_of_the_oracle(
    width: int, height: int, size: int, resize: bool, tmp_path: Path
) -> None:
    contents = every_kind(tmp_path, [(width, height)])
    files = [DiskFile(str(tmp_path / name)) for name in contents]
    expected = torch.stack([plainly(data, size, resize=resize) for data in contents.values()])
    for name in ("torchvision", "dali"):
        batch = decoder_of(name, size, resize)(files)
        assert batch.dtype == torch.uint8 and batch.shape == (len(files), 3, size, size)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        wrong = [kind for kind, ours, right in zip(GOOD, batch, expected, strict=True) if not torch.equal(ours, right)]
        assert wrong == [], name


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_no_decoder_enlarges_or_pads(name: str, resize: bool, tmp_path: Path) -> None:
    for width, height, size in TOO_SMALL:
        side = min(width, height)
        contents = every_kind(tmp_path, [(width, height)])
        files = [DiskFile(str(tmp_path / path)) for path in contents]
        good = Memory("good.png", encoded(picture(0, size, size), "PNG"))
        decode = decoder_of(name, size, resize)
        with pytest.raises(BadFiles) as error:
            decode([good, *files, good])
        fault = f"is {width}x{height}, smaller than the {size}x{size} asked for"
        assert error.value.faults == {i: f"{file.name} {fault}" for i, file in enumerate(files, start=1)}
        # the shorter side itself can be had
        expected = torch.stack([plainly(data, side, resize=resize) for data in contents.values()])
        assert torch.equal(decoder_of(name, side, resize)(files), expected)


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_threads_and_batches_change_nothing(name: str, tmp_path: Path) -> None:
    contents = every_kind(tmp_path, [(45, 51), (64, 37)])
    files = [DiskFile(str(tmp_path / path)) for path in contents]
    expected = torch.stack([plainly(data, 32, resize=False) for data in contents.values()])
    for threads in (1, 2, 5):
        decode = decoder_of(name, 32, False, threads)
        assert torch.equal(decode(files), expected)
        # another batch size every time, the last one smaller, and one of a single image
        for share in (1, 7):
            batches = [decode(files[start : start + share]) for start in range(0, len(files), share)]
            assert torch.equal(torch.cat(batches), expected)
        assert torch.equal(decode(files[::-1]), expected.flip(0))
        assert torch.equal(decode([files[3]] * 4), expected[3].expand(4, -1, -1, -1))


def test_what_a_decoder_gave_is_not_written_over() -> None:
    """DALI hands out its own memory: a batch must outlive the ones after it."""
    for name in ("torchvision", "dali"):
        decode = decoder_of(name, 16, False)
        files = [Memory(str(seed), encoded(picture(seed, 20, 20), "JPEG")) for seed in range(24)]
        expected = torch.stack([plainly(file.read(), 16, resize=False) for file in files])
        batches = [decode(files[start : start + 3]) for start in range(0, 24, 3)]
        del decode
        assert torch.equal(torch.cat(batches), expected)


class Memory:
    """An image file that lies nowhere."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self._data = data

    def read(self) -> bytes:
        return self._data

    def stamp(self) -> str:
        return self.name


def spoilt(seed: int) -> bytes:
    """A JPEG with other bytes in its middle; codecs make the best of most of them."""
    data = bytearray(encoded(picture(seed, 70, 90), "JPEG", progressive=seed % 3 == 0))
    draws = torch.Generator().manual_seed(seed)
    for _ in range(1 + seed % 5):
        # behind the tables
        at = int(torch.randint(len(data) * 2 // 3, len(data) - 2, (), generator=draws))
        data[at] = int(torch.randint(256, (), generator=draws))
    return bytes(data)


def ended_early(seed: int, progressive: bool) -> bytes:
    """A JPEG without its last scans or rows, but with an end as if it were whole."""
    data = encoded(picture(seed, 70, 90), "JPEG", progressive=progressive)
    return data[: len(data) * (4 + seed % 16) // 20] + b"\xff\xd9"


DAMAGED: dict[str, Callable[[int], bytes]] = {
    "other-bytes": spoilt,
    "fewer-rows": lambda seed: ended_early(seed, progressive=False),
    # libjpeg guesses what is missing, from more of the image than the crop
    "fewer-scans": lambda seed: ended_early(seed, progressive=True),
}


def outcome(decoder: Decoder, file: Memory) -> Tensor | str:
    try:
        return decoder([file])
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGED)
def test_decoders_agree_on_what_a_damaged_file_shows(damage: str) -> None:
    pictures.dali_or_skip()
    first, second = decoder_of("torchvision", 32, False), decoder_of("dali", 32, False)
    disagreed = []
    for seed in range(32):
        file = Memory(f"{seed}.jpg", DAMAGED[damage](seed))
        one, other = outcome(first, file), outcome(second, file)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = torch.equal(one, other)
        else:
            same = isinstance(one, str) and isinstance(other, str) and one == other
        if not same:
            disagreed.append(seed)
    assert disagreed == []


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_decoders_name_the_same_bad_files_with_the_same_faults(resize: bool, tmp_path: Path) -> None:
    faults = pictures.write_bad(tmp_path, 32)
    (tmp_path / "bad-middle.png").write_bytes(pictures.damaged_png(picture(0, 50, 50)))
    (tmp_path / "good.jpg").write_bytes(encoded(picture(1, 50, 50), "JPEG"))
    faults["bad-middle.png"] = "does not decode"
    good, files = DiskFile(str(tmp_path / "good.jpg")), [DiskFile(str(tmp_path / name)) for name in faults]
    seen = []
    for name in ("torchvision", "dali"):
        decode = decoder_of(name, 32, resize)
        with pytest.raises(BadFiles) as error:
            decode([good, *files, good])
        assert isinstance(error.value, DataError)
        assert sorted(error.value.faults) == list(range(1, len(files) + 1))
        for position, (file, fault) in enumerate(zip(files, faults.values(), strict=True), start=1):
            message = error.value.faults[position]
            assert message.startswith(f"{file.name} ") and fault in message and message in str(error.value)
        # it goes on as if nothing had been
        expected = plainly(good.read(), 32, resize=resize)
        assert torch.equal(decode([good, good]), torch.stack([expected, expected]))
        seen.append(error.value.faults)
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all kinds of files, which are resized, with a few to validate."""
    root = tmp_path_factory.mktemp("folder")
    every_kind(root / "train", [(178, 218), (45, 37), (97, 131)])
    pictures.write_pictures(root / "valid", 5, width=37, height=46)
    pictures.write_pictures(root / "test", 5, first=5, width=37, height=46)
    return root


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's layout; all kinds of files, cropped, at CelebA's size and at odd ones."""
    root = tmp_path_factory.mktemp("celeba")
    contents = every_kind(root / "all", [(178, 218), (45, 37), (179, 219)])
    # the layout has one ending; the bytes are of all kinds
    write_celeba(root, [(f"{i:06}.jpg", data) for i, data in enumerate(contents.values(), start=1)], valid=4)
    return root


def config_of(dataset: str, root: Path, size: int = 32, channels: int = 3) -> DataConfig:
    return DataConfig(dataset=dataset, root=str(root), size=size, channels=channels)  # type: ignore[arg-type]


def expected_of(dataset: str, root: Path, size: int) -> Tensor:
    if dataset == "folder":
        paths = sorted((root / "train").iterdir())
    else:
        paths = sorted((root / "celeba" / "img_align_celeba").iterdir())[:-4]
    return torch.stack([plainly(path.read_bytes(), size, resize=dataset == "folder") for path in paths])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("dataset", "size"), [("folder", 32), ("folder", 37), ("celeba", 32), ("celeba", 37)])
def test_every_cache_has_the_pixels_of_the_oracle(
    dataset: str, size: int, decoder: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any
) -> None:
    root = request.getfixturevalue(dataset)
    expected, data = expected_of(dataset, root, size), config_of(dataset, root, size)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    for cache in CACHES:
        # each is built anew, and then opened a second time
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        for _ in range(2):
            images = open_images(data, "train", loading(decoder, cache))
            batch = everything(images)
            assert batch.dtype == torch.uint8 and torch.equal(batch, expected), cache
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images.batch(order.tolist()), expected[order])
            assert images.batch([7]).shape == (1, 3, size, size)
            with pytest.raises(IndexError):
                images.batch([len(images)])


@pytest.mark.parametrize("cache", CACHES)
def test_a_caller_may_write_to_a_batch(cache: str, folder: Path) -> None:
    images = open_images(config_of("folder", folder), "train", loading("torchvision", cache))
    first = images.batch([0, 1, 2])
    kept = first.clone()
    first.zero_()
    assert torch.equal(images.batch([0, 1, 2]), kept)


@pytest.mark.filterwarnings("ignore:Webp does not support grayscale")
def test_grey_images_are_the_same_for_every_cache(folder: Path) -> None:
    """DALI makes RGB only: who asks for grey gets torchvision."""
    data = config_of("folder", folder, channels=1)
    batches = [everything(open_images(data, "train", loading("auto", cache))) for cache in CACHES]
    assert batches[0].shape[1] == 1
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_train_and_valid_are_opened_together(folder: Path) -> None:
    data = config_of("folder", folder)
    for cache in ("none", "disk"):
        train, valid = open_training(data, loading("auto", cache))
        assert torch.equal(everything(train), expected_of("folder", folder, 32))
        assert torch.equal(everything(valid), everything(open_images(data, "valid")))


def test_parquet_rows_are_the_same_for_every_cache(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    contents = [encoded(picture(seed, 45, 51), kind) for seed in range(9) for kind in ("PNG", "JPEG")]
    rows = [{"bytes": data, "path": ""} for data in contents]
    pyarrow.parquet.write_table(pa.table({"image": rows}), tmp_path / "train-00000-of-00001.parquet", row_group_size=4)
    expected = torch.stack([plainly(data, 32, resize=False) for data in contents])
    for cache in CACHES:
        for decoder in ("torchvision", "auto"):
            images = open_images(config_of("celeba", tmp_path), "train", loading(decoder, cache))
            assert torch.equal(everything(images), expected)


def batches_of(images: Images, steps: range, batch_size: int = 12, **more: int) -> list[Tensor]:
    options = {"batch_size": batch_size, "seed": 5, "device": "cpu"} | more
    with Feed(images, start_step=steps.start, stop_step=steps.stop, **options) as feed:  # type: ignore[arg-type]
        return [batch.clone() for batch in feed]


def test_a_feed_goes_on_with_another_decoder_and_cache(folder: Path) -> None:
    data = config_of("folder", folder)
    whole = open_images(data, "train", loading("torchvision", "none"))
    per_epoch = len(whole) // 12
    assert per_epoch > 3
    expected = batches_of(whole, range(2 * per_epoch + 2))
    assert not torch.equal(expected[0], expected[per_epoch])
    for decoder in DECODERS:
        for cache in CACHES:
            images = open_images(data, "train", loading(decoder, cache))
            # in mid-epoch, before and at an epoch's end, and behind it
            for start in (0, 3, per_epoch - 1, per_epoch, per_epoch + 1):
                batches = batches_of(images, range(start, start + 3))
                assert all(map(torch.equal, batches, expected[start : start + 3])), (decoder, cache, start)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_ranks_share_the_global_batch(cache: str, world_size: int, folder: Path) -> None:
    data, steps = config_of("folder", folder), range(5, 10)
    alone = batches_of(open_images(data, "train", loading("torchvision", "none")), steps)
    # each rank opens the images for itself
    ranks = [
        batches_of(open_images(data, "train", loading("auto", cache)), steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        shares = [rank[step] for rank in ranks]
        assert all(len(share) == 12 // world_size for share in shares)
        assert torch.equal(torch.cat(shares), batch)
        assert len(torch.cat(shares).flatten(1).unique(dim=0)) == 12
