"""Small image files of every kind, good and bad, with generated pictures."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional as F

from fastle.config import Size, sides_of
from fastle.data.dali import DaliDecoder, why_no_dali
from fastle.data.decode import Decoder, TorchvisionDecoder

Encode = Callable[[Image.Image], bytes]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(seed: int, width: int = 178, height: int = 218) -> Image.Image:
    """An RGB image: smooth like a photograph, with grain, which shows differences in rounding."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + draws.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def turned(image: Image.Image, kind: str = "JPEG", orientation: int = 6, **options: object) -> bytes:
    """A file with an EXIF orientation, which by default turns it on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def with_thumbnail(image: Image.Image) -> bytes:
    """A JPEG with a smaller one in its first segment: a search for the bytes of a marker finds the wrong size."""
    data, thumbnail = encoded(image, "JPEG"), encoded(picture(0, 16, 12), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def filled(image: Image.Image) -> bytes:
    """A JPEG with fill bytes before a marker, which the standard allows."""
    data = encoded(image, "JPEG")
    return data[:2] + b"\xff\xff\xff" + data[2:]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, *, colour: int, interlaced: bool = False) -> bytes:
    """A PNG as Pillow cannot write it: 16-bit colour, or interlaced. `pixels` is (H, W, C), uint8 or uint16."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        # Adam7: first column, first row, column step, row step
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines: list[bytes] = []
    for column, row, right, down in passes:
        part = pixels[row::down, column::right]
        if part.size:
            # each line with filter 0
            lines += [b"\0" + line.astype(pixels.dtype.newbyteorder(">")).tobytes() for line in part]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour, 0, 0, int(interlaced))
    body = zlib.compress(b"".join(lines), 1)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def sixteen(image: Image.Image) -> np.ndarray:
    """uint16 (H, W, 3) whose low bytes differ from the high ones."""
    high = np.asarray(image).astype(np.uint16) << 8
    return high + np.arange(high.size, dtype=np.uint16).reshape(high.shape) % 256


def with_gamma(image: Image.Image) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100_000))
    return encoded(image, "PNG", pnginfo=info)


GOOD: dict[str, Encode] = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=90),
    "jpeg-422": lambda image: encoded(image, "JPEG", subsampling="4:2:2"),
    "jpeg-444": lambda image: encoded(image, "JPEG", subsampling="4:4:4"),
    "jpeg-progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "jpeg-restarts": lambda image: encoded(image, "JPEG", restart_marker_rows=1),
    "jpeg-grey": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg-rgb": lambda image: encoded(image, "JPEG", keep_rgb=True),
    "jpeg-cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "jpeg-turned": turned,
    "webp-turned": lambda image: turned(image, "WEBP"),
    "jpeg-thumbnail": with_thumbnail,
    "jpeg-fill-bytes": filled,
    "jpeg-trailing": lambda image: encoded(image, "JPEG") + b"\0" * 40,
    "png": lambda image: encoded(image, "PNG"),
    "png-interlaced": lambda image: png(np.asarray(image), colour=2, interlaced=True),
    "png-grey": lambda image: encoded(image.convert("L"), "PNG"),
    "png-grey-alpha": lambda image: encoded(with_alpha(image).convert("LA"), "PNG"),
    "png-alpha": lambda image: encoded(with_alpha(image), "PNG"),
    "png-palette": lambda image: encoded(image.quantize(16), "PNG"),
    "png-palette-transparent": lambda image: encoded(image.quantize(16), "PNG", transparency=0),
    "png-colour-key": lambda image: encoded(image, "PNG", transparency=image.getpixel((0, 0))),
    "png-black-and-white": lambda image: encoded(image.convert("1"), "PNG"),
    "png-grey-16": lambda image: png(sixteen(image)[..., :1], colour=0),
    "png-16": lambda image: png(sixteen(image), colour=2),
    "png-gamma": with_gamma,
    "png-trailing": lambda image: encoded(image, "PNG") + b"\0" * 40,
    "webp": lambda image: encoded(image, "WEBP"),
    "webp-lossless": lambda image: encoded(image, "WEBP", lossless=True),
    "webp-alpha": lambda image: encoded(with_alpha(image), "WEBP"),
    "webp-lossless-alpha": lambda image: encoded(with_alpha(image), "WEBP", lossless=True),
}

