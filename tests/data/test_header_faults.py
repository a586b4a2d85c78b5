"""What a header tells of files that are no images, or cut short: by their kinds, in words of one line."""

from __future__ import annotations

import pytest
from PIL import Image

from fastle.data.header import MAX_PIXELS, looks_complete, read_header
from tests.data import pictures
from tests.data.pictures import FOREIGN, GOOD, NOT_AN_IMAGE, bomb, encoded, picture


def format_of(kind: str) -> str:
    return {"jpeg": "JPEG", "png": "PNG", "webp": "WebP"}[kind.partition("-")[0]]


@pytest.mark.parametrize(("width", "height"), [(178, 218), (37, 16), (1, 1), (300, 9)])
def test_a_header_tells_the_kind_and_the_size(width: int, height: int) -> None:
    for kind, encode in GOOD.items():
        header = read_header(encode(picture(3, width, height)))
        assert (header.kind, header.width, header.height) == (format_of(kind), width, height), kind
        # of a progressive one, codecs differ in what they make of scans that are missing
        if kind != "jpeg-progressive":
            assert header.plain == (kind not in ("jpeg-cmyk", "png-grey-16", "png-16")), kind


def test_large_webp_and_jpeg_sizes_are_read_whole() -> None:
    for kind in ("JPEG", "WEBP"):
        header = read_header(encoded(Image.new("RGB", (16383, 3)), kind))
        assert (header.width, header.height) == (16383, 3)


def download_fault(data: bytes) -> str:
    with pytest.raises(ValueError, match=r"^is ") as error:
        read_header(data)
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_an_image_is_called_by_its_name() -> None:
    assert download_fault(b"") == "is empty"
    assert download_fault(b" <html>quota</html>").startswith("is an HTML page")
    assert download_fault(FOREIGN["gif"](picture(0, 9, 9))) == "is a GIF, not a JPEG, PNG or WebP image"
    for encode in FOREIGN.values():
        assert NOT_AN_IMAGE in download_fault(encode(picture(0, 9, 9)))
    for data in (b"no image at all", b"\0" * 500, b"RIFF\x10\0\0\0WAVEfmt ", b"\x89PNG in name only"):
        assert NOT_AN_IMAGE in download_fault(data)


@pytest.mark.parametrize("kind", GOOD)
def test_any_cut_through_a_header_is_a_fault_and_not_an_accident(kind: str) -> None:
    data = GOOD[kind](picture(0, 20, 20))
    for length in range(1, len(data), max(1, len(data) // 400)):
        told = attempt(data[:length])
        assert told in ("20x20", "is truncated") or NOT_AN_IMAGE in told, length


def attempt(data: bytes) -> str:
    """The size, or the fault; another exception is an accident."""
    try:
        header = read_header(data)
    except ValueError as error:
        return str(error) if type(error) is ValueError else repr(error)
    return f"{header.width}x{header.height}"


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_that_is_cut_short_does_not_look_whole(kind: str) -> None:
    data = GOOD[kind](picture(0, 60, 60))
    whole = looks_complete(data[:4096], data[-4096:], len(data))
    assert isinstance(whole, bool)
    # a doubt costs a decoding, and is allowed where bytes follow the image
    assert whole or "trailing" in kind
    for length in (len(data) // 3, len(data) // 2, len(data) - 41, len(data) - 40 * ("trailing" in kind) - 1):
        cut = data[:length]
        assert not looks_complete(cut[:4096], cut[-4096:], len(cut)), length


def test_the_limit_is_a_hundred_megapixels() -> None:
    assert MAX_PIXELS == 100_000_000
    header = read_header(bomb(10_000, 10_000))
    assert header.width * header.height == MAX_PIXELS
    assert download_fault(bomb()) == "is 12000x12000, more than 100 megapixels: refused as a decompression bomb"
    assert "decompression bomb" in download_fault(bomb(100_001, 1000))
    # sizes that overflow whoever multiplies 32-bit numbers
    for width, height in ((2**31 - 1, 2**31 - 1), (65_536, 65_536)):
        header_chunk = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
        data = pictures.SIGNATURE + pictures.chunk(b"IHDR", header_chunk) + pictures.chunk(b"IDAT", b"x")
        assert f"is {width}x{height}, more than 100 megapixels" in download_fault(data)
