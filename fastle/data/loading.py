"""How images are loaded: what decodes them, where decoded images are kept, and how progress is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastle.choices import CacheChoice, DecoderChoice
from fastle.config import Size
from fastle.errors import DataError

from . import dali
from .decode import Decoder, Tally, TorchvisionDecoder

CPU = torch.device("cpu")


def _silent(text: str) -> None:
    """Ignores a message."""


def _untracked(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images are loaded. It does not change the results of a run, except that "dali-gpu" gives other pixels.

    Attributes:
        decoder: "dali" and "torchvision" give the same pixels; "auto" is DALI if it is available. "dali-gpu" decodes on
            the GPU, with slightly different pixels.
        cache: Where decoded images are kept: "device" is the GPU, "host" the host's memory, "disk" a packed
            file; "none" decodes every image in every epoch. "auto" takes the first of these that has room.
        device: The device that trains.
        processes: The number of processes on this machine that keep images in memory.
        say: Shows a message to the user.
        track: (items, description, total) → the same items, with a progress bar.
        tally: Counts the files that Pillow decodes and those with more than 8 bits.
    """

    decoder: DecoderChoice = "auto"
    cache: CacheChoice = "none"
    device: torch.device = CPU
    processes: int = 1
    say: Callable[[str], object] = _silent
    track: Callable[[Iterable[Any], str, int], Iterable[Any]] = _untracked
    tally: Tally = field(default_factory=Tally, compare=False)


def make_decoder(
    loading: Loading, *, size: Size, channels: int, resize: bool, upscale: bool = False, bits: int = 8
) -> Decoder:
    """Makes the decoder that `loading` asks for, with a message if "auto" cannot take the fastest.

    Args:
        loading: How images are loaded.
        size, channels, resize, upscale, bits: See `TorchvisionDecoder`.

    Raises:
        DataError: The decoder is unavailable. The message says why.
    """
    choice, missing = loading.decoder, dali.why_no_dali()
    if unable := "colour images only" if channels != 3 else "8 bits only" if bits != 8 else None:
        if choice in ("dali", "dali-gpu"):
            raise DataError(f"--decoder {choice} decodes {unable}; use --decoder torchvision")
        if choice == "auto":
            loading.say(f"decoder: torchvision, because DALI decodes {unable}")
        return TorchvisionDecoder(size, channels, resize, upscale=upscale, bits=bits, tally=loading.tally)
    if choice in ("dali", "dali-gpu") and missing:
        raise DataError(f"--decoder {choice} is unavailable: {missing}; use --decoder torchvision")
    if choice == "dali-gpu" and loading.device.type != "cuda":
        raise DataError(
            f"--decoder dali-gpu is unavailable: it needs a CUDA GPU, not a {loading.device.type}; use dali"
        )
    if choice == "auto" and missing:
        loading.say(f"decoder: torchvision, about half as fast as DALI, which is unavailable: {missing}")
    if choice == "torchvision" or missing:
        return TorchvisionDecoder(size, channels, resize, upscale=upscale, tally=loading.tally)
    gpu = (loading.device.index or 0) if choice == "dali-gpu" else None
    return dali.DaliDecoder(size, resize=resize, gpu=gpu, upscale=upscale, tally=loading.tally)
