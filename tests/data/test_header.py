"""Headers: format and size of every kind of file, whether it is complete, and the faults of what is no image."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastle.data.header import MAX_PIXELS, Header, check_png, looks_complete, read_header, scan_is_clean
from fastle.data.orientation import read_orientation
from tests.data import pictures
from tests.data.pictures import BY_PILLOW, GOOD, NOT_AN_IMAGE, SIGNATURE, bomb, chunk, encoded, picture

NOT_PLAIN = {"jpeg-progressive", "jpeg-cmyk", "png-grey-16", "png-16"}
FORMATS = {
    "jpeg": "JPEG", "png": "PNG", "webp": "WebP", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "avif": "AVIF"
}  # fmt: skip


def png(width: int, height: int, raw: bytes, interlaced: int = 0) -> bytes:
    """A PNG of these rows, each with its filter in front."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def header_or_fault(data: bytes) -> Header | str:
    try:
        return read_header(data)
    except ValueError as error:
        fault = error
    assert type(fault) is ValueError and str(fault) and "\n" not in str(fault)
    return str(fault)


@pytest.mark.parametrize(("width", "height"), [(178, 218), (37, 16), (1, 1), (300, 9)])
def test_format_and_size_of_every_kind(width: int, height: int) -> None:
    for kind, encode in (GOOD | BY_PILLOW).items():
        if "animated" in kind and width == 1:
            # of equal frames, Pillow writes one
            continue
        data = encode(picture(3, width, height))
        header = read_header(data)
        size = (height, width) if "turned" in kind else (width, height)
        assert (header.kind, header.width, header.height) == (FORMATS[kind.partition("-")[0]], *size), kind
        assert header.plain == (kind in GOOD and kind not in NOT_PLAIN), kind
        assert (header.by_pillow, header.deep) == (kind in BY_PILLOW, "16" in kind), kind
        # of the others, only decoding tells
        ends = (kind in GOOD and kind != "png-trailing") or header.kind == "WebP"
        assert looks_complete(data[:12], data[-64:], len(data)) == ends, kind
        assert scan_is_clean(data, header), kind
    # sizes that need all of their bits
    for kind in ("JPEG", "WEBP"):
        header = read_header(encoded(Image.new("RGB", (16383, 3)), kind))
        assert (header.width, header.height) == (16383, 3)


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_cut_anywhere_is_truncated_or_has_its_header(kind: str) -> None:
    data = GOOD[kind](picture(1, 40, 50))
    headers = [header_or_fault(data[:size]) for size in range(12, len(data), 1 + len(data) // 400)]
    first = next(i for i, header in enumerate(headers) if isinstance(header, Header))
    assert set(headers[:first]) <= {"is truncated"}
    sizes = {(h.width, h.height) for h in headers[first:] if isinstance(h, Header)}
    # a WebP says behind its pixels that it is turned
    turned = {"jpeg-turned": {(50, 40)}, "webp-turned": {(40, 50), (50, 40)}}
    assert sizes <= turned.get(kind, {(40, 50)})
    assert all(isinstance(header, Header) for header in headers[first:])
    # the last byte that is missed is one before the trailing bytes
    for size in (12, 64, len(data) // 2, len(data) - 41, len(data) - 40 * ("trailing" in kind) - 1):
        assert not looks_complete(data[:12], data[:size][-64:], size), size


def test_long_segments_may_precede_the_frame() -> None:
    exif = Image.Exif()
    exif[0x010E] = "description " * 5000
    thumbnail = encoded(picture(3, 16, 16), "JPEG")
    profile = b"\xff\xd8\xff\xc0" * 50_000
    data = encoded(picture(2, 61, 47), "JPEG", exif=exif, icc_profile=profile, comment=thumbnail)
    header = read_header(data)
    assert len(data) > 250_000 and header == Header("JPEG", 61, 47, True, header.scan)
    assert scan_is_clean(data, header)


def exif_block(order: str, *, kind: int = 3, value: int = 6, first: int = 8, before: int = 0) -> bytes:
    """An EXIF block with `before` other entries in front of the orientation."""
    mark, code = ("II", "<") if order == "little" else ("MM", ">")
    head = mark.encode() + struct.pack(f"{code}HI", 42, first)
    others = struct.pack(f"{code}HHII", 0x010E, 2, 1, 0) * before
    number = struct.pack(f"{code}{'H' if kind == 3 else 'I'}", value).ljust(4, b"\0")
    return head + struct.pack(f"{code}H", before + 1) + others + struct.pack(f"{code}HHI", 0x0112, kind, 1) + number


@pytest.mark.parametrize("order", ["little", "big"])
def test_an_orientation_is_found_or_is_upright(order: str) -> None:
    good = [exif_block(order), exif_block(order, kind=4), exif_block(order, before=3), b"Exif\0\0" + exif_block(order)]
    assert [read_orientation(exif) for exif in good] == [6] * 4
    damaged = [
        b"", b"II", b"no EXIF", exif_block(order)[:-1], exif_block(order, first=2**31), exif_block(order, kind=2),
        exif_block(order, value=0), exif_block(order, value=9), exif_block(order, before=3)[:40],
    ]  # fmt: skip
    assert [read_orientation(exif) for exif in damaged] == [1] * len(damaged)


@pytest.mark.parametrize(
    ("filling", "plain"), [(b"\xff\xff\xff", True), (b"\x00\x12", False), (b"\xff\x01", False), (b"\xff\xd3", False)]
)
def test_bytes_between_segments_are_skipped(filling: bytes, plain: bool) -> None:
    data = encoded(picture(4, 30, 20), "JPEG")
    at = data.index(b"\xff\xdb")
    header = read_header(data[:at] + filling + data[at:])
    assert (header.width, header.height, header.plain) == (30, 20, plain)


@pytest.mark.parametrize(
    ("at", "value", "plain"),
    [(1, 0xC1, True), (1, 0xC3, False), (1, 0xC9, False), (4, 12, False), (11, 0x41, False), (11, 0x12, False),
     (14, 0x21, False)],
    ids=["extended", "lossless", "arithmetic", "12-bit", "4:1:1", "4:4:0", "odd-chroma"],
)  # fmt: skip
def test_unusual_jpegs_are_not_plain(at: int, value: int, plain: bool) -> None:
    data = bytearray(encoded(picture(5, 30, 20), "JPEG"))
    data[data.index(b"\xff\xc0") + at] = value
    assert read_header(bytes(data)).plain == plain


@pytest.mark.parametrize(
    ("marker", "clean"), [(b"\x00", True), (b"\xd5", True), (b"\xda", False), (b"\x87", False), (b"\xff", False)]
)
def test_a_stray_marker_among_the_pixels_is_noticed(marker: bytes, clean: bool) -> None:
    data = encoded(picture(6), "JPEG")
    middle = len(data) // 2
    spoilt = data[:middle] + b"\xff" + marker + data[middle:]
    assert scan_is_clean(spoilt, read_header(spoilt)) == clean


def resized(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    return data[:16] + struct.pack(">II", width, height) + data[24:]


def test_faults_of_what_is_not_an_image() -> None:
    image = picture(7, 20, 30)
    frames: dict[str, object] = {"save_all": True, "append_images": [image.rotate(90)], "duration": 9}
    jpeg, one = encoded(image, "JPEG"), encoded(image, "PNG")
    too_large = "more than 100 megapixels: refused as a decompression bomb"
    frame = jpeg.index(b"\xff\xc0")
    for data, fault in (
        (b"", "is empty"),
        (b"\n <!DOCTYPE html>", "is an HTML page: the download failed, fetch it again"),
        (b" <html>quota</html>", "is an HTML page: the download failed, fetch it again"),
        (b"8BPS\0\1", f"is a Photoshop file, {NOT_AN_IMAGE}"),
        (b"\xff\x0a\0\0", f"is a JPEG XL, {NOT_AN_IMAGE}"),
        (b"\x00\x00\x00\x20ftypisom", "is not an image that fastle decodes"),
        (b"no image at all", "is not an image that fastle decodes"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is not an image that fastle decodes"),
        (bytes(500), "is not an image that fastle decodes"),
        (encoded(image, "PNG", **frames), "is an animation, not one image"),
        (bomb(), f"is 12000x12000, {too_large}"),
        (resized(one, 10_000, 10_001), f"is 10000x10001, {too_large}"),
        # a product that overflows 32 bits
        (resized(one, 65_536, 65_536), f"is 65536x65536, {too_large}"),
        (resized(one, 0, 30), "is 0x30, without a pixel"),
        (jpeg[: frame + 5] + struct.pack(">HH", 60_000, 50_000) + jpeg[frame + 9 :], f"is 50000x60000, {too_large}"),
        (jpeg[: frame + 8], "is truncated"),
        (b"\xff\xd8\xff\xd9", "is truncated"),
        (b"\xff\xd8\xff\xd9" + bytes(9), "does not decode: the header of the JPEG is damaged"),
        (jpeg[:2] + b"\xff\xda\x00\x08" + bytes(99), "does not decode: the header of the JPEG is damaged"),
        (one[:8] + chunk(b"IDAT", b""), "does not decode: the header of the PNG is damaged"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(14), "does not decode: the header of the WebP is damaged"),
    ):
        assert header_or_fault(data) == fault
    largest = read_header(resized(one, 10_000, 10_000))
    assert largest.width * largest.height == MAX_PIXELS
    # an animated PNG of one frame is one image
    assert read_header(one[:33] + chunk(b"acTL", struct.pack(">II", 1, 0)) + one[33:]).width == 20


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(["jpeg", "jpeg-progressive", "png", "png-palette", "webp", "webp-alpha"]),
    at=st.integers(0, 700), spoilt=st.binary(max_size=8), cut=st.integers(0, 300),
)  # fmt: skip
def test_damaged_files_raise_nothing_but_faults(kind: str, at: int, spoilt: bytes, cut: int) -> None:
    data = GOOD[kind](Image.linear_gradient("L").resize((30, 30)).convert("RGB"))
    at %= len(data)
    data = data[:at] + spoilt + data[at + cut :]
    header = header_or_fault(data)
    looks_complete(data[:12], data[-64:], len(data))
    if isinstance(header, Header):
        assert 0 < header.width * header.height <= MAX_PIXELS
        scan_is_clean(data, header)
        if header.kind == "PNG" and header.width * header.height < 1_000_000:
            with contextlib.suppress(ValueError):
                check_png(data)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (4, 5), (5, 1), (1, 9), (17, 23)])
def test_every_row_of_a_png_is_checked(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = pictures.png(pixels, colour=2, interlaced=True)
    interlaced_rows = zlib.decompress(whole[41:-16])
    for interlaced, raw in enumerate((b"".join(b"\x04" + row.tobytes() for row in pixels), interlaced_rows)):
        data = png(width, height, raw, interlaced)
        check_png(data)
        check_png(png(width, height, raw + bytes(50), interlaced))
        for spoilt, fault in (
            (png(width, height, raw[:-1], interlaced), "does not decode: rows are missing"),
            (png(width, height, b"\x05" + raw[1:], interlaced), "does not decode: a row has an unknown filter"),
            (data[:-20] + b"\x00" + data[-19:], "does not decode: a checksum is wrong"),
            (data[:-14], "is truncated"),
        ):
            with pytest.raises(ValueError, match=f"^{fault}$"):
                check_png(spoilt)


def test_a_damaged_stream_with_right_checksums_is_noticed() -> None:
    good = png(9, 9, bytes(9 * 28))
    stream = zlib.compress(np.random.default_rng(1).integers(0, 4, 9 * 28, dtype=np.uint8).tobytes())
    for spoilt in (stream[:2] + b"\xff" + stream[3:], stream[:-1] + b"\x77", stream[: len(stream) // 2], b""):
        with pytest.raises(ValueError, match=r"^does not decode: "):
            check_png(good[:33] + chunk(b"IDAT", spoilt) + chunk(b"IEND", b""))
    # the image data may be in many chunks, but they must follow one another
    parts = [chunk(b"IDAT", stream[i : i + 7]) for i in range(0, len(stream), 7)]
    check_png(good[:33] + b"".join(parts) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"^does not decode: "):
        check_png(good[:33] + parts[0] + chunk(b"tEXt", b"a\x00b") + b"".join(parts[1:]))
