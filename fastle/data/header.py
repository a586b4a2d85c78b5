"""The headers of image files: format, size, and whether a file is complete, without decoding it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from . import pillow
from .orientation import UPRIGHT, on_its_side, read_orientation

Kind = Literal["JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF", "HEIC"]

MAX_PIXELS = 100_000_000

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# samples per pixel, by colour type: grey, RGB, palette, grey and alpha, RGB and alpha
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# the seven passes of an interlaced PNG: first column, first row, column step, row step
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# formats that Pillow decodes, by their first bytes
BY_PILLOW: dict[bytes, Kind] = {
    b"GIF8": "GIF", b"BM": "BMP",
    b"II*\x00": "TIFF", b"MM\x00*": "TIFF", b"II+\x00": "TIFF", b"MM\x00+": "TIFF",
}  # fmt: skip
# the same, by the brand in their first box; an MP4 begins with such a box too
BRANDS: dict[bytes, Kind] = {b"avi": "AVIF", b"hei": "HEIC", b"hev": "HEIC", b"mif": "HEIC", b"msf": "HEIC"}
# formats that fastle does not decode
UNSUPPORTED = {
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"8BPS": "Photoshop file",
    b"FUJIFILMCCD-RAW": "raw photograph",
    b"II*\x00\x10\x00\x00\x00CR": "raw photograph",
}

# the sampling factors of a JPEG: grey, 4:4:4, 4:2:2 and 4:2:0
SAMPLING = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
# a marker that must not stand among the pixels of a JPEG
STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image file.

    Attributes:
        kind: The file format.
        width, height: Of the image, turned as its orientation asks, in pixels, at least 1 each; their product is at
            most `MAX_PIXELS`.
        plain: Whether all CPU decoders give the same pixels. They do for an 8-bit baseline JPEG with one or three
            components and 4:4:4, 4:2:2 or 4:2:0 sampling, for a PNG of at most 8 bits and for any WebP; not for a
            progressive JPEG, CMYK or 16 bits.
        scan: The offset in bytes of the compressed pixels of a baseline JPEG; 0 for all others.
        orientation: How the pixels of the file must be turned, 1 to 8; 1 is upright. WebP and some PNGs state it after
            their pixels, and count as upright where that part is missing. Pillow turns the images that it decodes.
        by_pillow: Whether Pillow decodes it, because torchvision cannot.
        deep: Whether its samples have more than 8 bits.
        reduced: Whether it is deep, and its decoder gives only the upper 8 bits.
    """

    kind: Kind
    width: int
    height: int
    plain: bool
    scan: int = 0
    orientation: int = UPRIGHT
    by_pillow: bool = False
    deep: bool = False
    reduced: bool = False


def read_header(data: bytes) -> Header:
    """Reads the header of an encoded image. `data` may end anywhere behind the header.

    Raises:
        ValueError: fastle cannot decode such a file. The message is the fault alone, in one line.
        NotInstalled: A package is missing that decodes it.
    """
    if fault := download_fault(data):
        raise ValueError(fault)
    if data.startswith(b"\xff\xd8\xff"):
        header = _read_jpeg(data)
    elif data.startswith(PNG_SIGNATURE):
        header = _read_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        header = _read_webp(data)
    elif kind := _kind_by_pillow(data):
        size = pillow.read_size(data, kind)
        header = Header(
            kind, size.width, size.height, plain=False, by_pillow=True, deep=size.deep, reduced=size.reduced
        )
    else:
        known = next((words for magic, words in UNSUPPORTED.items() if data.startswith(magic)), None)
        raise ValueError(
            f"is a {known}, which fastle cannot decode" if known else "is not an image that fastle decodes"
        )
    if not header.width or not header.height:
        raise ValueError(f"is {header.width}x{header.height}, without a pixel")
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(
            f"is {header.width}x{header.height}, more than {MAX_PIXELS // 1_000_000} megapixels: "
            "refused as a decompression bomb"
        )
    return replace(header, width=header.height, height=header.width) if on_its_side(header.orientation) else header


def _kind_by_pillow(data: bytes) -> Kind | None:
    if data[4:8] == b"ftyp":
        # the brands of an image that is both, or of a collection, follow
        return "AVIF" if b"avif" in data[8 : min(64, data[3])] else BRANDS.get(data[8:11])
    if data[8:10] == b"CR":
        # a raw photograph that begins like a TIFF
        return None
    return next((kind for magic, kind in BY_PILLOW.items() if data.startswith(magic)), None)


