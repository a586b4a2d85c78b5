"""fastle-train: trains a run, or goes on with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from rich.console import Console

from fastle.config import (
    BadImages,
    ConfigError,
    DatasetName,
    JudgeName,
    JudgeStatistics,
    ObjectiveName,
    Precision,
    RunConfig,
    TransformName,
)
from fastle.data import CacheChoice, DecoderChoice, train_size
from fastle.data.cifar10 import download_cifar10
from fastle.data.order import steps_per_epoch
from fastle.machine import from_torchrun, pick_device
from fastle.method.model import Autoencoder
from fastle.presets import make_config
from fastle.profiling.profile import profile
from fastle.training.loop import make_loading, total_steps, train
from fastle.training.trainer import StepMode

from .cli import Parser, add_device, one_line_errors

# flags that are not settings of the run
NOT_CONFIG = (
    "run", "overwrite", "dry_run", "download", "device", "step", "decoder", "cache", "profile", "against",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """fastle-train: trains a run, or goes on with it."""
    with one_line_errors("fastle-train"):
        flags = vars(_parser().parse_args(argv))
        config = make_config(**{name: value for name, value in flags.items() if name not in NOT_CONFIG})
        path = Path(flags["run"] or _default_run(config))
        rank, world_size = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
        _check_profile(flags, world_size)
        console = Console(quiet=rank > 0)
        _show_config(config, path, console)
        if flags["dry_run"]:
            return
        if flags["download"] and config.data.dataset != "cifar10":
            raise ConfigError(f"--download fetches CIFAR-10 only, not {config.data.dataset}")
        with _process_group(pick_device(flags["device"], console), world_size) as device:
            if flags["download"]:
                _download(config, world_size)
            mode = _pick_step(flags["step"], device, world_size)
            if flags["profile"] is not None:
                against = flags["against"] is not None
                loading = make_loading(flags["decoder"], flags["cache"], device, console)
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
                decoder=flags["decoder"],
                cache=flags["cache"],
                overwrite=flags["overwrite"],
                rank=rank,
                world_size=world_size,
            )


def _check_profile(flags: dict[str, Any], world_size: int) -> None:
    if flags["profile"] is None:
        if flags["against"] is not None:
            raise ConfigError(f"--against {flags['against']} has no effect without --profile N")
        return
    if flags["profile"] < 1:
        raise ConfigError(f"--profile {flags['profile']} cannot be: it must be at least 1")
    for name in ("overwrite", "dry_run"):
        if flags[name]:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with --profile, which trains nothing")
    if world_size > 1:
        raise ConfigError("--profile measures one process: start it without torchrun")


def _pick_step(requested: StepMode | Literal["auto"], device: torch.device, world_size: int) -> StepMode:
    if requested != "auto":
        return requested
    if device.type != "cuda":
        # compiling takes longer than it saves in a short run
        return "eager"
    return "captured" if world_size == 1 else "compiled"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastle-train",
        allow_abbrev=False,
        description="Train an autoencoder that teaches itself. The dataset picks a preset, flags override it.",
        epilog="The same command again goes on where the run stopped.",
    )

    def flag(name: str, kind: Any, text: str, metavar: str | None = None, **more: Any) -> None:
        choices = more.get("choices") or get_args(kind)
        more |= {"choices": choices} if choices else {"type": kind, "metavar": metavar or "N"}
        parser.add_argument(name, help=text, **more)

    flag("dataset", DatasetName, "shapes are made on the fly; folder is any tree of images")
    flag("--data", str, "where the images are", "DIR")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into --data first")
    flag("--size", int, "height and width of the images, pixels, divisible by 8 (default: the preset's)")
    flag("--latent", int, "features of a pooled latent (default: the preset's spatial one; 128 with --masked)")
    parser.add_argument("--masked", action="store_true", help="cut a hole into the input: the symmetric masked setting")
    flag(
        "--objective",
        ObjectiveName,
        "the method, or its pixel baseline (default: %(default)s)",
        default="self-teaching",
    )
    flag("--judge", JudgeName, "who compares (default: step-frozen)")
    flag("--judge-statistics", JudgeStatistics, "whose moments normalise reconstructions (default: the preset's)")
    flag("--transform", TransformName, "what the judge is shown (default: crop-resize)")
    flag("--crop-ratio", float, "side of the crop over the image's (default: the preset's)", "R")
    flag("--crop-ratio-max", float, "draw the side for each step, log-uniform from --crop-ratio to this", "R")
    flag("--crops", int, "crops of each image, each with a box of its own (default: %(default)s)", default=1)
    flag("--mask-ratio", float, "share of the hole (0.35), or of a mask transformation (0.7)", "R")
    flag("--noise-std", float, "of --transform noise, on images in [0, 1] (default: 0.1)", "S")
    flag("--sigreg-weight", float, "the weight λ of SIGReg (default: 0.03)", "W")
    flag("--slices", int, "random slices of SIGReg (default: 256)", "M")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="length of the run; a finished run goes on with more")
    length.add_argument("--epochs", type=int, metavar="N", help="the same in passes over the images")
    flag("--batch-size", int, "of all processes together (default: 128)")
    flag("--lr", float, "AdamW's learning rate (default: the preset's)", "LR")
    flag("--seed", int, "of weights, order and draws (default: %(default)s)", default=0)
    add_device(parser)
    flag(
        "--precision",
        Precision,
        "bf16 is autocast with fp32 weights and statistics (default: %(default)s)",
        default="fp32",
    )
    flag(
        "--step",
        None,
        "compiled: by torch.compile; captured: that and the update as one CUDA graph (default: captured on one GPU, "
        "compiled on several, eager on a CPU)",
        choices=("auto", *get_args(StepMode)),
        default="auto",
    )
    flag(
        "--decoder",
        None,
        "dali and torchvision: the same pixels; dali-gpu: others, on the GPU (default: dali where it can be had)",
        choices=get_args(DecoderChoice),
        default="auto",
    )
    flag(
        "--cache",
        None,
        "where decoded images are kept, in a file that later runs reuse; none: decoded anew in every epoch (default: "
        "the first of device, host and disk with room)",
        choices=get_args(CacheChoice),
        default="auto",
    )
    flag(
        "--bad-images",
        None,
        "images that cannot be used: all of them named in an error, or left out (default: %(default)s)",
        choices=get_args(BadImages),
        default="error",
    )
    flag("--run", str, "the run directory (default: runs/ and a name made of dataset and setting)", "DIR")
    flag("--profile", int, "measure N steps instead of training: phases, rates, and traces in the run's profile/")
    flag("--against", None, "with --profile: the plain eager step too, from a checkout", "eager", choices=("eager",))
    parser.add_argument("--overwrite", action="store_true", help="start anew where there is a run already")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
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
    """The whole configuration, and what follows from it."""
    for section, values in config.to_dict().items():
        settings = "  ".join(f"{name} {value}" for name, value in values.items() if value is not None)
        console.print(f"{section:<10} {settings}", highlight=False, markup=False, soft_wrap=True)
    # built without memory: only its shapes are asked for
    with torch.device("meta"):
        count = Autoencoder(config.model).parameter_count()
    latent = " x ".join(map(str, config.model.latent_shape))
    console.print(
        f"parameters {count / 1e6:.2f} M  compression {config.model.compression:g}x  latent {latent}", highlight=False
    )
    console.print(f"steps      {_length(config)}", highlight=False)
    console.print(f"run        {path}", highlight=False, markup=False, soft_wrap=True)


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
