"""fastle-train: trains a run, or goes on with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from rich.console import Console

from fastle.config import OPTIONS, ConfigError, RunConfig
from fastle.data import CacheChoice, DecoderChoice, train_size
from fastle.data.cifar10 import download_cifar10
from fastle.data.order import steps_per_epoch
from fastle.machine import from_torchrun, pick_device
from fastle.method.model import Autoencoder
from fastle.options import Group, Option
from fastle.presets import make_config
from fastle.profiling.profile import profile
from fastle.training.loop import make_loading, total_steps, train
from fastle.training.trainer import StepMode

from .cli import DEVICE, Output, Parser, add_option, one_line_errors, wrapped

MEETING_SECONDS = 60.0  # for ranks to meet
END_SECONDS = 20.0  # for ranks to part from each other after an error

# flags that are not settings of the run: it computes the same with others
FLAGS = {
    flag.name: flag
    for flag in (
        Option(name="download", kind=bool, help="fetch CIFAR-10 into --data first", group="data"),
        replace(DEVICE, group="speed"),
        Option(
            name="step",
            choices=("auto", *get_args(StepMode)),
            help="compiled: by torch.compile; captured: that and the update as one CUDA graph",
            default="captured on one GPU, compiled on several, eager on a CPU",
            group="speed",
        ),
        Option(
            name="decoder",
            choices=get_args(DecoderChoice),
            help="what decodes image files: dali and torchvision give the same pixels, dali-gpu others",
            default="dali where it can be had",
            group="speed",
        ),
        Option(
            name="cache",
            choices=get_args(CacheChoice),
            help="where decoded images are kept, for later runs too; none decodes them in every epoch",
            default="the first of device, host and disk that has room",
            group="speed",
        ),
        Option(
            name="profile",
            kind=int,
            at_least=1,
            help="measure N steps instead of training: phases, rates, and traces in the run's profile/",
            group="speed",
        ),
        Option(name="against", choices=("eager",), help="with --profile: the plain eager step too", group="speed"),
        Option(
            name="run",
            help="the run directory",
            default="runs/ and a name made of dataset and setting",
            group="output",
            metavar="DIR",
        ),
        Option(name="overwrite", kind=bool, help="start anew where there is a run already", group="output"),
        Option(
            name="accept_new_data",
            kind=bool,
            help="go on with a run although its training images have changed",
            group="data",
        ),
        Option(name="dry_run", kind=bool, help="print the configuration and stop", group="output"),
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    """fastle-train: trains a run, or goes on with it."""
    with one_line_errors("fastle-train"):
        flags = vars(_parser().parse_args(argv))
        for name, flag in FLAGS.items():
            if flags[name] is not None:
                flag.check(flags[name])
        config = make_config(**{name: value for name, value in flags.items() if name not in FLAGS})
        path = Path(flags["run"] or _default_run(config))
        rank, world_size = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
        _check_profile(flags, world_size)
        console = Output(quiet=rank > 0)
        _show_config(config, path, console)
        if flags["dry_run"]:
            return
        if flags["download"] and config.data.dataset != "cifar10":
            raise ConfigError(f"--download fetches CIFAR-10 only, not {config.data.dataset}")
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


def _check_profile(flags: dict[str, Any], world_size: int) -> None:
    if flags["profile"] is None:
        if flags["against"] is not None:
            raise ConfigError(f"--against {flags['against']} has no effect without --profile N")
        return
    for name in ("overwrite", "accept_new_data", "dry_run"):
        if flags[name]:
            raise ConfigError(f"{FLAGS[name].flag} has no effect with --profile, which trains nothing")
    if world_size > 1:
        raise ConfigError("--profile measures one process: start it without torchrun")


def _pick_step(requested: StepMode | Literal["auto"], device: torch.device, world_size: int) -> StepMode:
    if requested != "auto":
        return requested
    if device.type != "cuda":
        # compiling takes longer than it saves in a short run
        return "eager"
    return "captured" if world_size == 1 else "compiled"


def _parser() -> Parser:
    parser = Parser(
        prog="fastle-train",
        # argparse would list every flag twice
        usage="%(prog)s DATASET [options]",
        allow_abbrev=False,
        description="Train an autoencoder that teaches itself. The dataset picks a preset, and flags override it.",
        epilog="The same command again goes on where the run stopped.",
    )
    groups = {name: parser.add_argument_group(name) for name in get_args(Group)}
    for option in (*OPTIONS.values(), *FLAGS.values()):
        add_option(parser if option.name == "dataset" else groups[option.group], option)
    return parser


def _default_run(config: RunConfig) -> str:
    parts = [
        config.data.dataset,
        "masked" if config.objective.masked else "",
        str(config.model.latent or ""),
        "pixel" if config.objective.name == "pixel" else "",
    ]
    return "runs/" + "-".join(part for part in parts if part)


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
