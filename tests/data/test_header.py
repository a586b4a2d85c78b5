from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fastle.data.header import Header, check_png, download_fault, looks_complete, read_header, scan_is_clean
from tests.data.pictures import chunk, encoded, with_alpha

Picture = Callable[..., Image.Image]
Encode = Callable[[Image.Image], bytes]


def png(width: int, height: int, raw: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def header_or_fault(data: bytes) -> Header | str:
    try:
        return read_header(data)
    except ValueError as error:
        return str(error)


KINDS: dict[str, tuple[Encode, Header]] = {
    "jpeg": (lambda image: encoded(image, "JPEG"), Header("JPEG", 0, 0, True)),
    "jpeg-444": (lambda image: encoded(image, "JPEG", subsampling=0), Header("JPEG", 0, 0, True)),
    "jpeg-422": (lambda image: encoded(image, "JPEG", subsampling=1), Header("JPEG", 0, 0, True)),
    "jpeg-grey": (lambda image: encoded(image.convert("L"), "JPEG"), Header("JPEG", 0, 0, True)),
    "jpeg-cmyk": (lambda image: encoded(image.convert("CMYK"), "JPEG"), Header("JPEG", 0, 0, False)),
    "jpeg-progressive": (lambda image: encoded(image, "JPEG", progressive=True), Header("JPEG", 0, 0, False)),
    "jpeg-restarts": (lambda image: encoded(image, "JPEG", restart_marker_rows=1), Header("JPEG", 0, 0, True)),
    "png": (lambda image: encoded(image, "PNG"), Header("PNG", 0, 0, True)),
    "png-palette": (lambda image: encoded(image.quantize(16), "PNG", transparency=0), Header("PNG", 0, 0, True)),
    "png-alpha": (lambda image: encoded(with_alpha(image), "PNG"), Header("PNG", 0, 0, True)),
    "png-1": (lambda image: encoded(image.convert("1"), "PNG"), Header("PNG", 0, 0, True)),
    "png-16": (lambda image: encoded(image.convert("L").convert("I;16"), "PNG"), Header("PNG", 0, 0, False)),
    "webp": (lambda image: encoded(image, "WEBP"), Header("WebP", 0, 0, True)),
    "webp-lossless": (lambda image: encoded(image, "WEBP", lossless=True), Header("WebP", 0, 0, True)),
    "webp-alpha": (lambda image: encoded(with_alpha(image), "WEBP"), Header("WebP", 0, 0, True)),
    "webp-profile": (lambda image: encoded(image, "WEBP", icc_profile=b"\x01" * 99), Header("WebP", 0, 0, True)),
}
each_kind = pytest.mark.parametrize("name", KINDS)


@each_kind
@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
def test_kind_and_size_are_pillows(name: str, width: int, height: int) -> None:
    encode, expected = KINDS[name]
    data = encode(Image.new("RGB", (width, height), (200, 90, 30)))
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format or "").lower() == expected.kind.lower()
        assert opened.size == (width, height)
    header = read_header(data)
    assert (header.kind, header.width, header.height) == (expected.kind, width, height)
    assert header.plain == expected.plain
    assert looks_complete(data[:12], data[-64:], len(data))
    assert scan_is_clean(data, header)