# what torchvision cannot decode, and Pillow does
BY_PILLOW: dict[str, Encode] = {
    "tiff": lambda image: encoded(image, "TIFF"),
    "tiff-lzw": lambda image: encoded(image, "TIFF", compression="tiff_lzw"),
    "tiff-alpha": lambda image: encoded(with_alpha(image), "TIFF"),
    "tiff-cmyk": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "tiff-pages": lambda image: encoded(image, "TIFF", save_all=True, append_images=[image.rotate(90)]),
    "tiff-turned": lambda image: turned(image, "TIFF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "bmp-grey": lambda image: encoded(image.convert("L"), "BMP"),
    "gif": lambda image: encoded(image, "GIF"),
    "gif-transparent": lambda image: encoded(image.quantize(16), "GIF", transparency=0),
    "gif-animated": lambda image: animated(image, "GIF"),
    "webp-animated": lambda image: animated(image, "WEBP", lossless=True),
    "webp-animated-turned": lambda image: turned(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
    "avif": lambda image: encoded(image, "AVIF", speed=10),
    "avif-turned": lambda image: turned(image, "AVIF", speed=10),
}

UNSUPPORTED: dict[str, Encode] = {
    # the first bytes identify the format
    "psd": lambda image: b"8BPS\0\1" + b"\0" * 200,
    "jxl": lambda image: b"\xff\x0a" + b"\0" * 200,
    "jp2": lambda image: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 200,
    "dng": lambda image: encoded(image, "TIFF", tiffinfo={254: 1}),
}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200  # without an image
NOT_AN_IMAGE = "which fastle cannot decode"


def animated(image: Image.Image, kind: str, **options: object) -> bytes:
    return encoded(image, kind, save_all=True, append_images=[image.rotate(90)], duration=100, **options)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged_png(image: Image.Image) -> bytes:
    """A PNG with a wrong byte in the middle: its ends are right, and only decoding can tell."""
    data = bytearray(encoded(image, "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def bomb(kind: str = "PNG", **options: object) -> bytes:
    """A file of some kilobytes that decodes to hundreds of megabytes."""
    return encoded(Image.new("1", (12_000, 12_000)), kind, **options)


def write_bad(folder: Path, size: int) -> dict[str, str]:
    """Writes bad files of every kind, for a `size` above 20. Returns their names and a part of their faults."""
    image = picture(99, 60, 70)
    (folder / "bad-truncated.jpg").write_bytes(half(encoded(image, "JPEG")))
    (folder / "bad-empty.jpg").touch()
    (folder / "bad-page.jpg").write_bytes(b"\n<!DOCTYPE html><html>Quota exceeded</html>")
    (folder / "bad-psd.jpg").write_bytes(UNSUPPORTED["psd"](image))
    (folder / "bad-gif.gif").write_bytes(half(encoded(image, "GIF")))
    (folder / "bad-bomb.png").write_bytes(bomb())
    (folder / "bad-small.jpg").write_bytes(encoded(picture(98, 20, 20), "JPEG"))
    (folder / "bad-link.jpg").symlink_to(folder / "gone.jpg")
    return {
        "bad-truncated.jpg": "truncated",
        "bad-empty.jpg": "is empty",
        "bad-page.jpg": "is an HTML page",
        "bad-psd.jpg": f"is a Photoshop file, {NOT_AN_IMAGE}",
        "bad-gif.gif": "does not decode: image file is truncated",
        "bad-bomb.png": "is 12000x12000, more than 100 megapixels: refused as a decompression bomb",
        "bad-small.jpg": f"is 20x20, smaller than the {size}x{size} asked for",
        "bad-link.jpg": "cannot be read: No such file or directory",
    }


def write_pictures(folder: Path, count: int, *, first: int = 0, width: int = 29, height: int = 36) -> list[Path]:
    """Writes PNGs of one size, named by their seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:04}.png" for seed in range(first, first + count)]
    for seed, path in enumerate(paths, start=first):
        path.write_bytes(encoded(picture(seed, width, height), "PNG"))
    return paths


def write_celeba(root: Path, contents: Iterable[tuple[str, bytes]], valid: int = 0) -> Path:
    """Writes torchvision's layout; the last `valid` files are the validation split. Returns the images' folder."""
    named = list(contents)
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for name, data in named:
        (folder / name).write_bytes(data)
    lines = [f"{name} {int(i >= len(named) - valid)}\n" for i, (name, _) in enumerate(named)]
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(lines))
    return folder


def oracle(data: bytes, size: Size, *, resize: bool) -> Tensor:
    """uint8 (3, *size) by torchvision's own functions and Pillow's, one after the other."""
    if data.startswith((b"\xff\xd8", SIGNATURE)) or (data.startswith(b"RIFF") and b"ANMF" not in data):
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        image = upright(F.to_dtype(image, torch.uint8, scale=True), data)
    else:
        image = pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    if resize:
        sides, (height, width) = sides_of(size), image.shape[1:]
        scale = max(Fraction(sides[0], height), Fraction(sides[1], width))
        covering = [size] if isinstance(size, int) else [int(scale * height), int(scale * width)]
        image = F.resize(image, covering, antialias=True)
    return CenterCrop(size)(image)


def upright(image: Tensor, data: bytes) -> Tensor:
    """(3, H, W), the pixels of a file, turned by Pillow as the file's EXIF orientation asks."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels.getexif()[0x0112] = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    return torch.from_numpy(np.array(ImageOps.exif_transpose(pixels))).permute(2, 0, 1)


class Memory:
    """An image file in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self._data = name, data

    def read(self) -> bytes:
        return self._data

    def stamp(self) -> str:
        return self.name


def decoder_of(name: str, size: Size, *, resize: bool, threads: int | None = None) -> Decoder:
    if name == "torchvision":
        return TorchvisionDecoder(size, 3, resize, threads)
    dali_or_skip()
    return DaliDecoder(size, resize=resize, threads=threads)


def dali_or_skip() -> None:
    if reason := why_no_dali():
        pytest.skip(f"no DALI: {reason}")
