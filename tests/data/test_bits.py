"""Images of 16 bits: every value reaches the step, from every cache, and what cannot be kept is refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torchvision.transforms.v2 import functional as F

from fastle.config import ConfigError, DataConfig
from fastle.data import BadFiles, Feed, Loading, open_images, open_training
from fastle.data.bits import unit
from fastle.data.cache import cache_folder
from fastle.data.decode import TorchvisionDecoder
from fastle.data.given import GivenImages
from fastle.errors import DataError
from fastle.presets import make_config
from tests.data.caches import everything, loading
from tests.data.pictures import Memory, encoded, picture, png, sixteen, write_pictures

SIDE = 256
# every value of 16 bits, once in each channel
RAMP = np.stack([np.arange(65536, dtype=np.uint16).reshape(SIDE, SIDE)] * 3, -1)
RAMP[..., 1], RAMP[..., 2] = RAMP[..., 0].T, RAMP[::-1, :, 0]
GREY = RAMP[..., 0]
EXPECTED = torch.from_numpy(RAMP.astype(np.float32) / np.float32(65535)).permute(2, 0, 1)

pytestmark = pytest.mark.usefixtures("cache_home")


def tiff(pixels: bytes, width: int, height: int, *, bits: int, samples: int) -> bytes:
    """A TIFF as Pillow cannot write it: uncompressed, in one strip, grey or RGB."""
    depths = struct.pack("<3H", bits, bits, bits)
    ends = 8 + len(depths)
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, samples, bits if samples == 1 else 8), (259, 3, 1, 1),
        (262, 3, 1, 1 if samples == 1 else 2), (273, 4, 1, ends), (277, 3, 1, samples), (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", ends + len(pixels)) + depths + pixels + directory


def big_endian(grey: NDArray[np.uint16]) -> Image.Image:
    return Image.frombytes("I;16B", grey.shape[::-1], grey.astype(">u2").tobytes())


DEEP_GREY = {
    "a.png": png(GREY[..., None], colour=0),
    "alpha.png": png(np.stack([GREY, GREY[::-1]], -1), colour=4),
    "interlaced.png": png(GREY[..., None], colour=0, interlaced=True),
    "b.tif": encoded(Image.fromarray(GREY), "TIFF"),
    "big.tif": encoded(big_endian(GREY), "TIFF"),
    "packed.tif": encoded(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
    "white-is-zero.tif": encoded(Image.fromarray(65535 - GREY), "TIFF", tiffinfo={262: 0}),
}
DEEP_RGB = {"a.png": png(RAMP, colour=2), "alpha.png": png(np.concatenate([RAMP, RAMP[..., :1]], -1), colour=6)}
DEEP_COLOUR_TIFF = tiff(RAMP[:32, :32].tobytes(), 32, 32, bits=16, samples=3)


def deep_avif() -> bytes:
    """An AVIF whose header says that it has 10 bits."""
    data = bytearray(encoded(picture(0, 32, 32), "AVIF", speed=10))
    data[data.index(b"av1C") + 6] |= 0x40
    # behind version, flags and number of channels
    depths = data.index(b"pixi") + 9
    data[depths : depths + 3] = bytes([10] * 3)
    return bytes(data)


def write(root: Path, contents: dict[str, bytes]) -> Path:
    for split in ("train", "valid", "test"):
        (root / split).mkdir(parents=True)
        for name, data in contents.items():
            (root / split / name).write_bytes(data)
    return root


def config(root: Path, channels: int, size: int = SIDE, bits: int = 16, **more: object) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), size=size, channels=channels, bits=bits, **more)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error:Corrupt")
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("cache", ["none", "disk", "host"])
def test_every_value_reaches_the_step(cache: str, channels: int, tmp_path: Path) -> None:
    contents = DEEP_GREY if channels == 1 else DEEP_RGB
    images, _, _ = open_training(config(write(tmp_path / "deep", contents), channels), loading("torchvision", cache))
    count = len(contents)
    with Feed(images, batch_size=count, seed=0, device="cpu", stop_step=2) as feed:
        batches = list(feed)
    assert [batch.dtype for batch in batches] == [torch.float32] * 2
    for batch in batches:
        assert torch.equal(batch, EXPECTED[:channels].expand(count, -1, -1, -1))


def test_grey_files_become_colour_and_colour_grey_with_all_their_bits() -> None:
    (grey,) = TorchvisionDecoder(SIDE, 1, resize=False, bits=16)([Memory("", DEEP_RGB["a.png"])])
    # libpng's weights are these to a few parts in ten thousand
    luma = RAMP @ np.array([0.299, 0.587, 0.114])
    assert grey.dtype == torch.uint16 and np.abs(grey[0].numpy() - luma).max() < 30
    for data in DEEP_GREY.values():
        (colour,) = TorchvisionDecoder(SIDE, 3, resize=False, bits=16)([Memory("", data)])
        assert torch.equal(unit(colour), EXPECTED[:1].expand(3, -1, -1))


def twelve_bits(values: NDArray[np.uint32]) -> bytes:
    """A grey TIFF of 12 bits, of 64x64 pixels."""
    pairs = values.reshape(-1, 2)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    return tiff(packed, 64, 64, bits=12, samples=1)


def test_twelve_bits_fill_sixteen() -> None:
    values = np.arange(4096, dtype=np.uint32).reshape(64, 64)
    file = Memory("", twelve_bits(values))
    (deep,) = TorchvisionDecoder(64, 1, resize=False, bits=16)([file])
    assert np.abs(deep[0].numpy() - values * (65535 / 4095)).max() < 1 and deep.numpy().max() == 65535
    (plain,) = TorchvisionDecoder(64, 1, resize=False)([file])
    assert np.array_equal(plain[0].numpy(), values >> 4)


def test_files_of_8_bits_are_their_values_as_floats(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split, 4, first=0)
        (tmp_path / split / "photograph.jpg").write_bytes(encoded(picture(9, 40, 40), "JPEG"))
        (tmp_path / split / "scan.bmp").write_bytes(encoded(picture(8, 40, 40), "BMP"))
    cropped = TorchvisionDecoder(24, 3, resize=False), TorchvisionDecoder(24, 3, resize=False, bits=16)
    files = [Memory(path.name, path.read_bytes()) for path in sorted((tmp_path / "train").iterdir())]
    eight, sixteen = (decoder(files) for decoder in cropped)
    assert torch.equal(unit(sixteen), eight.float() / 255)


def test_resizing_keeps_the_bits() -> None:
    values = sixteen(picture(3, 90, 70))
    (ours,) = TorchvisionDecoder(32, 3, resize=True, bits=16)([Memory("", png(values, colour=2))])
    whole = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)
    expected = F.center_crop(F.resize(whole, [32, 41], antialias=True), [32, 32])
    assert float((ours.double() - expected).abs().max()) <= 0.52


def test_the_cache_of_16_bits_is_another_file_twice_as_large(tmp_path: Path) -> None:
    root = write(tmp_path / "deep", DEEP_GREY)
    said: dict[int, list[str]] = {8: [], 16: []}
    for bits, messages in said.items():
        images = open_images(config(root, 1, bits=bits), "train", loading("torchvision", "disk", messages))
        expected = EXPECTED[:1] if bits == 16 else torch.from_numpy((GREY >> 8).astype(np.uint8))[None]
        assert torch.equal(everything(images), expected.expand(7, -1, -1, -1))
    first, second = sorted(cache_folder().glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with safe_open(second, framework="pt") as file:
        assert file.get_tensor("images").dtype == torch.uint16
    # the header, the same in both, is small
    assert 1.9 < second.stat().st_size / first.stat().st_size < 2.1
    assert "in 16 bits read from disk" in " ".join(said[16]) and "bits read" not in " ".join(said[8])
    remark = "decoder: of 7 images with more than 8 bits, "
    assert f"{remark}the upper 8 are kept; a run with --bits 16 keeps all" in said[8]
    assert f"{remark}all bits are kept" in said[16]
    # what is there is taken, and nothing is decoded again
    messages = []
    open_images(config(root, 1), "train", loading("torchvision", "host", messages))
    assert any("in 16 bits in memory" in message and "reused" in message for message in messages)


def test_a_damaged_cache_of_16_bits_is_built_again(tmp_path: Path) -> None:
    root = write(tmp_path / "deep", DEEP_GREY)
    open_images(config(root, 1), "train", loading("torchvision", "disk"))
    (path,) = cache_folder().glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[4096 + 70_000] ^= 1
    path.write_bytes(content)
    messages: list[str] = []
    images = open_images(config(root, 1), "train", loading("torchvision", "disk", messages))
    assert "damaged (block 0): building it again" in "\n".join(messages)
    assert torch.equal(everything(images), EXPECTED[:1].expand(7, -1, -1, -1))


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_what_pillow_reduces_to_8_bits_is_refused(cache: str, tmp_path: Path) -> None:
    root = write(tmp_path / "deep", {"a.tif": DEEP_COLOUR_TIFF, "b.avif": deep_avif(), "c.png": DEEP_RGB["a.png"]})
    fault = "with more than 8 bits, of which Pillow keeps the upper 8: save it as a PNG of 16 bits"
    with pytest.raises(BadFiles) as error:
        open_training(config(root, 3, 32), loading("torchvision", cache))
    assert f"{root}/train/a.tif is a colour TIFF {fault}\n" in str(error.value)
    assert f"{root}/valid/b.avif is an AVIF {fault}" in str(error.value) and len(error.value.faults) == 4
    images, _, _ = open_training(config(root, 3, 32, bad_images="skip"), loading("torchvision", cache))
    assert len(images) == 1
    # with 8 bits, it is said that there were more
    messages: list[str] = []
    (root / "train" / "b.avif").unlink()
    open_images(config(root, 3, 32, bits=8), "train", loading("torchvision", cache, messages))
    remark = (
        "decoder: of 2 images with more than 8 bits, the upper 8 are kept; a run with --bits 16 keeps all of 1 and "
    )
    assert f"{remark}refuses 1: save these as PNG of 16 bits" in messages


def test_dali_decodes_no_16_bits(tmp_path: Path) -> None:
    root = write(tmp_path / "deep", DEEP_RGB)
    for decoder in ("dali", "dali-gpu"):
        with pytest.raises(DataError, match=f"--decoder {decoder} decodes 8 bits only; use --decoder torchvision"):
            open_images(config(root, 3), "train", Loading(decoder=decoder))
    messages: list[str] = []
    open_images(config(root, 3), "train", loading("auto", "none", messages))
    assert "decoder: torchvision, because DALI decodes 8 bits only" in messages


def test_only_folders_have_16_bits() -> None:
    assert make_config("folder", bits=16).data.bits == 16 and make_config("folder").data.bits == 8
    for dataset in ("shapes", "cifar10", "celeba"):
        with pytest.raises(ConfigError, match=f"--bits 16 has no effect with {dataset}, whose images have 8"):
            make_config(dataset, bits=16)
    with pytest.raises(ConfigError, match="--bits must be one of 8, 16, not 12"):
        make_config("folder", bits=12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_cache_on_the_gpu_gives_the_same_bits(tmp_path: Path) -> None:
    root, gpu = write(tmp_path / "deep", DEEP_RGB), torch.device("cuda")
    images = open_images(config(root, 3), "train", Loading(cache="device", device=gpu))
    batch = images.batch([1, 0])
    assert batch.device.type == "cuda" and torch.equal(batch.cpu(), EXPECTED.expand(2, -1, -1, -1))


def test_images_given_in_python_keep_their_bits() -> None:
    for item, expected in (
        (EXPECTED, EXPECTED),
        (EXPECTED.double() * 0.3, EXPECTED.double().mul(0.3).float()),
        (torch.from_numpy(RAMP).permute(2, 0, 1), EXPECTED),
        (GREY, EXPECTED[:1].expand(3, -1, -1)),
        (GREY.astype(">u2"), EXPECTED[:1].expand(3, -1, -1)),
        (Image.fromarray(GREY), EXPECTED[:1].expand(3, -1, -1)),
        (big_endian(GREY), EXPECTED[:1].expand(3, -1, -1)),
        (torch.from_numpy((RAMP >> 8).astype(np.uint8)).permute(2, 0, 1), torch.floor(EXPECTED * 65535 / 256) / 255),
    ):
        (image,) = GivenImages([item], np.arange(1), size=SIDE, channels=3, bits=16).batch([0])
        assert torch.equal(image, expected)
    (small,) = GivenImages([EXPECTED], np.arange(1), size=24, channels=1, bits=16).batch([0])
    assert small.dtype == torch.float32 and small.shape == (1, 24, 24) and 0 <= small.min() <= small.max() <= 1
    # Pillow's images of files are read as the files are
    twelve = twelve_bits(np.arange(4096, dtype=np.uint32).reshape(64, 64))
    for data, side in ((DEEP_GREY["white-is-zero.tif"], SIDE), (twelve, 64)):
        (given,) = GivenImages([Image.open(io.BytesIO(data))], np.arange(1), size=side, channels=1, bits=16).batch([0])
        (of_file,) = TorchvisionDecoder(side, 1, resize=False, bits=16)([Memory("", data)])
        assert torch.equal(given, unit(of_file))
    for deep in (torch.from_numpy(GREY), Image.fromarray(GREY)):
        with pytest.raises(DataError, match="image 0 has values of 16 bits: give bits=16, or uint8"):
            GivenImages([deep], np.arange(1), size=SIDE, channels=3).batch([0])
