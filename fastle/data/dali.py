"""Decoding by NVIDIA DALI: whole batches, only the crop of each image, in threads of its own or on a GPU."""

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

from .decode import ImageFile, TorchvisionDecoder, check_size, decode, default_threads, fit, read_file
from .header import Header, looks_whole, read_header, scan_is_clean


def why_no_dali() -> str | None:
    """Why DALI cannot be had here, in words that can follow a colon; None if it can."""
    try:
        import_module("nvidia.dali")
    except ModuleNotFoundError:
        return "it is not installed (nvidia-dali-cuda130, for Linux only)"
    except (ImportError, OSError) as error:
        return f"it cannot be imported ({str(error).splitlines()[0]})"
    return None


class DaliDecoder:
    """RGB images decoded by DALI: on the CPU the same pixels, bit for bit, as `TorchvisionDecoder` has them.

    What DALI might see otherwise or stumble over goes to torchvision: images that are not `plain`, files that do not
    end as they should, and every batch that DALI refuses, for it does not say which of the files is bad.

    Args:
        size: height and width handed out, pixels.
        resize: see `TorchvisionDecoder`.
        threads: of DALI and of what is left to torchvision; see there.
        gpu: the CUDA device that decodes and holds the batches; its pixels differ from the CPU's. None is the CPU.
    """

    def __init__(self, size: int, *, resize: bool, threads: int | None = None, gpu: int | None = None) -> None:
        self._size = size
        self._resize = resize
        self._threads = threads or default_threads()
        self._gpu = gpu
        self._torchvision = TorchvisionDecoder(size, 3, resize, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        # a pipeline takes one batch at a time, and training and evaluation may share a decoder
        self._lock = threading.Lock()
        self._pipeline: Any = None
        self._batch_size = 0

    def __call__(self, files: Sequence[ImageFile]) -> Tensor:
        """uint8 (B, 3, size, size), see `Decoder`; memory of DALI's own that is never written to again."""
        try:
            opened = self._open(files)
            for_dali = [i for i, image in enumerate(opened) if image.for_dali]
            others = [i for i, image in enumerate(opened) if not image.for_dali]
            rest = self._pool.map(lambda i: fit(decode(opened[i].data, 3), self._size, self._resize), others)
            batch = self._decode([opened[i] for i in for_dali]) if for_dali else None
            if batch is not None and not others:
                return batch
            together = torch.empty(
                (len(files), 3, self._size, self._size),
                dtype=torch.uint8,
                memory_format=torch.channels_last,
                device=self._device,
            )
            if batch is not None:
                together[for_dali] = batch
            for i, image in zip(others, rest, strict=True):
                together[i].copy_(image)
            return together
        except (ValueError, _Refused):
            # file by file, which names the bad ones; if there is none, DALI was too strict
            return self._torchvision(files).to(self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu" if self._gpu is None else f"cuda:{self._gpu}")

    def _open(self, files: Sequence[ImageFile]) -> list[_Opened]:
        """Every file, read; ValueError if one is bad."""
        # no faster than one thread while the files are in memory, but twice as fast when they come from the disk. each
        # thread takes a run of them: a task for each file would cost as much as reading it
        share = -(-len(files) // self._threads) or 1
        runs = [files[start : start + share] for start in range(0, len(files), share)]
        return [image for run in self._pool.map(self._open_run, runs) for image in run]

    def _open_run(self, files: Sequence[ImageFile]) -> list[_Opened]:
        opened = []
        for file in files:
            data = read_file(file)
            header = read_header(data)
            check_size(header, self._size)
            opened.append(_Opened(data, header))
        return opened

    def _decode(self, images: Sequence[_Opened]) -> Tensor:
        encoded = [np.frombuffer(image.data, np.uint8) for image in images]
        with self._lock:
            pipeline = self._pipeline_for(len(images))
            try:
                pipeline.feed_input("encoded", encoded)
                if not self._resize:
                    pipeline.feed_input("anchors", self._anchors([image.header for image in images]))
                # without a stream to order them on, outputs are complete when they are handed out, on a GPU as well
                (output,) = pipeline.run()
            except RuntimeError as error:
                # a pipeline that raised is of no more use
                self._pipeline = None
                raise _Refused from error
        if self._resize:
            return self._resized([from_dlpack(output[i]) for i in range(len(images))])
        batch = from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        if self._gpu is None:
            return batch
        # torch's own copy: when DALI may use its memory again is not torch's to say on a GPU
        batch = batch.clone(memory_format=torch.channels_last)
        torch.cuda.current_stream(self._gpu).synchronize()
        return batch

    def _anchors(self, headers: Sequence[Header]) -> NDArray[np.int32]:
        """Top and left of each crop, int32 (B, 2), rounded as torchvision's `CenterCrop` does."""
        margins = [(header.height - self._size, header.width - self._size) for header in headers]
        return np.array([(round(y / 2), round(x / 2)) for y, x in margins], np.int32)

    def _resized(self, images: Sequence[Tensor]) -> Tensor:
        """The resized crops of whole images, (H, W, 3) each."""
        shape = (len(images), 3, self._size, self._size)
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, device=self._device)

        def resize(row: Tensor, image: Tensor) -> None:
            row.copy_(fit(image.permute(2, 0, 1), self._size, resize=True))

        if self._gpu is None:
            list(self._pool.map(resize, batch, images))
        else:
            for row, image in zip(batch, images, strict=True):
                resize(row, image)
            torch.cuda.current_stream(self._gpu).synchronize()
        return batch

    def _pipeline_for(self, batch_size: int) -> Any:
        """A pipeline for batches of up to that many, the last one if it will do."""
        if self._pipeline is None or batch_size > self._batch_size:
            self._batch_size = max(self._batch_size, batch_size)
            self._pipeline = _build(
                self._size, resize=self._resize, batch_size=self._batch_size, threads=self._threads, gpu=self._gpu
            )
        return self._pipeline


class _Refused(Exception):
    """DALI did not decode a batch."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file that is read, and what its header says."""

    data: bytes
    header: Header

    @property
    def for_dali(self) -> bool:
        # it would not see that a file is cut off below the crop, and would die of it above
        whole = looks_whole(self.data[:12], self.data[-64:], len(self.data))
        return self.header.plain and whole and scan_is_clean(self.data, self.header)


def _build(size: int, *, resize: bool, batch_size: int, threads: int, gpu: int | None) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    # the dynamic executor gives every output memory of its own
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
            pipeline.set_outputs(fn.decoders.image(encoded, **options))
        else:
            # image_crop rounds odd margins in a way of its own
            anchors = fn.external_source(name="anchors", dtype=types.DALIDataType.INT32, ndim=1)
            crop = fn.decoders.image_slice(
                encoded,
                anchors,
                np.array([size, size], np.int32),
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                **options,
            )
            pipeline.set_outputs(crop)
    pipeline.build()
    return pipeline
