"""Training from Python. `fit` is all of it; fastle-train is a thin layer over it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from .choices import (
    CACHE,
    DECODER,
    DEVICE,
    LOG,
    STEP,
    CacheChoice,
    DecoderChoice,
    LoggerName,
    StepMode,
)
from .config import OPTIONS, ConfigError, DataConfig, RunConfig
from .data import Identity, Images, Loading, open_training, open_tree
from .data.given import open_all_given, open_given, shape_of
from .machine import from_torchrun, pick_device
from .method.contract import own_parts
from .method.judge import FrozenJudge
from .method.model import Autoencoder
from .method.transforms import Transform
from .presets import default_run, make_config
from .training.evaluate import evaluate as measure
from .training.loop import Execution, Hooks, make_loading, train
from .training.report import read_metrics

MEETING_SECONDS = 60.0  # for ranks to meet
END_SECONDS = 20.0  # for ranks to part from each other after an error


@dataclass(frozen=True, slots=True)
class Result:
    """What a training has made.

    Attributes:
        model: With its last weights, in evaluation mode, on the device of the training.
        metrics: The rows of metrics.jsonl, from the first step of the run.
        run: The run directory.
    """

    model: Autoencoder
    metrics: list[dict[str, Any]]
    run: Path


def fit(
    config: RunConfig | str | None = None,
    *,
    data: Any = None,
    valid: Any = None,
    run: str | Path | None = None,
    model: tuple[nn.Module, nn.Module] | None = None,
    judge: str | FrozenJudge | None = None,
    transform: str | Transform | None = None,
    on_report: Callable[[dict[str, Any], Autoencoder], object] | None = None,
    on_checkpoint: Callable[[Path], object] | None = None,
    device: str | torch.device = "auto",
    step: StepMode | Literal["auto"] = "auto",
    decoder: DecoderChoice = "auto",
    cache: CacheChoice = "auto",
    overwrite: bool = False,
    accept_new_data: bool = False,
    progress: bool | Console = False,
    log: LoggerName | None = None,
    **settings: Any,
) -> Result:
    """Trains an autoencoder, or goes on with a run. It computes what `fastle-train` does with the same settings.

    Example:
        >>> result = fit(data="photographs", size=64, steps=2000, run="runs/mine")
        >>> z = result.model.encode(images)

    Args:
        config: A whole configuration, or the name of a dataset: "shapes", "cifar10", "celeba" or "folder", which is
            what `data` alone means.
        data: The folder of the dataset, or images: a tensor or an array (N, C, H, W), uint8 or floating in [0, 1], or
            anything with a length and an index (a map-style torch `Dataset`, a Hugging Face dataset), whose items are
            such images, PIL images, pairs that begin with an image, or mappings with "image". Floats are rounded to 8
            bits; with bits=16 they stay as they are, and images may be uint16, too.
        valid: Images to validate, given like `data`; by default one in twenty of those is held out.
        run: The run directory; by default runs/ and a name made of dataset and setting. The same call again goes on
            where the run stopped, or returns what it made.
        model: An encoder and a decoder of your own in place of fastle's, which are moved to the device and trained in
            place. The encoder maps images (B, C, H, W) in [0, 1] to its features, from shallow to deep: a tensor, or
            several in a tuple or a list. The last is the code, (B, D) or (B, c, h, w), which becomes the latent by a
            BatchNorm of fastle's. The decoder maps latents to images in [0, 1].
        judge: "step-frozen", "live" or "ema", or a network of your own, `fastle.frozen(network)`.
        transform: The name of a transformation, or one of your own, with draw, views and full_view: see
            `fastle.method.transforms.Transform`.
        on_report: Called on rank 0 after each of the run's ten reports, with the row of metrics and the model.
        on_checkpoint: Called on rank 0 with the path of each checkpoint, once it is on disk.
        device, step, decoder, cache, overwrite, accept_new_data: See `fastle-train --help`.
        progress: Whether to print what fastle-train prints, or the console to print it on. Warnings about slow or
            unexpected choices are printed in any case, without progress on stderr.
        log: A logger that gets metrics and grids too: "tensorboard", "wandb" or "trackio". If it fails, the run goes
            on without it.
        settings: Any of `make_config`'s overrides, such as `size` (a number, or height and width as a pair), `steps`,
            `batch_size`, `lr` and `recipe`.

    Raises:
        FastleError: A setting, an image, a network, the run directory or a checkpoint cannot be used, or the loss is
            not finite.
        KeyboardInterrupt: Ctrl-C, or another signal that stops a training. The run has been saved.
    """
    images = data if data is not None and not isinstance(data, (str, Path)) else None
    settings |= {name: value for name, value in (("judge", judge), ("transform", transform)) if isinstance(value, str)}
    made = _config(config, data, images, settings)
    if images is None and valid is not None:
        raise ConfigError("valid has no effect with a dataset on disk, which has its own images to validate")
    if images is not None and (decoder, cache) != ("auto", "auto"):
        raise ConfigError("decoder and cache have no effect on images given in Python, which are not decoded")
    # "cuda:1" is a device of the kind "cuda"
    kind = str(device).split(":")[0]
    for option, value in ((DEVICE, kind), (STEP, step), (DECODER, decoder), (CACHE, cache), (LOG, log)):
        option.check(value)
    rank, world_size = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
    console = _console(progress, quiet=rank > 0)
    place = device if isinstance(device, torch.device) else pick_device(device, console)
    made, own = own_parts(
        made,
        settings,
        place,
        model=model,
        judge=None if isinstance(judge, str) else judge,
        transform=None if isinstance(transform, str) else transform,
    )
    path = Path(default_run(made) if run is None else run)
    execution = Execution(
        device=place, mode=pick_mode(step, place, world_size), decoder=decoder, cache=cache, rank=rank,
        world_size=world_size,
    )  # fmt: skip

    def open_images(run_config: RunConfig, loading: Loading) -> tuple[Images, Images, Identity]:
        if images is None:
            return open_training(run_config.data, loading)
        return open_given(images, valid, run_config.data, loading.say)

    with process_group(place, world_size):
        trainer = train(
            made,
            path,
            execution,
            console=console,
            progress=bool(progress),
            overwrite=overwrite,
            accept_new_data=accept_new_data,
            open_images=open_images,
            hooks=Hooks(on_report=on_report, on_checkpoint=on_checkpoint, log=log),
            own=own,
        )
    return Result(trainer.model.eval(), read_metrics(path / "metrics.jsonl"), path)


def evaluate(
    model: Autoencoder, data: Any, *, hole_ratio: float | None = None, perceptual: bool = False, bits: int | None = None
) -> dict[str, dict[str, float]]:
    """Measures a model's reconstructions of images that it was not trained on, as `fastle eval` does.

    Example:
        >>> evaluate(result.model, "held-out")

    Args:
        model: Any that `fit` or `Autoencoder.from_pretrained` returned, on the device that is to compute.
        data: A folder of images, or images as `fit` takes them.
        hole_ratio: The hole's share of the input, for the figures of the masked setting; None for none.
        perceptual: Whether LPIPS and FID are measured too. It needs the extra "perceptual".
        bits: Of each value that are kept, 8 or 16; by default as many as in the model's training.

    Returns:
        The figures under "clean" and, with a hole, "masked"; see `fastle.training.evaluate.evaluate`.

    Raises:
        FastleError: An image cannot be used, or there is none, or the perceptual networks cannot be had.
    """
    size, channels = model.config.size, model.config.channels
    device = next(model.parameters()).device
    bits = model.bits if bits is None else bits
    if isinstance(data, (str, Path)):
        config = DataConfig(dataset="folder", size=size, channels=channels, bits=bits)
        console = Console(stderr=True, force_terminal=False)
        images: Images = open_tree(config, Path(data), make_loading("auto", "none", device, console))
    else:
        OPTIONS["bits"].check(bits)
        images = open_all_given(data, size=size, channels=channels, bits=bits)
    return measure(model, images, hole_ratio=hole_ratio, device=device, perceptual=perceptual)


def _config(config: RunConfig | str | None, data: Any, images: Any, settings: dict[str, Any]) -> RunConfig:
    """The configuration that the arguments of `fit` describe."""
    if isinstance(config, RunConfig):
        if settings:
            raise ConfigError(f"give a configuration or settings, not both: {', '.join(settings)}")
        if data is None:
            return config
        root = None if images is not None else str(Path(data).expanduser().absolute())
        return replace(
            config,
            data=replace(config.data, root=root, dataset="folder" if images is not None else config.data.dataset),
        )
    if config is None and data is None:
        raise ConfigError('there is nothing to train on: give data, or the name of a dataset, as in fit("shapes")')
    dataset: Any = config or "folder"
    OPTIONS["dataset"].check(dataset)
    if images is None:
        return make_config(dataset, data=data, **settings)
    if config not in (None, "folder"):
        raise ConfigError(f"{config} has images of its own: leave it out, or give no images as data")
    known: dict[str, int] = {}
    if (shape := shape_of(images)) is not None:
        channels, side = shape
        known = {"channels": channels} | ({} if side % 8 else {"size": side})
    return make_config("folder", **(known | settings))


def _console(progress: bool | Console, *, quiet: bool) -> Console:
    """Where a training prints: its progress on the caller's console or on stdout, its warnings alone on stderr."""
    if isinstance(progress, Console):
        return progress
    return Console(quiet=quiet) if progress else Console(stderr=True, force_terminal=False, quiet=quiet)


def pick_mode(requested: StepMode | Literal["auto"], device: torch.device, world_size: int) -> StepMode:
    """How steps are computed; "auto" chooses by the device."""
    if requested != "auto":
        return requested
    if device.type != "cuda":
        # compiling takes longer than it saves in a short run
        return "eager"
    return "captured" if world_size == 1 else "compiled"


@contextmanager
def process_group(device: torch.device, world_size: int) -> Iterator[None]:
    """Joins the processes that torchrun has started, unless they are joined already."""
    if world_size == 1 or dist.is_initialized():
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"several processes train on CUDA GPUs or on the CPU, not on {device}: start one, or give --device cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch itself waits half an hour for a missing rank, in several places
    absent = f"the {world_size} processes have not met within {MEETING_SECONDS:g} s: start all of them again"
    with _ends_after(MEETING_SECONDS, absent):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except BaseException:
        # the command prints the error of this rank; a rank that cannot part in time adds nothing to it
        with _ends_after(END_SECONDS, ""):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _ends_after(seconds: float, fault: str) -> Iterator[None]:
    """Ends the process if the block takes longer, and prints the fault if there is one."""

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
