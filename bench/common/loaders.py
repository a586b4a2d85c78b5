"""What the loader benchmark compares: fastle's feed, and PIL in torch's DataLoader; and the images that they load."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import CenterCrop, Compose, PILToTensor

from bench.common.celeba_images import SIZE
from bench.common.table import Row
from fastle.data import Feed, Images
from fastle.data.decode import ImageFile
from fastle.data.order import batch_indices
from fastle.machine import package_version

BATCH, SEED = 128, 0
PACKAGES = ("torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


@dataclass(slots=True, kw_only=True)
class Workload:
    """The images, and what the first row leaves for the second.

    Attributes:
        root: CelebA in torchvision's layout.
        source: Where the images come from, in words.
        count: How many there are.
        sides: The names of what is compared.
        opened: The images as fastle's sides opened them, by name.
        refused: Why the first row was refused; None if its pixels are right.
    """

    root: Path
    source: str
    count: int
    sides: Sequence[str]
    opened: dict[str, Images] = field(default_factory=dict)
    refused: str | None = None

    def labels(self) -> Row:
        """What the report says of both rows."""
        versions = {name: package_version(name) for name in PACKAGES}
        return {"images": self.count, "source": self.source, "cores": os.cpu_count(), "versions": versions}


class FastleLoader:
    """fastle's feed over opened images."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self._images, self._device = images, device

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """The batches of steps `start` to `stop - 1` on the device: uint8 (BATCH, 3, SIZE, SIZE)."""
        options = {"batch_size": BATCH, "seed": SEED, "start_step": start, "stop_step": stop}
        with Feed(self._images, device=self._device, **options) as feed:
            yield from feed

    def worker_seconds(self) -> float:
        """CPU seconds that the loader's own processes have taken so far."""
        return 0.0


class PilLoader:
    """PIL in torch's DataLoader, as torchvision's tutorials have it, except for the order, which is fastle's."""

    def __init__(self, files: Sequence[ImageFile], workers: int, device: torch.device) -> None:
        self._device, self._count, self._steps = device, len(files), range(0)
        self._spent: dict[int, float] = {}
        self._loader: DataLoader[Any] = DataLoader(
            _PilImages(files),
            batch_sampler=self,
            num_workers=workers,
            collate_fn=_collate,
            # the workers are started once, as in a long run
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield batch_indices(self._count, step=step, batch_size=BATCH, seed=SEED, rank=0, world_size=1).tolist()

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """As `FastleLoader.batches`."""
        self._steps = range(start, stop)
        for images, process, seconds in self._loader:
            if process != os.getpid():
                self._spent[process] = seconds
            yield images.to(self._device, non_blocking=True)

    def worker_seconds(self) -> float:
        """CPU seconds of the workers, by their own count: getrusage knows a child only when it has ended."""
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


def _collate(images: list[Tensor]) -> tuple[Tensor, int, float]:
    """A batch, the process that made it, and the CPU seconds that this process has taken so far."""
    return default_collate(images), os.getpid(), time.process_time()