@each_kind
def test_a_file_cut_off_does_not_look_whole(name: str, picture: Picture) -> None:
    data = KINDS[name][0](picture(0, 40, 50))
    for size in (12, 64, len(data) // 2, len(data) - 40, len(data) - 1):
        assert not looks_complete(data[:12], data[:size][-64:], size)


@each_kind
def test_a_header_is_read_wherever_the_data_ends_or_is_truncated(name: str, picture: Picture) -> None:
    encode, expected = KINDS[name]
    data = encode(picture(1, 40, 50))
    headers = [header_or_fault(data[:size]) for size in range(12, len(data))]
    first = next(i for i, header in enumerate(headers) if isinstance(header, Header))
    assert set(headers[:first]) <= {"is truncated"}
    sizes = {(h.kind, h.width, h.height) for h in headers[first:] if isinstance(h, Header)}
    assert sizes == {(expected.kind, 40, 50)}
    assert all(isinstance(header, Header) for header in headers[first:])


def test_large_segments_precede_the_frame(picture: Picture) -> None:
    exif = Image.Exif()
    exif[0x010E] = "description " * 5000
    image = picture(2, 61, 47)
    thumbnail = encoded(picture(3, 16, 16), "JPEG")
    data = encoded(image, "JPEG", exif=exif, icc_profile=b"\xff\xd8\xff\xc0" * 50_000, comment=thumbnail)
    assert len(data) > 250_000
    header = read_header(data)
    assert header == Header("JPEG", 61, 47, True, header.scan)
    assert scan_is_clean(data, header)


@pytest.mark.parametrize(
    ("filled", "plain"), [(b"\xff\xff\xff", True), (b"\x00\x12", False), (b"\xff\x01", False), (b"\xff\xd3", False)]
)
def test_what_stands_between_segments(filled: bytes, plain: bool, picture: Picture) -> None:
    data = encoded(picture(4, 30, 20), "JPEG")
    at = data.index(b"\xff\xdb")
    header = read_header(data[:at] + filled + data[at:])
    assert (header.width, header.height, header.plain) == (30, 20, plain)


@pytest.mark.parametrize(
    ("at", "value", "plain"),
    [
        (1, 0xC1, True),
        (1, 0xC3, False),
        (1, 0xC9, False),
        (4, 12, False),
        (11, 0x41, False),
        (11, 0x12, False),
        (14, 0x21, False),
    ],
    ids=["extended", "lossless", "arithmetic", "12-bit", "4:1:1", "4:4:0", "odd-chroma"],
)
def test_unusual_jpegs_are_not_plain(at: int, value: int, plain: bool, picture: Picture) -> None:
    data = bytearray(encoded(picture(5, 30, 20), "JPEG"))
    data[data.index(b"\xff\xc0") + at] = value
    assert read_header(bytes(data)).plain == plain


@pytest.mark.parametrize(
    ("marker", "clean"), [(b"\x00", True), (b"\xd5", True), (b"\xda", False), (b"\x87", False), (b"\xff", False)]
)
def test_a_marker_among_the_pixels_is_found(marker: bytes, clean: bool, picture: Picture) -> None:
    data = encoded(picture(6), "JPEG")
    half = len(data) // 2
    spoilt = data[:half] + b"\xff" + marker + data[half:]
    assert scan_is_clean(spoilt, read_header(spoilt)) == clean


def patched(data: bytes, width: int, height: int) -> bytes:
    """A PNG of another size, by its header."""
    return data[:16] + struct.pack(">II", width, height) + data[24:]


def test_files_that_are_refused(picture: Picture) -> None:
    image = picture(7, 20, 30)
    frames: dict[str, object] = {"save_all": True, "append_images": [image.rotate(90)], "duration": 9}
    jpeg, one = encoded(image, "JPEG"), encoded(image, "PNG")
    bomb = "more than 100 megapixels: refused as a decompression bomb"
    other = "not a JPEG, PNG or WebP image"
    frame = jpeg.index(b"\xff\xc0")
    for data, fault in (
        (b"", "is empty"),
        (b"\n <!DOCTYPE html>", "is an HTML page: the download failed, fetch it again"),
        (encoded(image, "GIF"), f"is a GIF, {other}"),
        (encoded(image, "GIF", **frames), f"is a GIF, {other}"),
        (encoded(image, "BMP"), f"is a BMP, {other}"),
        (encoded(image, "TIFF"), f"is a TIFF, {other}"),
        (b"\x00\x00\x00\x20ftypavif", f"is an AVIF, {other}"),
        (b"\x00\x00\x00\x20ftypheic", f"is a HEIC, {other}"),
        (b"\x00\x00\x00\x20ftypisom", f"is {other}"),
        (b"no image at all", f"is {other}"),
        (bytes(500), f"is {other}"),
        (encoded(image, "PNG", **frames), "is an animation, not one image"),
        (encoded(image, "WEBP", **frames), "is an animation, not one image"),
        (patched(one, 12_000, 12_000), f"is 12000x12000, {bomb}"),
        (patched(one, 10_000, 10_001), f"is 10000x10001, {bomb}"),
        (patched(one, 0, 30), "is 0x30, without a pixel"),
        (jpeg[: frame + 5] + struct.pack(">HH", 60_000, 50_000) + jpeg[frame + 9 :], f"is 50000x60000, {bomb}"),
        (jpeg[:4], "is truncated"),
        (jpeg[: frame + 8], "is truncated"),
        (one[:20], "is truncated"),
        (encoded(image, "WEBP")[:25], "is truncated"),
        (b"\xff\xd8\xff\xd9", "is truncated"),
        (b"\xff\xd8\xff\xd9" + bytes(9), "does not decode: the header of the JPEG is damaged"),
        (jpeg[:2] + b"\xff\xda\x00\x08" + bytes(99), "does not decode: the header of the JPEG is damaged"),
        (one[:8] + chunk(b"IDAT", b""), "does not decode: the header of the PNG is damaged"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(14), "does not decode: the header of the WebP is damaged"),
    ):
        assert header_or_fault(data) == fault
    assert read_header(patched(one, 10_000, 10_000)).plain
    # an animated PNG of one picture is one image
    assert read_header(one[:33] + chunk(b"acTL", struct.pack(">II", 1, 0)) + one[33:]).width == 20


STARTS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\x00\x00\x00WEBPVP8 ", b"RIFF\x40\x00\x00\x00WEBPVP8X", b""]


@settings(deadline=None, max_examples=400)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300))
def test_bytes_of_any_kind_give_a_header_or_a_fault_of_one_line(start: bytes, rest: bytes) -> None:
    header = header_or_fault(start + rest)
    if isinstance(header, str):
        assert header
        assert "\n" not in header
    else:
        assert 0 < header.width * header.height <= 100_000_000
    download_fault(rest)
    looks_complete(start[:12], rest[-64:], len(rest))


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(KINDS)), at=st.integers(0, 700), spoilt=st.binary(max_size=8), cut=st.integers(0, 9))
def test_damaged_files_raise_nothing_else(name: str, at: int, spoilt: bytes, cut: int) -> None:
    data = KINDS[name][0](Image.linear_gradient("L").resize((30, 30)).convert("RGB"))
    at %= len(data)
    data = data[:at] + spoilt + data[at + cut :]
    header = header_or_fault(data)
    if isinstance(header, str):
        return
    assert isinstance(scan_is_clean(data, header), bool)
    if header.kind == "PNG" and header.width * header.height < 1_000_000:
        with contextlib.suppress(ValueError):
            check_png(data)


