"""The decoders: their pixels are those of torchvision's own functions and of Pillow, and they name every bad file."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor

from fastle.config import Size, sides_of
from fastle.data.decode import BadFiles, Decoder, DiskFile, TorchvisionDecoder
from fastle.errors import DataError
from tests.data import pictures
from tests.data.pictures import BY_PILLOW, GOOD, Memory, animated, decoder_of, encoded, half, oracle, picture

Write = Callable[[bytes, str], DiskFile]
Encode = Callable[[Image.Image], bytes]
DECODERS = ("torchvision", "dali")
each_decoder = pytest.mark.parametrize("name", DECODERS)
crop_and_resize = pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
# CelebA's size, then odd and even margins in every combination, and none: croppers round differently there
SIZES: list[tuple[int, int, Size]] = [
    (178, 218, 128),
    (179, 219, 128),
    (97, 130, 32),
    (98, 131, (64, 40)),
    (37, 50, 37),
    (300, 101, (40, 96)),
]
# valid files that DALI would decode differently or reject, and that it must leave to torchvision
ODD: dict[str, Encode] = {
    "jpeg-followed": lambda image: encoded(image, "JPEG") + b"more",
    "jpeg-cut-and-ended": lambda image: encoded(image, "JPEG")[:-300] + b"\xff\xd9",
    "png-palette-alpha": lambda image: encoded(image.quantize(99), "PNG", transparency=bytes(range(0, 250, 5))),
    "png-turned": lambda image: pictures.turned(image, "PNG"),
    "png-profile": lambda image: encoded(image, "PNG", icc_profile=b"no profile", dpi=(3, 3)),
    "png-without-end": lambda image: encoded(image, "PNG")[:-12],
}


@crop_and_resize
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_every_decoder_has_the_pixels_of_the_oracle(width: int, height: int, size: Size, resize: bool) -> None:
    kinds = GOOD | ODD
    data = [encode(picture(seed, width, height)) for seed, encode in enumerate(kinds.values())]
    expected = [oracle(content, size, resize=resize) for content in data]
    for name in DECODERS:
        # no file has the extension of its format
        batch = decoder_of(name, size, resize=resize)([Memory("photo.gif", content) for content in data])
        assert batch.dtype == torch.uint8 and batch.shape == (len(kinds), 3, *sides_of(size))
        assert batch.is_contiguous(memory_format=torch.channels_last)
        wrong = [kind for kind, ours, right in zip(kinds, batch, expected, strict=True) if not torch.equal(ours, right)]
        assert wrong == [], name


@crop_and_resize
@each_decoder
def test_pillow_decodes_what_torchvision_cannot(name: str, resize: bool) -> None:
    contents = [encode(picture(seed, 53, 40)) for seed, encode in enumerate(BY_PILLOW.values())]
    # among others, within one batch
    contents.append(encoded(picture(0, 53, 40), "JPEG"))
    batch = decoder_of(name, 32, resize=resize)([Memory("photo.jpg", content) for content in contents])
    for kind, content, ours in zip([*BY_PILLOW, "jpeg"], contents, batch, strict=True):
        assert torch.equal(ours, oracle(content, 32, resize=resize)), kind


@pytest.mark.filterwarnings("ignore:Webp does not support grayscale")
@pytest.mark.parametrize("channels", [3, 1], ids=["rgb", "grey"])
def test_every_kind_of_file_decodes_as_in_pillow(channels: int) -> None:
    kinds = GOOD | BY_PILLOW
    for kind in set(kinds) - {"png-grey-16", "png-16", "png-gamma"}:
        data = kinds[kind](picture(1, 40, 40))
        image = Image.open(io.BytesIO(data))
        if channels == 1:
            # the grey of a JPEG is the luma it holds
            image.draft("L", image.size)
        reference = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L"))
        (ours,) = TorchvisionDecoder(40, channels, resize=False)([Memory(kind, data)])
        if kind in ("tiff-lzw", "tiff-pages", "bmp", "webp-animated") and channels == 3:
            assert torch.equal(ours, pil_to_tensor(picture(1, 40, 40))), kind
        # the two round the weights of luma differently, and bring their own codecs
        assert ours.shape == reference.shape and (ours.int() - reference.int()).abs().max() <= 2, kind


def exif_behind_pixels(image: Image.Image, orientation: int) -> bytes:
    data = pictures.turned(image, "PNG", orientation)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    return data[:start] + data[end:-12] + data[start:end] + data[-12:]


TURNED: dict[str, Callable[[Image.Image, int], bytes]] = {
    "jpeg": lambda image, orientation: pictures.turned(image, "JPEG", orientation),
    "png": lambda image, orientation: pictures.turned(image, "PNG", orientation),
    "png-behind": exif_behind_pixels,
    "webp": lambda image, orientation: pictures.turned(image, "WEBP", orientation, lossless=True),
    "webp-animated": lambda image, orientation: pictures.turned(
        image, "WEBP", orientation, lossless=True, save_all=True, append_images=[image.rotate(90)]
    ),
    "tiff": lambda image, orientation: pictures.turned(image, "TIFF", orientation),
    "avif": lambda image, orientation: pictures.turned(image, "AVIF", orientation, speed=10),
}


@crop_and_resize
@each_decoder
def test_exif_orientation_is_applied_as_in_pillow(name: str, resize: bool) -> None:
    """Bit for bit, as if the file held the image upright; the margins are odd, and the sides differ."""
    # 9 asks for nothing
    cases = [(kind, orientation) for kind in TURNED for orientation in range(1, 10)]
    image = picture(4, 53, 40)
    contents = [TURNED[kind](image, orientation) for kind, orientation in cases]
    batch = decoder_of(name, 32, resize=resize)([Memory("", content) for content in contents])
    for case, content, ours in zip(cases, contents, batch, strict=True):
        upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"), "PNG")
        assert torch.equal(ours, oracle(upright, 32, resize=resize)), case


@pytest.mark.parametrize("channels", [3, 1], ids=["rgb", "grey"])
def test_of_16_bits_the_upper_8_are_kept(channels: int) -> None:
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    white_is_zero = encoded(Image.fromarray(65535 - values), "TIFF", tiffinfo={262: 0})
    contents = {
        "png": encoded(Image.fromarray(values), "PNG"),
        "tiff": encoded(Image.fromarray(values), "TIFF"),
        "tiff-big-endian": encoded(Image.frombytes("I;16B", (32, 32), values.astype(">u2").tobytes()), "TIFF"),
        "tiff-white-is-zero": white_is_zero,
    }
    images = TorchvisionDecoder(32, channels, resize=False)([Memory(kind, data) for kind, data in contents.items()])
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(channels, -1, -1)
    assert [kind for kind, image in zip(contents, images, strict=True) if not torch.equal(image, expected)] == []


@pytest.mark.parametrize(("width", "height"), [(97, 64), (40, 33), (200, 300), (45, 32)])
def test_the_shorter_side_is_resized_as_in_pillow(width: int, height: int) -> None:
    image, scale = picture(3, width, height), 32 / min(width, height)
    small = image.resize((max(32, int(width * scale)), max(32, int(height * scale))), Image.Resampling.BILINEAR)
    (ours,) = TorchvisionDecoder(32, 3, resize=True)([Memory("", encoded(image, "PNG"))])
    difference = (ours.int() - pil_to_tensor(CenterCrop(32)(small)).int()).abs().max()
    # an image of the right size is only cropped
    assert difference <= (1 if scale < 1 else 0)


@crop_and_resize
@each_decoder
def test_no_decoder_enlarges_or_pads(name: str, resize: bool) -> None:
    for width, height, size in ((40, 31, 32), (31, 40, 32), (16, 21, 64)):
        data = [encode(picture(0, width, height)) for encode in GOOD.values()]
        good = Memory("good.png", encoded(picture(0, size, size), "PNG"))
        with pytest.raises(BadFiles) as error:
            decoder_of(name, size, resize=resize)([good, *(Memory("small", content) for content in data), good])
        sizes = [f"{height}x{width}" if "turned" in kind else f"{width}x{height}" for kind in GOOD]
        # images that are only cropped cannot be enlarged either
        hint = "; a run with --upscale enlarges such images" if resize else ""
        faults = [f"small is {shown}, smaller than the {size}x{size} asked for{hint}" for shown in sizes]
        assert error.value.faults == dict(enumerate(faults, 1))


@each_decoder
def test_threads_and_batches_change_nothing(name: str) -> None:
    data = [encode(picture(0, *size)) for size in ((45, 51), (64, 37)) for encode in GOOD.values()]
    files = [Memory("", content) for content in data]
    expected = torch.stack([oracle(content, 32, resize=False) for content in data])
    for threads in (1, 5):
        decode = decoder_of(name, 32, resize=False, threads=threads)
        # batches that grow and shrink, and a single image
        for sizes in ([7, 20, 3, len(files) - 30], [1, len(files) - 1]):
            batches = [decode(list(part)) for part in np.split(np.array(files, object), np.cumsum(sizes)[:-1])]
            assert torch.equal(torch.cat(batches), expected)
        assert torch.equal(decode(files[::-1]), expected.flip(0))
        assert torch.equal(decode([files[3]] * 4), expected[3].expand(4, -1, -1, -1))


@crop_and_resize
@each_decoder
def test_a_batch_is_never_overwritten(name: str, resize: bool) -> None:
    decode = decoder_of(name, 16, resize=resize)
    files = [Memory(str(seed), encoded(picture(seed, 20, 24), "JPEG")) for seed in range(24)]
    expected = torch.stack([oracle(file.read(), 16, resize=resize) for file in files])
    batches = [decode(files[start : start + 3]) for start in range(0, 24, 3)]
    # writing to a batch does not change what the decoder returns next
    decode(files[:3]).zero_()
    assert torch.equal(decode(files[:3]), expected[:3])
    del decode
    assert torch.equal(torch.cat(batches), expected)


def flipped(data: bytes, at: int = 0) -> bytes:
    at = at or len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


NOT_AN_IMAGE = pictures.NOT_AN_IMAGE
BAD: dict[str, tuple[Encode, str]] = {
    "empty": (lambda image: b"", "is empty"),
    "html": (lambda image: b"\n<!DOCTYPE html><html>Quota exceeded</html>", "is an HTML page: "),
    "text": (lambda image: b"no image at all", "is not an image that fastle decodes"),
    "jpeg-cut": (lambda image: half(encoded(image, "JPEG")), "does not decode: Image is incomplete or truncated"),
    # below the crop, which a decoder of the crop alone need not read
    "jpeg-cut-below": (lambda image: encoded(image, "JPEG")[:-300], "does not decode: Image is incomplete"),
    "jpeg-header": (lambda image: encoded(image, "JPEG")[:4], "is truncated"),
    "progressive-cut": (lambda image: half(encoded(image, "JPEG", progressive=True)), "does not decode: "),
    "png-cut": (lambda image: half(encoded(image, "PNG")), "is truncated"),
    # brings torchvision's own decoder down
    "png-damaged": (lambda image: flipped(encoded(image, "PNG")), "does not decode: "),
    "webp-cut": (lambda image: half(encoded(image, "WEBP")), "does not decode: "),
    "webp-damaged": (lambda image: flipped(encoded(image, "WEBP"), 25), "does not decode: "),
    "animated-png": (lambda image: animated(image, "PNG"), "is an animation, not one image"),
    "psd": (pictures.UNSUPPORTED["psd"], f"is a Photoshop file, {NOT_AN_IMAGE}"),
    "raw": (pictures.UNSUPPORTED["dng"], f"is a raw photograph, {NOT_AN_IMAGE}"),
    "tiff-floats": (
        lambda image: encoded(image.convert("F"), "TIFF"),
        "has samples of 32 bits, or with a sign: save it",
    ),
    "tiff-header": (lambda image: encoded(image, "TIFF")[:6], "does not decode: the header of the TIFF is damaged"),
    "gif-header": (
        lambda image: encoded(image.convert("L"), "GIF")[:9],
        "does not decode: the header of the GIF is damaged",
    ),
    "bmp-header": (lambda image: encoded(image, "BMP")[:20], "does not decode: "),
    "tiff-cut": (lambda image: half(encoded(image, "TIFF")), "does not decode: image file is truncated"),
    "bmp-cut": (lambda image: half(encoded(image, "BMP")), "does not decode: image file is truncated"),
    "gif-cut": (lambda image: half(encoded(image.convert("L"), "GIF")), "does not decode: image file is truncated"),
    "avif-cut": (lambda image: half(BY_PILLOW["avif"](image)), "does not decode: "),
    "webp-animated-cut": (lambda image: half(BY_PILLOW["webp-animated"](image)), "does not decode: "),
    "bomb-tiff": (
        lambda image: pictures.bomb(kind="TIFF", compression="group4"),
        "is 12000x12000, more than 100 megapixels",
    ),
    "small": (lambda image: encoded(image.resize((20, 20)), "JPEG"), "is 20x20, smaller than the 128x128 asked for"),
    "bomb": (lambda image: pictures.bomb(), "is 12000x12000, more than 100 megapixels"),
}


@crop_and_resize
@each_decoder
def test_every_bad_file_of_a_call_is_named_in_order(name: str, resize: bool, tmp_path: Path, write: Write) -> None:
    good = write(encoded(picture(5), "JPEG"), "good.jpg")
    bad = {write(spoil(picture(5)), f"{kind}.jpg"): fault for kind, (spoil, fault) in BAD.items()}
    bad[DiskFile(str(tmp_path / "missing.jpg"))] = "cannot be read: No such file or directory"
    bad[DiskFile(str(tmp_path))] = "cannot be read: Is a directory"
    files = [file for pair in zip([good] * len(bad), bad, strict=True) for file in pair]
    decode = decoder_of(name, 128, resize=resize)
    with pytest.raises(BadFiles) as error:
        decode(files)
    faults, message = error.value.faults, str(error.value)
    assert list(faults) == list(range(1, len(files), 2))
    for fault, (file, begin) in zip(faults.values(), bad.items(), strict=True):
        assert fault.startswith(f"{file.name} {begin}") and "\n" not in fault
    assert message == "\n  ".join([f"{len(bad)} images cannot be used:", *faults.values()])
    assert not re.search(r"\.cpp|Traceback|BytesIO", message)
    # each alone, because one bad file is enough to leave a whole batch to torchvision
    for position, fault in faults.items():
        with pytest.raises(BadFiles) as alone:
            decode([good, files[position]])
        assert alone.value.faults == {1: fault}
    # torchvision names them in the same words, and the decoder still works
    if name == "dali":
        with pytest.raises(BadFiles) as same:
            decoder_of("torchvision", 128, resize=resize)(files)
        assert same.value.faults == faults
    assert torch.equal(decode([good])[0], oracle(good.read(), 128, resize=resize))


@each_decoder
def test_a_heic_without_its_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bad file, which --bad-images skip would leave out: nothing is wrong with it."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    good = Memory("good.png", encoded(picture(0, 20, 20), "PNG"))
    with pytest.raises(DataError) as error:
        decoder_of(name, 16, resize=True)([good, Memory("a.heic", pictures.HEIC), Memory("b.heic", pictures.HEIC)])
    assert not isinstance(error.value, BadFiles)
    assert str(error.value) == 'a.heic is a HEIC, which needs pillow-heif: pip install "fastle[heic]"'


@each_decoder
def test_heic_decodes_as_in_pillow(name: str) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image, exif = picture(1, 53, 40), Image.Exif()
    exif[0x0112] = 6
    # as telephones do, which write the orientation of their sensor twice
    image.info["exif"] = exif.tobytes()
    kinds = [encoded(image, "HEIF", quality=-1, chroma=444), encoded(picture(2, 53, 40).convert("L"), "HEIF")]
    batch = decoder_of(name, 32, resize=True)([Memory("", data) for data in kinds])
    assert torch.equal(batch, torch.stack([oracle(data, 32, resize=True) for data in kinds]))
    turned = oracle(encoded(image.transpose(Image.Transpose.ROTATE_270), "PNG"), 32, resize=True)
    assert (batch[0].int() - turned.int()).abs().float().mean() < 2
    with pytest.raises(BadFiles, match=r"^a.heic does not decode: [^\n]+$"):
        decoder_of(name, 32, resize=True)([Memory("a.heic", half(kinds[0]))])


def test_one_bad_file_is_one_line() -> None:
    assert str(BadFiles({7: "a.jpg is empty"})) == "a.jpg is empty"
    assert str(BadFiles({7: "a.jpg is empty"}, "mend it")) == "a.jpg is empty; mend it"


def other_bytes(seed: int, kind: str) -> bytes:
    """A file with other bytes behind its header; decoders make the best of most of them."""
    data = bytearray(encoded(picture(seed, 70, 90), kind, **({"progressive": seed % 3 == 0} if kind == "JPEG" else {})))
    rng = np.random.default_rng(seed)
    for _ in range(1 + seed % 5):
        data[rng.integers(len(data) * 2 // 3 if seed % 2 else 30, len(data) - 2)] = rng.integers(256)
    return bytes(data)


def stray_marker(seed: int) -> bytes:
    """A JPEG with a marker among its pixels, which some decoders ignore."""
    data = encoded(picture(seed, 70, 90), "JPEG")
    at = int(np.random.default_rng(seed).integers(len(data) * 2 // 3, len(data) - 10))
    return data[:at] + b"\xff" + bytes([(0x87, 0xDA, 0xD9, 0xC4)[seed % 4]]) + data[at:]


def ended_early(seed: int, *, progressive: bool) -> bytes:
    """A JPEG without its last rows or scans, but with a proper end."""
    data = encoded(picture(seed, 70, 90), "JPEG", progressive=progressive)
    return data[: len(data) * (4 + seed % 16) // 20] + b"\xff\xd9"


DAMAGED: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda seed: other_bytes(seed, "JPEG"),
    "webp": lambda seed: other_bytes(seed, "WEBP"),
    "stray-marker": stray_marker,
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
def test_decoders_agree_on_damaged_files(damage: str) -> None:
    """Not every wrong byte can be noticed; whether it is must not depend on the decoder."""
    first, second = (decoder_of(name, 32, resize=False) for name in DECODERS)
    for seed in range(32):
        file = Memory(f"{seed}.jpg", DAMAGED[damage](seed))
        one, other = outcome(first, file), outcome(second, file)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            assert torch.equal(one, other), seed
        else:
            assert isinstance(one, str) and one == other, seed


def test_a_stamp_changes_with_the_file(tmp_path: Path, write: Write) -> None:
    file = write(b"one", "file")
    stamp = file.stamp()
    assert file.stamp() == stamp
    os.utime(file.name, ns=(1, 1))
    touched = file.stamp()
    write(b"four", "file")
    os.utime(file.name, ns=(1, 1))
    assert len({stamp, touched, file.stamp()}) == 3
    with pytest.raises(OSError, match="No such file"):
        DiskFile(str(tmp_path / "missing")).stamp()
