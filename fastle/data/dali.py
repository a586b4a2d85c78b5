"""The decoder that uses NVIDIA DALI: it decodes whole batches, on the CPU only the crop of each image, or on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastle.config import Size, sides_of

from .decode import (
    ImageFile,
    Tally,
    TorchvisionDecoder,
    check_size,
    decode,
    default_threads,
    read_file,
    resize_and_crop,
)
from .header import Header, looks_complete, read_header, scan_is_clean
from .orientation import UPRIGHT, turn


def why_no_dali() -> str | None:
    """Why DALI is unavailable, worded to follow a colon, or None if it is available."""
    try:
        import_module("nvidia.dali")
    except ModuleNotFoundError:
        return "it is not installed (nvidia-dali-cuda130, for Linux only)"
    except (ImportError, OSError) as error:
        return f"it cannot be imported ({str(error).splitlines()[0]})"
    return None


class DaliDecoder:
    """Decodes RGB images with DALI. On the CPU the pixels equal those of `TorchvisionDecoder`, bit for bit.

    `TorchvisionDecoder` decodes what DALI might decode differently or fail on: images that are not `plain`, files that
    do not end properly, and every batch that DALI rejects, because DALI does not say which of its files is bad.

    Args:
        size, resize, upscale: See `TorchvisionDecoder`.
        threads: The number of DALI's threads and of torchvision's; see `TorchvisionDecoder`.
        gpu: The CUDA device that decodes and holds the batches, whose pixels differ slightly from the CPU's. None for
            the CPU.
        tally: Counts the files.
    """

    def __init__(
        self,
        size: Size,
        *,
        resize: bool,
        threads: int | None = None,
        gpu: int | None = None,
        upscale: bool = False,
        tally: Tally | None = None,
    ) -> None:
        self._size = size
        self._resize = resize
        self._upscale = upscale
        self._threads = threads or default_threads()
        self._gpu = gpu
        self._tally = tally or Tally()
        self._torchvision = TorchvisionDecoder(size, 3, resize, threads, upscale=upscale, tally=self._tally)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        # a pipeline decodes one batch at a time, but training and evaluation may share a decoder
        self._lock = threading.Lock()
        self._pipeline: Any = None
        self._batch_size = 0

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        """Decodes files to uint8 (B, 3, H, W), see `Decoder`. Later calls do not overwrite the memory."""
        try:
            images = self._read(files)
            for_dali = [i for i, image in enumerate(images) if self._takes(image)]
            others = [i for i, image in enumerate(images) if not self._takes(image)]
            rest = self._pool.map(
                lambda i: resize_and_crop(decode(images[i].data, images[i].header, 3), self._size, self._resize), others
            )
            batch = self._decode([images[i] for i in for_dali]) if for_dali else None
            if batch is not None and not others:
                return batch
            together = torch.empty(
                (len(files), 3, *sides_of(self._size)),
                dtype=torch.uint8,
                memory_format=torch.channels_last,
                device=self._device,
            )
            if batch is not None:
                together[for_dali] = batch
            for i, image in zip(others, rest, strict=True):
                together[i].copy_(image)
                self._tally.add(files[i].name, images[i].header)
            return together
        except (ValueError, _DaliFailed):
            # torchvision decodes file by file and names the bad ones; if there is none, DALI was too strict
            return self._torchvision(files).to(self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu" if self._gpu is None else f"cuda:{self._gpu}")

    def _read(self, files: Sequence[ImageFile]) -> list[_EncodedImage]:
        """Reads every file. Raises ValueError if one is bad."""
        # threads make no difference for files in the page cache, but read twice as fast from the disk. each thread
        # takes a chunk of the files, because a task per file would cost as much as reading it
        share = -(-len(files) // self._threads) or 1
        chunks = [files[start : start + share] for start in range(0, len(files), share)]
        return [image for chunk in self._pool.map(self._read_chunk, chunks) for image in chunk]

    def _read_chunk(self, files: Sequence[ImageFile]) -> list[_EncodedImage]:
        images = []
        for file in files:
            data = read_file(file)
            header = read_header(data)
            check_size(header, self._size, resize=self._resize, upscale=self._upscale)
            images.append(_EncodedImage(data, header))
        return images

    def _takes(self, image: _EncodedImage) -> bool:
        # the anchors are those of the upright image: DALI would cut a turned one in the wrong place
        return image.for_dali and (self._resize or image.header.orientation == UPRIGHT)

    def _decode(self, images: Sequence[_EncodedImage]) -> Tensor:
        encoded = [np.frombuffer(image.data, np.uint8) for image in images]
        with self._lock:
            pipeline = self._pipeline_for(len(images))
            try:
                pipeline.feed_input("encoded", encoded)
                if not self._resize:
                    pipeline.feed_input("anchors", self._anchors([image.header for image in images]))
                # without a stream to order them on, the outputs are complete on return, on a GPU as well
                (output,) = pipeline.run()
            except RuntimeError as error:
                # a pipeline that raised cannot be used again
                self._pipeline = None
                raise _DaliFailed from error
        if self._resize:
            decoded = [from_dlpack(output[i]) for i in range(len(images))]
            return self._resized(decoded, [image.header.orientation for image in images])
        batch = from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        if self._gpu is None:
            return batch
        # a copy, because on a GPU torch cannot keep DALI from reusing its memory
        batch = batch.clone(memory_format=torch.channels_last)
        torch.cuda.current_stream(self._gpu).synchronize()
        return batch

    def _anchors(self, headers: Sequence[Header]) -> NDArray[np.int32]:
        """Top and left of each crop, int32 (B, 2), rounded as by torchvision's `CenterCrop`."""
        height, width = sides_of(self._size)
        margins = [(header.height - height, header.width - width) for header in headers]
        return np.array([(round(y / 2), round(x / 2)) for y, x in margins], np.int32)

    def _resized(self, images: Sequence[Tensor], orientations: Sequence[int]) -> Tensor:
        """Turns, resizes and crops whole images, (H, W, 3) each, to uint8 (B, 3, *size)."""
        shape = (len(images), 3, *sides_of(self._size))
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, device=self._device)

        def resize(row: Tensor, image: Tensor, orientation: int) -> None:
            row.copy_(resize_and_crop(turn(image.permute(2, 0, 1), orientation), self._size, resize=True))

        if self._gpu is None:
            list(self._pool.map(resize, batch, images, orientations))
        else:
            for row, image, orientation in zip(batch, images, orientations, strict=True):
                resize(row, image, orientation)
            torch.cuda.current_stream(self._gpu).synchronize()
        return batch

    def _pipeline_for(self, batch_size: int) -> Any:
        """A pipeline for batches of at least `batch_size`: the last one, if that is large enough."""
        if self._pipeline is None or batch_size > self._batch_size:
            self._batch_size = max(self._batch_size, batch_size)
            self._pipeline = _build(
                sides_of(self._size),
                resize=self._resize,
                batch_size=self._batch_size,
                threads=self._threads,
                gpu=self._gpu,
            )
        return self._pipeline


