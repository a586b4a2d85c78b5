"""What fastle-train does, once it knows what it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from fastle.config import ConfigError, RunConfig
from fastle.data import train_size
from fastle.data.cifar10 import download_cifar10
from fastle.data.order import steps_per_epoch
from fastle.fitting import fit, pick_mode, process_group
from fastle.machine import find_device, from_torchrun, pick_device
from fastle.method.model import Autoencoder
from fastle.profiling.profile import profile
from fastle.training.loop import make_loading, total_steps
from fastle.training.precision import with_precision

from .cli import Output, wrapped


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
    config = with_precision(config, find_device(flags["device"] or "auto"), None if flags["overwrite"] else path)
    _show_config(config, path, console)
    if flags["dry_run"]:
        return
    device = pick_device(flags["device"] or "auto", console)
    with process_group(device, world_size):
        if flags["download"]:
            _download(config, world_size)
        choices: dict[str, Any] = {name: flags[name] or "auto" for name in ("step", "decoder", "cache")}
        if flags["profile"] is not None:
            profile(
                config,
                path,
                steps=flags["profile"],
                device=device,
                console=console,
                loading=make_loading(choices["decoder"], choices["cache"], device, console),
                mode=pick_mode(choices["step"], device, world_size),
                against=flags["against"] is not None,
            )
            return
        fit(
            config,
            run=path,
            device=device,
            overwrite=bool(flags["overwrite"]),
            accept_new_data=bool(flags["accept_new_data"]),
            progress=console,
            **choices,
        )


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
