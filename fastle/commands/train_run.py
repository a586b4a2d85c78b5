"""What fastle-train does once its flags are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastle.config import ConfigError, RunConfig
from fastle.data.celeba import download_celeba
from fastle.data.cifar10 import download_cifar10
from fastle.errors import FastleError
from fastle.fitting import fit, pick_mode, process_group
from fastle.machine import find_device, from_torchrun, pick_device
from fastle.profiling.profile import profile
from fastle.training.loop import make_loading
from fastle.training.precision import with_precision
from fastle.training.run import PAGE
from fastle.web.page import write_page

from .cli import Output
from .show import show_config


def run(config: RunConfig, path: Path, flags: dict[str, Any]) -> None:
    """Trains or measures a run.

    Args:
        config: The run.
        path: Its directory.
        flags: The other flags by name, checked; those that were not given are None.
    """
    rank, world_size = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
    if flags["profile"] is not None and world_size > 1:
        raise ConfigError("--profile measures one process: start it without torchrun")
    console = Output(quiet=rank > 0)
    device = find_device(flags["device"] or "auto")
    if flags["profile"] is not None and device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--profile measures CPUs and CUDA GPUs, not {device}: give --device cpu")
    config = with_precision(config, device, None if flags["overwrite"] else path)
    show_config(config, path, console)
    device = pick_device(flags["device"] or "auto", console)
    with process_group(device, world_size):
        if flags["download"]:
            _download(config, world_size, console)
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
            log=flags["log"],
            **choices,
        )
    if rank == 0:
        _write_page(path, console)


def _write_page(run: Path, console: Output) -> None:
    page = run / PAGE
    try:
        write_page([run], page)
        line = f"report: {page}"
    # the training is done and saved: a page that can be made again is no reason to fail
    except (FastleError, OSError) as error:
        line = f"the run is complete without its {PAGE} ({error}): `fastle report {run} -o OUT.html` makes one"
    console.say(line)


def _download(config: RunConfig, world_size: int, console: Output) -> None:
    if config.data.root is None:
        raise ConfigError("--download needs --data, the folder to download into")
    root = Path(config.data.root)
    # the processes of one machine share the folder
    if from_torchrun("LOCAL_RANK", 0) == 0 and config.data.dataset == "cifar10":
        download_cifar10(root)
    elif from_torchrun("LOCAL_RANK", 0) == 0:
        download_celeba(root, console.say)
    if world_size > 1:
        dist.barrier()
