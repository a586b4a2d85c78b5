from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor

from fastle.data.decode import BadFiles, DiskFile, TorchvisionDecoder
from fastle.errors import DataError
from tests.data.pictures import encoded, with_alpha

Picture = Callable[..., Image.Image]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes, str], DiskFile]:
    def write(data: bytes, name: str = "photo.jpg") -> DiskFile:
        path = tmp_path / name
        path.write_bytes(data)
        return DiskFile(str(path))

    return write


Write = Callable[..., DiskFile]

# odd and even margins in every combination: rounding differs between croppers there
MARGINS = [(178, 218, 128), (179, 218, 128), (178, 219, 128), (181, 221, 128), (33, 34, 31), (32, 32, 32), (40, 37, 37)]


@pytest.mark.parametrize(("width", "height", "size"), MARGINS)
def test_a_crop_equals_torchvisions_bit_for_bit(
    width: int, height: int, size: int, picture: Picture, write: Write
) -> None:
    image = picture(0, width, height)
    jpeg = encoded(image, "JPEG", quality=90)
    reference = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode="RGB")
    png = write(encoded(image, "PNG"), "photo.png")
    batch = TorchvisionDecoder(size, 3, resize=False)([write(jpeg), png])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, size, size)
    assert torch.equal(batch[0], CenterCrop(size)(reference))
    assert torch.equal(batch[1], pil_to_tensor(CenterCrop(size)(image)))


def test_a_batch_keeps_the_order_of_its_files(picture: Picture, write: Write) -> None:
    decoder = TorchvisionDecoder(32, 3, resize=False)
    images = [picture(seed, 32, 32) for seed in range(40)]
    files = [write(encoded(image, "PNG"), f"{i}.png") for i, image in enumerate(images)]
    assert torch.equal(decoder(files[::-1]), torch.stack([pil_to_tensor(image) for image in images[::-1]]))