def looks_complete(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file ends as its format requires. If not, only decoding can tell whether it is complete.

    Args:
        head: The first bytes of the file, at least 12.
        tail: The last bytes of the file, at least 64.
        size: The size of the file in bytes.
    """
    if head.startswith(b"\xff\xd8"):
        # cameras pad JPEGs with zeros
        return tail.rstrip(b"\x00").endswith(b"\xff\xd9")
    if head.startswith(PNG_SIGNATURE):
        return tail.endswith(b"\x00\x00\x00\x00IEND\xae\x42\x60\x82")
    return head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 <= size


def scan_is_clean(data: bytes, header: Header) -> bool:
    """Whether no stray marker stands among the pixels of a baseline JPEG. True for any other image.

    A flipped bit can make such a marker. Some decoders ignore it, and others give up.
    """
    return not header.scan or STRAY_MARKER.search(data, header.scan, data.rfind(b"\xff\xd9")) is None


def download_fault(data: bytes) -> str | None:
    """The fault of a file that a failed download left behind: it is empty or an HTML page. None if it is neither."""
    if not data:
        return "is empty"
    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is an HTML page: the download failed, fetch it again"
    return None


def check_png(data: bytes) -> None:
    """Checks that the rows of a PNG, whose header has been read, can be decoded.

    If they cannot, libpng leaves through setjmp, and torchvision 0.29 crashes with a segmentation fault; a flipped bit
    is enough. Faults before the rows are left to torchvision, which reports them as errors.

    Raises:
        ValueError: A checksum is wrong or data is missing. The message is the fault alone, in one line.
    """
    head = data[8 + 8 :]
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (0, 4))
    bits, colour, interlaced = head[8], head[9], head[12]
    if colour not in PNG_SAMPLES or bits not in (1, 2, 4, 8, 16) or interlaced > 1:
        return
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    shapes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for x, y, dx, dy in passes]
    # a row is one byte for its filter and then its pixels; a pass without pixels has no rows
    rows = [(count, 1 + (columns * bits * PNG_SAMPLES[colour] + 7) // 8) for count, columns in shapes if columns > 0]
    length = sum(count * stride for count, stride in rows if count > 0)
    try:
        # one byte more, so that decompression reaches the checksum at the end of the stream
        raw = zlib.decompressobj().decompress(b"".join(_png_data(data)), length + 1)
    except zlib.error as error:
        raise ValueError(f"does not decode: {str(error).rsplit(': ', 1)[-1]}") from None
    if len(raw) < length:
        raise ValueError("does not decode: rows are missing")
    pixels, start = np.frombuffer(raw, np.uint8), 0
    for count, stride in rows:
        end = start + max(count, 0) * stride
        if (pixels[start:end:stride] > 4).any():
            raise ValueError("does not decode: a row has an unknown filter")
        start = end


def _png_data(data: bytes) -> Iterator[bytes]:
    """The contents of the consecutive image data chunks."""
    begun = False
    for name, start, end in _png_chunks(data):
        if name != b"IDAT":
            if begun:
                return
            continue
        begun = True
        if end + 4 > len(data):
            raise ValueError("is truncated")
        content = data[start:end]
        if zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("does not decode: a checksum is wrong")
        yield content


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The name of each chunk, and where its content starts and ends, which may be beyond the end of `data`."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4


def _read_png(data: bytes) -> Header:
    header, exif, begun = None, b"", False
    for name, start, end in _png_chunks(data):
        if header is None:
            if name != b"IHDR" or end - start != 13:
                raise ValueError("does not decode: the header of the PNG is damaged")
            if end > len(data):
                break
            width, height = (int.from_bytes(data[i : i + 4], "big") for i in (start, start + 4))
            deep = data[start + 8] > 8
            header = Header("PNG", width, height, plain=not deep, deep=deep)
        elif name == b"IDAT":
            begun = True
        elif name == b"acTL" and not begun and int.from_bytes(data[start : start + 4], "big") != 1:
            raise ValueError("is an animation, not one image")
        elif name == b"eXIf":
            exif = exif or data[start:end]
        elif name == b"IEND":
            break
    if header is None or not begun:
        raise ValueError("is truncated")
    return replace(header, orientation=read_orientation(exif))


def _read_jpeg(data: bytes) -> Header:
    at, size, plain, frame, frame_at, exif = 2, len(data), True, 0, 0, b""
    while True:
        if data[at : at + 1] != b"\xff":
            # like libjpeg, skip to the next marker
            plain = False
            at = data.find(b"\xff", at)
        # any number of fill bytes may precede a marker
        while 0 <= at < size and data[at] == 0xFF:
            at += 1
        if at < 0 or at + 3 > size:
            break
        marker = data[at]
        at += 1
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            # a marker without a segment
            plain = False
            continue
        length = data[at] << 8 | data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            # a second frame is an error that decoders treat differently
            plain = plain and not frame_at
            frame, frame_at = marker, frame_at or at
        if length < 2 or marker == 0xD9 or (marker == 0xDA and not frame_at):
            raise ValueError("does not decode: the header of the JPEG is damaged")
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 2):
            exif = exif or data[at + 2 : at + length]
        at += length
        if marker == 0xDA:
            break
    if not frame_at or size < frame_at + 8:
        raise ValueError("is truncated")
    # if a progressive JPEG lacks its last scans, libjpeg guesses them, from more of the image than the crop
    baseline = frame in (0xC0, 0xC1)
    header = _read_frame(data[frame_at : frame_at + 32], plain and baseline, at if baseline else 0)
    return replace(header, orientation=read_orientation(exif))


def _read_frame(segment: bytes, plain: bool, scan: int) -> Header:
    height, width = segment[3] << 8 | segment[4], segment[5] << 8 | segment[6]
    sampling = segment[9 : int.from_bytes(segment[:2], "big") : 3]
    usual = segment[7] == len(sampling) and sampling in SAMPLING
    return Header("JPEG", width, height, plain and usual and segment[2] == 8, scan)


def _read_webp(data: bytes) -> Header:
    name, head, exif, animated = data[12:16], data[20:30], b"", False
    if len(head) < 10:
        raise ValueError("is truncated")
    if name == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        # the upper two bits ask for upscaling, which decoders ignore
        width, height = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    elif name == b"VP8L" and head[0] == 0x2F:
        packed = int.from_bytes(head[1:5], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif name == b"VP8X":
        animated = bool(head[0] & 2)
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (4, 7))
        exif = _webp_exif(data)
    else:
        raise ValueError("does not decode: the header of the WebP is damaged")
    return Header("WebP", width, height, plain=not animated, orientation=read_orientation(exif), by_pillow=animated)


def _webp_exif(data: bytes) -> bytes:
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : end]
        # chunks begin at even offsets
        at = end + end % 2
    return b""