class _DaliFailed(Exception):
    """DALI did not decode a batch."""


@dataclass(frozen=True, slots=True)
class _EncodedImage:
    """The bytes of a file, and its header."""

    data: bytes
    header: Header

    @property
    def for_dali(self) -> bool:
        # of a truncated file, DALI either fails or, if the crop is not affected, notices nothing
        complete = looks_complete(self.data[:12], self.data[-64:], len(self.data))
        return self.header.plain and complete and scan_is_clean(self.data, self.header)


def _build(sides: tuple[int, int], *, resize: bool, batch_size: int, threads: int, gpu: int | None) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    # the dynamic executor allocates new memory for every output
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=gpu, prefetch_queue_depth=1, exec_dynamic=True
    )
    options: dict[str, Any] = {
        "device": "cpu" if gpu is None else "mixed",
        "output_type": types.DALIImageType.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        if resize:
            images = fn.decoders.image(encoded, **options)
        else:
            # by anchors, because DALI's centre crop rounds odd margins differently from torchvision
            anchors = fn.external_source(name="anchors", dtype=types.DALIDataType.INT32, ndim=1)
            crop: dict[str, Any] = {"start": anchors, "shape": list(sides), "axis_names": "HW"}
            if gpu is None:
                images = fn.decoders.image_slice(encoded, **crop, **options)
            else:
                # DALI decodes no part of an image with fancy upsampling where nvJPEG is older than 13.2: it warns of
                # every image and decodes it on the CPU
                images = fn.slice(fn.decoders.image(encoded, **options), **crop)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
