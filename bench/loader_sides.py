"""What the bench of the loaders compares, and the images that it loads.

    pil-0, pil-2            PIL in torch's DataLoader with 0 and 2 workers: open, CenterCrop, PILToTensor
    torchvision             fastle's feed with --decoder torchvision --cache none
    dali                    --decoder dali: DALI on the CPU, the crop cut out as it decodes, H x W x C
    dali-gpu                --decoder dali-gpu; CUDA only
    cache-disk, cache-host  --cache disk and host: decoded once, then memory-mapped, or read into memory
    cache-device            --cache device; CUDA only

All take the same images in the same order, fastle's, and hand their batches out on the device.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import CenterCrop, Compose, PILToTensor

from fastle.data import CacheChoice, DecoderChoice, Feed, Images, Loading, open_images
from fastle.data.celeba import open_celeba
from fastle.data.decode import DiskFile, ImageFile, TorchvisionDecoder
from fastle.data.order import batch_indices
from fastle.presets import make_config

SIZE, BATCH, SEED = 128, 128, 0
WIDTH, HEIGHT = 178, 218
# such that a file has about 8 KB, as CelebA's have
QUALITY, NOISE = 88, 2.0
PEERS = {"pil-0": 0, "pil-2": 2}  # workers
REFERENCE = "torchvision"
OURS: dict[str, tuple[DecoderChoice, CacheChoice]] = {
    REFERENCE: ("torchvision", "none"),
    "dali": ("dali", "none"),
    "dali-gpu": ("dali-gpu", "none"),
    "cache-disk": ("auto", "disk"),
    "cache-host": ("auto", "host"),
    "cache-device": ("auto", "device"),
}
NAMES = (*PEERS, *OURS)
CUDA_ONLY = ("dali-gpu", "cache-device")
INEXACT = ("dali-gpu",)  # decoded by other arithmetic, whose pixels differ by design


@dataclass(slots=True, kw_only=True)
class Workload:
    """The images, and what is known of them by now.

    Args:
        root: CelebA in torchvision's layout.
        source: where the images come from, in words.
        count: of the images.
        sides: what is compared.

    Attributes:
        opened: of fastle's sides, by name.
        refused: why the pixels are wrong; None if they are right.
    """

    root: Path
    source: str
    count: int
    sides: Sequence[str]
    opened: dict[str, Images] = field(default_factory=dict)
    refused: str | None = None


def names(device: torch.device) -> list[str]:
    """The sides of a device."""
    return [name for name in NAMES if device.type == "cuda" or name not in CUDA_ONLY]


class Loader(Protocol):
    """One way to load batches."""

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """The batches of steps `start` to `stop - 1` on the device: uint8 (BATCH, 3, SIZE, SIZE)."""

    def workers_seconds(self) -> float:
        """CPU time that processes of its own have taken so far."""


class FastleLoader:
    """fastle's feed over opened images."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self._images, self._device = images, device

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        with Feed(
            self._images, batch_size=BATCH, seed=SEED, device=self._device, start_step=start, stop_step=stop
        ) as feed:
            yield from feed

    def workers_seconds(self) -> float:
        return 0.0


class PilLoader:
    """PIL in torch's DataLoader, as torchvision's tutorials have it, but for the order, which is fastle's."""

    def __init__(self, files: Sequence[ImageFile], workers: int, device: torch.device) -> None:
        self._device = device
        self._order = _Order(len(files))
        self._spent: dict[int, float] = {}
        self._loader: DataLoader[Any] = DataLoader(
            _PilImages(files),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=_collate,
            # the workers are started once, as in a long run
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        self._order.steps = range(start, stop)
        for images, process, seconds in self._loader:
            if process != os.getpid():
                self._spent[process] = seconds
            yield images.to(self._device, non_blocking=True)

    def workers_seconds(self) -> float:
        # what getrusage says of children counts a worker only when it has ended
        return sum(self._spent.values())


class _PilImages(Dataset[Tensor]):
    def __init__(self, files: Sequence[ImageFile]) -> None:
        self._files = files
        self._transform = Compose([CenterCrop(SIZE), PILToTensor()])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self._files[index].read())) as image:
            return self._transform(image.convert("RGB"))


class _Order:
    """A batch sampler: the images of `steps`."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.steps = range(0)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield batch_indices(self._n, step=step, batch_size=BATCH, seed=SEED, rank=0, world_size=1).tolist()


def _collate(images: list[Tensor]) -> tuple[Tensor, int, float]:
    """A batch, the process that made it, and the CPU time that the process has taken so far."""
    return default_collate(images), os.getpid(), time.process_time()


def own_clock(call: Callable[[], object]) -> float:
    """For calls that time themselves: a part of each is none of the figure."""
    return cast(float, call())


def open_side(name: str, root: Path, device: torch.device, say: Callable[[str], object]) -> Images:
    """The training images of CelebA at `root`, through the decoder and the cache of one of fastle's sides.

    Raises:
        DataError: the side cannot be had here.
    """
    decoder, cache = OURS[name]
    config = make_config("celeba", data=root, size=SIZE).data
    return open_images(config, "train", Loading(decoder=decoder, cache=cache, device=device, say=say))


def disk_files(root: Path) -> list[ImageFile]:
    """The training images that `make_celeba` or `copy_celeba` wrote."""
    return [DiskFile(str(path)) for path in sorted((root / "img_align_celeba").glob("*.jpg"))]


def make_celeba(root: Path, images: int) -> None:
    """JPEGs in CelebA's size, all different, all to train with, in torchvision's layout: patches of colour with soft
    edges, and a little noise."""
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
    """Files of someone's CelebA, evenly spread over its training split and at most `images` of them, in torchvision's
    layout: what they hold is theirs, where they lie is the same for all layouts. Returns how many.

    Raises:
        DataError: there is no CelebA there, or a file cannot be read.
    """
    files = training_files(data)
    count = min(images, len(files))
    _write(root, (files[i * len(files) // count].read() for i in range(count)))
    return count


def training_files(data: Path) -> list[ImageFile]:
    """The encoded images of CelebA's training split, in any of its layouts.

    Raises:
        DataError: see `open_celeba`.
    """
    return list(open_celeba(data, "train", TorchvisionDecoder(SIZE, 3, resize=False)).files)


def _write(root: Path, encoded: Iterator[bytes] | Any) -> None:
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    lines = []
    for number, data in enumerate(encoded, start=1):
        # numbered and named as CelebA's are, whatever the bytes are: fastle goes by what is in a file
        name = f"{number:06}.jpg"
        (folder / name).write_bytes(data)
        lines.append(f"{name} 0\n")
    (root / "list_eval_partition.txt").write_text("".join(lines), encoding="utf-8")