Encode = Callable[[Image.Image], bytes]
FORMATS: dict[str, Encode] = {
    "jpeg": lambda image: encoded(image, "JPEG"),
    "jpeg-progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "jpeg-grey": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg-cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "png": lambda image: encoded(image, "PNG"),
    "png-alpha": lambda image: encoded(with_alpha(image), "PNG"),
    "png-grey": lambda image: encoded(image.convert("L"), "PNG"),
    "png-grey-alpha": lambda image: encoded(with_alpha(image).convert("LA"), "PNG"),
    "png-palette": lambda image: encoded(image.quantize(16), "PNG"),
    "png-palette-transparent": lambda image: encoded(image.quantize(16), "PNG", transparency=0),
    "png-black-and-white": lambda image: encoded(image.convert("1"), "PNG"),
    "webp": lambda image: encoded(image, "WEBP"),
    "webp-alpha": lambda image: encoded(with_alpha(image), "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore:Webp does not support grayscale")
@pytest.mark.parametrize("channels", [3, 1], ids=["rgb", "grey"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_file_decodes_as_pillow_has_it(name: str, channels: int, picture: Picture, write: Write) -> None:
    data = FORMATS[name](picture(1, 40, 40))
    opened = Image.open(io.BytesIO(data))
    if channels == 1:
        # of a JPEG, grey is the luma it holds
        opened.draft("L", opened.size)
    reference = opened.convert("RGB" if channels == 3 else "L")
    # the name says nothing: all are called .jpg
    (image,) = TorchvisionDecoder(40, channels, resize=False)([write(data)])
    assert image.shape == (channels, 40, 40)
    # Pillow and torchvision round the weights of red, green and blue differently, and bring codecs of their own
    assert (image.int() - pil_to_tensor(reference).int()).abs().max() <= 2


@pytest.mark.parametrize("channels", [3, 1], ids=["rgb", "grey"])
def test_sixteen_bits_become_eight(channels: int, write: Write) -> None:
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    (image,) = TorchvisionDecoder(32, channels, resize=False)([write(encoded(Image.fromarray(values), "PNG"))])
    assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).expand(channels, -1, -1))


def test_exif_orientation_is_not_applied(picture: Picture, write: Write) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(2, 40, 40)
    plain, turned = write(encoded(image, "JPEG"), "plain.jpg"), write(encoded(image, "JPEG", exif=exif), "turned.jpg")
    batch = TorchvisionDecoder(40, 3, resize=False)([plain, turned])
    assert torch.equal(batch[0], batch[1])


@pytest.mark.parametrize(("width", "height"), [(97, 64), (64, 97), (97, 131), (40, 33), (32, 50), (300, 200)])
def test_resizing_brings_the_shorter_side_to_the_size(width: int, height: int, picture: Picture, write: Write) -> None:
    image = picture(3, width, height)
    scale = 32 / min(width, height)
    small = image.resize((max(32, int(width * scale)), max(32, int(height * scale))), Image.Resampling.BILINEAR)
    (ours,) = TorchvisionDecoder(32, 3, resize=True)([write(encoded(image, "PNG"))])
    assert (ours.int() - pil_to_tensor(CenterCrop(32)(small)).int()).abs().max() <= 1


def test_a_shorter_side_of_the_right_size_is_only_cropped(picture: Picture, write: Write) -> None:
    image = picture(4, 45, 32)
    (ours,) = TorchvisionDecoder(32, 3, resize=True)([write(encoded(image, "PNG"))])
    assert torch.equal(ours, pil_to_tensor(CenterCrop(32)(image)))


def refusal(decoder: TorchvisionDecoder, file: DiskFile, good: DiskFile) -> str:
    """The one line that a bad file among good ones gets, without the file's name, which it must begin with."""
    with pytest.raises(DataError) as error:
        decoder([good, file, good])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(file.name)
    return message[len(file.name) :].strip()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def moving(image: Image.Image, kind: str) -> bytes:
    return encoded(image, kind, save_all=True, append_images=[image.rotate(90)], duration=100)


def flipped(data: bytes) -> bytes:
    """One bit in the middle is wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


FAULTS: dict[str, tuple[Encode, str]] = {
    "empty": (lambda image: b"", "is empty"),
    "html": (lambda image: b"\n<!DOCTYPE html><html>Quota exceeded</html>", "is an HTML page: "),
    "text": (lambda image: b"no image at all", "is not a JPEG, PNG or WebP image"),
    "truncated-jpeg": (lambda image: half(encoded(image, "JPEG")), "does not decode: Image is incomplete or truncated"),
    "truncated-png": (lambda image: half(encoded(image, "PNG")), "is truncated"),
    "truncated-webp": (lambda image: half(encoded(image, "WEBP")), "does not decode: "),
    # torchvision's decoder brings the process down
    "damaged-png": (lambda image: flipped(encoded(image, "PNG")), "does not decode: "),
    "header-only": (lambda image: encoded(image, "JPEG")[:4], "is truncated"),
    "gif": (lambda image: encoded(image, "GIF"), "is a GIF, not a JPEG, PNG or WebP image"),
    "moving-gif": (lambda image: moving(image, "GIF"), "is a GIF, not a JPEG, PNG or WebP image"),
    "moving-png": (lambda image: moving(image, "PNG"), "is an animation, not one image"),
    "moving-webp": (lambda image: moving(image, "WEBP"), "is an animation, not one image"),
    "bmp": (lambda image: encoded(image, "BMP"), "is a BMP, not a JPEG, PNG or WebP image"),
    "bomb": (lambda image: encoded(Image.new("1", (12_000, 12_000)), "PNG"), "is 12000x12000, more than 100 mega"),
}  # fmt: skip


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_does_not_decode_is_named_with_its_fault(
    name: str, resize: bool, picture: Picture, write: Write
) -> None:
    spoil, fault = FAULTS[name]
    image = picture(5, 40, 40)
    bad, good = write(spoil(image), "bad.jpg"), write(encoded(image, "JPEG"), "good.jpg")
    decoder = TorchvisionDecoder(40, 3, resize)
    message = refusal(decoder, bad, good)
    assert message.startswith(fault)
    assert ".cpp" not in message
    # one bad file does not spoil the decoder
    assert decoder([good]).shape == (1, 3, 40, 40)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, picture: Picture, write: Write) -> None:
    good = write(encoded(picture(6, 40, 40), "JPEG"))
    decoder = TorchvisionDecoder(40, 3, resize=False)
    assert refusal(decoder, DiskFile(str(tmp_path / "gone.jpg")), good) == "cannot be read: No such file or directory"
    assert refusal(decoder, DiskFile(str(tmp_path)), good) == "cannot be read: Is a directory"


def test_every_bad_file_of_a_call_is_listed_in_order(tmp_path: Path, picture: Picture, write: Write) -> None:
    good = write(encoded(picture(6, 40, 40), "JPEG"), "good.jpg")
    small, empty = write(encoded(picture(6, 20, 20), "JPEG"), "small.jpg"), write(b"", "empty.jpg")
    gone = DiskFile(str(tmp_path / "gone.jpg"))
    with pytest.raises(BadFiles) as error:
        TorchvisionDecoder(40, 3, resize=False)([small, good, gone, good, empty])
    lines = [
        f"{small.name} is 20x20, smaller than the 40x40 asked for",
        f"{gone.name} cannot be read: No such file or directory",
        f"{empty.name} is empty",
    ]
    assert error.value.faults == dict(zip((0, 2, 4), lines, strict=True))
    assert list(error.value.faults) == [0, 2, 4]
    assert str(error.value) == "\n  ".join(["3 images cannot be used:", *lines])
    assert isinstance(error.value, DataError)


def test_one_bad_file_is_one_line() -> None:
    assert str(BadFiles({7: "a.jpg is empty"})) == "a.jpg is empty"


def test_a_stamp_changes_with_the_file(tmp_path: Path, write: Write) -> None:
    file = write(b"one")
    stamp = file.stamp()
    assert file.stamp() == stamp
    os.utime(file.name, ns=(1, 1))
    other = file.stamp()
    write(b"four")
    os.utime(file.name, ns=(1, 1))
    assert len({stamp, other, file.stamp()}) == 3
    with pytest.raises(OSError, match="No such file"):
        DiskFile(str(tmp_path / "gone")).stamp()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_decodes_the_same(threads: int, picture: Picture, write: Write) -> None:
    files = [write(encoded(picture(i, 50 + i, 60), "JPEG"), f"{i}.jpg") for i in range(9)]
    expected = TorchvisionDecoder(32, 3, resize=True)(files)
    decoder = TorchvisionDecoder(32, 3, resize=True, threads=threads)
    assert torch.equal(decoder(files), expected)
    assert torch.equal(torch.cat([decoder(files[:4]), decoder(files[4:])]), expected)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def test_the_crop_of_a_batch_is_a_copy(picture: Picture, write: Write) -> None:
    file = write(encoded(picture(8, 40, 40), "PNG"))
    decoder = TorchvisionDecoder(32, 3, resize=False)
    first: Tensor = decoder([file])
    kept = first.clone()
    first.zero_()
    assert torch.equal(decoder([file]), kept)