def interlaced_rows(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) as the seven passes of Adam7, without filters."""
    starts = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in starts]
    return b"".join(b"\x00" + row.tobytes() for part in passes if part.size for row in part)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (4, 5), (5, 1), (1, 9), (17, 23)])
def test_every_row_of_a_png_is_checked(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    plain = b"".join(b"\x04" + row.tobytes() for row in pixels)
    for interlaced, raw in enumerate((plain, interlaced_rows(pixels))):
        data = png(width, height, raw, interlaced)
        assert read_header(data).plain
        check_png(data)
        check_png(png(width, height, raw + bytes(50), interlaced))
        for spoilt, fault in (
            (png(width, height, raw[:-1], interlaced), "rows are missing"),
            (png(width, height, b"\x05" + raw[1:], interlaced), "a row has no filter known"),
            (data[:-20] + b"\x00" + data[-19:], "a checksum is wrong"),
        ):
            with pytest.raises(ValueError, match=f"^does not decode: {fault}$"):
                check_png(spoilt)
        with pytest.raises(ValueError, match=r"^is truncated$"):
            check_png(data[:-14])


def test_a_damaged_stream_with_a_right_checksum_is_found() -> None:
    good = png(9, 9, bytes(9 * 28))
    stream = zlib.compress(bytes(9 * 28))
    for spoilt in (stream[:2] + b"\xff" + stream[3:], stream[:-1] + b"\x77", stream[: len(stream) // 2], b""):
        with pytest.raises(ValueError, match=r"^does not decode: "):
            check_png(good[:33] + chunk(b"IDAT", spoilt) + chunk(b"IEND", b""))


def test_a_png_whose_image_data_is_in_many_chunks() -> None:
    stream = zlib.compress(np.random.default_rng(1).integers(0, 4, 9 * 28, dtype=np.uint8).tobytes())
    parts = b"".join(chunk(b"IDAT", stream[i : i + 7]) for i in range(0, len(stream), 7))
    good = png(9, 9, b"")[:33] + parts + chunk(b"IEND", b"")
    assert read_header(good).width == 9
    with pytest.raises(ValueError, match=r"^does not decode: "):
        check_png(good[:33] + chunk(b"IDAT", stream[:7]) + chunk(b"tEXt", b"a\x00b") + parts)
