"""How images are brought to the device: what decodes them, where decoded ones are kept, who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastle.errors import DataError

from . import dali
from .decode import Decoder, TorchvisionDecoder

DecoderChoice = Literal["auto", "dali", "dali-gpu", "torchvision"]
CacheChoice = Literal["auto", "device", "host", "disk", "none"]
CPU = torch.device("cpu")


def _silent(text: str) -> None:
    """Says nothing."""


def _untracked(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What no result of a run depends on (but for "dali-gpu", whose pixels are its own).

    Attributes:
        decoder: "dali" and "torchvision" give the same pixels; "auto" is DALI where it can be had. "dali-gpu" decodes
            on the GPU.
        cache: where decoded images are kept: on the device, in the host's memory or memory-mapped on disk; "none"
            decodes every image again in every epoch. "auto" takes the first of these that has room.
        device: of the training.
        processes: of this machine that keep images in memory.
        say: for a line to the user.
        track: (items, description, total) → the same items, with a progress bar.
    """

    decoder: DecoderChoice = "auto"
    cache: CacheChoice = "none"
    device: torch.device = CPU
    processes: int = 1
    say: Callable[[str], object] = _silent
    track: Callable[[Iterable[Any], str, int], Iterable[Any]] = _untracked


def make_decoder(loading: Loading, *, size: int, channels: int, resize: bool) -> Decoder:
    """The decoder that `loading` asks for; says so if it is not the fastest.

    Args:
        size, channels, resize: see `TorchvisionDecoder`.

    Raises:
        DataError: it cannot be had; the message says why.
    """
    choice, missing = loading.decoder, dali.why_no_dali()
    if channels != 3:
        if choice in ("dali", "dali-gpu"):
            raise DataError(f"--decoder {choice} decodes colour images only; use --decoder torchvision")
        if choice == "auto":
            loading.say("decoder: torchvision, because DALI decodes colour images only")
        return TorchvisionDecoder(size, channels, resize)
    if choice in ("dali", "dali-gpu") and missing:
        raise DataError(f"--decoder {choice} cannot be had: {missing}; use --decoder torchvision")
    if choice == "dali-gpu" and loading.device.type != "cuda":
        raise DataError(f"--decoder dali-gpu cannot be had: it needs a CUDA GPU, not a {loading.device.type}; use dali")
    if choice == "auto" and missing:
        loading.say(f"decoder: torchvision, some two times slower than DALI: {missing}")
    if choice == "torchvision" or missing:
        return TorchvisionDecoder(size, channels, resize)
    gpu = (loading.device.index or 0) if choice == "dali-gpu" else None
    return dali.DaliDecoder(size, resize=resize, gpu=gpu)
