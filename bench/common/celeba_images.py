"""The images that the loader benchmark loads: made, or copied from somebody's CelebA, in torchvision's layout."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastle.data.celeba import open_celeba
from fastle.data.decode import DiskFile, ImageFile, TorchvisionDecoder

SIZE = 128  # of the crop that is loaded
WIDTH, HEIGHT = 178, 218
# such that a file has about 8 KB, as CelebA's have
QUALITY, NOISE = 88, 2.0


def disk_files(root: Path) -> list[ImageFile]:
    """The training images that `make_celeba` or `copy_celeba` wrote."""
    return [DiskFile(str(path)) for path in sorted((root / "img_align_celeba").glob("*.jpg"))]


def make_celeba(root: Path, images: int) -> None:
    """Writes different JPEGs of CelebA's size, all for training: patches of colour with soft edges, a little noise."""
    with ThreadPoolExecutor() as pool:
        _write(root, pool.map(_make_jpeg, range(images)))


def _make_jpeg(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = NOISE * random.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    encoded = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


def copy_celeba(data: Path, root: Path, images: int) -> int:
    """Copies files of somebody's CelebA, evenly spaced over its training split and at most `images` of them.

    The bytes are copied as they are, so that all layouts of CelebA are read alike. Returns how many were copied.

    Raises:
        DataError: There is no CelebA in `data`, or a file cannot be read.
    """
    files = open_celeba(data, "train", TorchvisionDecoder(SIZE, 3, resize=False)).files
    count = min(images, len(files))
    _write(root, (files[i * len(files) // count].read() for i in range(count)))
    return count


def _write(root: Path, encoded: Iterable[bytes]) -> None:
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    lines = []
    for number, data in enumerate(encoded, start=1):
        # CelebA's names, whatever the bytes are: fastle looks at a file's content
        name = f"{number:06}.jpg"
        (folder / name).write_bytes(data)
        lines.append(f"{name} 0\n")
    (root / "list_eval_partition.txt").write_text("".join(lines), encoding="utf-8")
