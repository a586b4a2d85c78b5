"""What fastle-train does, once it knows what it is asked for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console

from fastle.choices import CacheChoice, DecoderChoice, StepMode
from fastle.config import ConfigError, RunConfig
from fastle.data import train_size
from fastle.data.cifar10 import download_cifar10
from fastle.data.order import steps_per_epoch
from fastle.machine import from_torchrun, pick_device
from fastle.method.model import Autoencoder
from fastle.profiling.profile import profile
from fastle.training.loop import make_loading, total_steps, train
from fastle.training.run import PAGE
from fastle.web.page import write_page

from .cli import Output, wrapped

MEETING_SECONDS = 60.0  # for ranks to meet
END_SECONDS = 20.0  # for ranks to part from each other after an error


def run(config: RunConfig, path: Path, flags: dict[str, Any]) -> None:
    """Trains, measures or shows a run.

    Args:
        config: The run.
        path: Its directory.
        flags: The other flags by name, checked; those that nobody gave are None.
    """
    rank, world_size = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
    if flags["profile"] is not None and world_size > 1:
        raise ConfigError("--profile measures one process: start it without torchrun")
    console = Output(quiet=rank > 0)
    _show_config(config, path, console)
    if flags["dry_run"]:
        return
    with _process_group(pick_device(flags["device"] or "auto", console), world_size) as device:
        if flags["download"]:
            _download(config, world_size)
        mode = _pick_step(flags["step"] or "auto", device, world_size)
        decoder: DecoderChoice = flags["decoder"] or "auto"
        cache: CacheChoice = flags["cache"] or "auto"
        if flags["profile"] is not None:
            against = flags["against"] is not None
            loading = make_loading(decoder, cache, device, console)
            profile(
                config,
                path,
                steps=flags["profile"],
                device=device,
                console=console,
                loading=loading,
                mode=mode,
                against=against,
            )
            return
        train(
            config,
            path,
            device=device,
            console=console,
            mode=mode,
            decoder=decoder,
            cache=cache,
            overwrite=bool(flags["overwrite"]),
            accept_new_data=bool(flags["accept_new_data"]),
            rank=rank,
            world_size=world_size,
        )
    if rank == 0:
        page = path / PAGE
        write_page([path], page)
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def _pick_step(requested: StepMode | Literal["auto"], device: torch.device, world_size: int) -> StepMode:
    if requested != "auto":
        return requested
    if device.type != "cuda":
        # compiling takes longer than it saves in a short run
        return "eager"
    return "captured" if world_size == 1 else "compiled"


def _show_config(config: RunConfig, path: Path, console: Console) -> None:
    """Prints the whole configuration, and what follows from it."""

    def show(label: str, *items: str) -> None:
        console.print(wrapped(label, list(items)), highlight=False, markup=False, soft_wrap=True)

    for group, values in config.settings().items():
        show(group, *(f"{name.replace('_', '-')} {value}" for name, value in values.items()))
    # built without memory: only its shapes are asked for
    with torch.device("meta"):
        count = Autoencoder(config.model).parameter_count()
    latent = " x ".join(map(str, config.model.latent_shape))
    show("parameters", f"{count / 1e6:.2f} M", f"compression {config.model.compression:g}x", f"latent {latent}")
    show("steps", _length(config))
    show("run", str(path))


def _length(config: RunConfig) -> str:
    images = train_size(config.data)
    if images is None:
        return (
            f"{config.train.steps:,}"
            if config.train.steps
            else f"{config.train.epochs} epochs of --data, which is not there"
        )
    epoch_steps = steps_per_epoch(images, config.train.batch_size)
    total = total_steps(config, epoch_steps)
    return f"{total:,} ({total / epoch_steps:.3g} epochs of {epoch_steps:,})"


def _download(config: RunConfig, world_size: int) -> None:
    if config.data.root is None:
        raise ConfigError("--download needs --data, the folder to fetch CIFAR-10 into")
    # the processes of one machine share the folder
    if from_torchrun("LOCAL_RANK", 0) == 0:
        download_cifar10(Path(config.data.root))
    if world_size > 1:
        dist.barrier()


@contextmanager
def _process_group(device: torch.device, world_size: int) -> Iterator[torch.device]:
    if world_size == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch would wait half an hour for a rank that is gone, and in several places
    absent = f"the {world_size} processes have not met within {MEETING_SECONDS:g} s: start all of them again"
    with _ends_after(MEETING_SECONDS, absent):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except BaseException:
        # the error has its own line
        with _ends_after(END_SECONDS, ""):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _ends_after(seconds: float, fault: str) -> Iterator[None]:
    """Ends the process, with a fault's line if there is one, if what this surrounds takes longer."""

    def end() -> None:
        if fault:
            rank = from_torchrun("RANK", 0)
            print(f"fastle-train (rank {rank}): error: {fault}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
