"""How fast batches of CelebA are loaded, what that costs, and how long a training step waits for them.

    python bench/loader_bench.py                      # 4,096 JPEGs, which it makes
    python bench/loader_bench.py --quick              # 1,024 of them, fewer repeats
    python bench/loader_bench.py --data DIR --json FILE
    python bench/loader_bench.py --sides pil-0 dali cache-host
    python bench/loader_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. All sides load the same images in the same order and hand
their batches out on the device. The images are 178x218, and a crop of 128x128 is loaded, 128 at a time. Files and
caches lie in a temporary folder ($TMPDIR), and so in the system's page cache. The sides:

    pil-0, pil-2            PIL in torch's DataLoader with 0 and 2 workers: open, CenterCrop, PILToTensor
    torchvision             fastle's feed with --decoder torchvision --cache none
    dali                    --decoder dali: DALI on the CPU, the crop cut out as it decodes, H x W x C
    dali-gpu                --decoder dali-gpu; CUDA only
    cache-disk, cache-host  --cache disk and host: decoded once, then read batch by batch, or into memory
    cache-device            --cache device; CUDA only

First row, "loading": every side's first batches are compared with those of torchvision's decoder. Fastle's sides must
give the same, bit for bit, or the row is refused; dali-gpu alone, whose decoder computes differently, may differ. Each
call loads as many batches as there are images, at most 32. CPU time is that of the process and of the loader's workers.

Second row, "step": real training steps, fed by each of fastle's sides, against the same steps on one batch that is on
the device already. On a CPU the preset of CelebA with hidden 16 at batch 16, so that a step is short enough for loading
to be seen at all; on a GPU the masked preset with a latent of 512 at batch 128 in bf16, captured or compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# first, so that the code that is measured is that of the commit in the report
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common.celeba_images import SIZE, copy_celeba, disk_files, make_celeba
from bench.common.command import Benchmark, make_parser, pick_sides, run
from bench.common.loader_step import FIXED, measure_step
from bench.common.loaders import BATCH, FastleLoader, PilLoader, Workload
from bench.common.measure import Effort, Side, first_call, interleave, refusal
from bench.common.plot import Panel
from bench.common.table import Column, Row, digits, ratio, time_columns
from fastle.choices import CacheChoice, DecoderChoice
from fastle.config import ConfigError
from fastle.data import Images, Loading, open_images
from fastle.errors import FastleError
from fastle.machine import synchronize
from fastle.presets import make_config
from fastle.profiling.measure import percentiles

IMAGES, QUICK_IMAGES = 4096, 1024
MOST_BATCHES = 32  # of a call
PEERS = {"pil-0": 0, "pil-2": 2}  # workers
BASELINE, REFERENCE = "pil-0", "torchvision"
OURS: dict[str, tuple[DecoderChoice, CacheChoice]] = {
    REFERENCE: ("torchvision", "none"),
    "dali": ("dali", "none"),
    "dali-gpu": ("dali-gpu", "none"),
    "cache-disk": ("auto", "disk"),
    "cache-host": ("auto", "host"),
    "cache-device": ("auto", "device"),
}
NAMES = (*PEERS, *OURS)
CUDA_ONLY = ("dali-gpu", "cache-device")
INEXACT = ("dali-gpu",)  # its decoder computes differently, and its pixels differ by design


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    description = "Loading CelebA: right, how fast, at what cost, and does a step wait?"
    quick = f"fewer repeats; without --images {QUICK_IMAGES:,} images"
    parser = make_parser("loader_bench.py", description, quick=quick, sides=NAMES)
    parser.add_argument("--data", type=Path, metavar="DIR", help="your CelebA, in any layout; default: images it makes")
    parser.add_argument("--images", type=int, metavar="N", help=f"how many; default: {IMAGES:,}")
    with ExitStack() as stack:
        benchmark = dataclasses.replace(BENCHMARK, cases=lambda flags, device: prepare(flags, device, stack))
        return run(parser, benchmark, argv)


def prepare(flags: argparse.Namespace, device: torch.device, stack: ExitStack) -> list[Callable[..., Row]]:
    """Makes or copies the images into a folder that `stack` removes, with the caches; what measures each row.

    Raises:
        ConfigError: --sides names one that this device does not have, or --data and --images cannot be used.
    """
    sides = pick_sides(flags, device, [name for name in NAMES if device.type == "cuda" or name not in CUDA_ONLY])
    count = (QUICK_IMAGES if flags.quick else IMAGES) if flags.images is None else flags.images
    if count < BATCH:
        raise ConfigError(f"--images {count} is less than a batch: give {BATCH} or more")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-bench-")))
    stack.enter_context(patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "caches")}))
    root, source = folder / "celeba", "made here"
    if flags.data is None:
        make_celeba(root, count)
    else:
        source = str(flags.data)
        try:
            count = copy_celeba(flags.data, root, count)
        except (FastleError, OSError) as error:
            raise ConfigError(f"--data: {error}") from None
        if count < BATCH:
            raise ConfigError(f"--data {flags.data} has {count} training images, less than a batch of {BATCH}")
    work = Workload(root=root, source=source, count=count, sides=sides)
    # only fastle's sides feed a step
    return [partial(row, work) for row in (measure_loading, measure_step)[: 1 + bool(set(work.sides) & OURS.keys())]]


def measure_loading(work: Workload, device: torch.device, effort: Effort) -> Row:
    """Correctness, then the time and the CPU time of loading."""
    count, cpu_device = min(work.count // BATCH, MOST_BATCHES), torch.device("cpu")
    wanted = list(FastleLoader(open_side(REFERENCE, work.root, cpu_device, str), cpu_device).batches(0, count))
    sides: dict[str, Row] = {}
    loaders: dict[str, FastleLoader | PilLoader] = {}
    compared = [_side(name, work, device) for name in work.sides]
    for side in compared:
        sides[side.name], loader = first_call(
            side,
            lambda loader: difference(loader.batches(0, count), wanted),
            lambda largest: {"pixel": largest},
            float("inf"),
            device,
        )
        if loader is not None:
            loaders[side.name] = loader
    size = sum(file.stat().st_size for file in work.root.rglob("*.jpg")) / work.count
    work.refused = refusal(compared, sides)
    row: Row = {
        "part": "loading",
        "shape": f"{work.count:,} files of {size / 1e3:.1f} KB",
        **work.labels(),
        "batch": BATCH,
        "images_per_call": count * BATCH,
        "refused": work.refused,
        "sides": sides,
    }
    if work.refused:
        return row
    cpu: dict[str, list[float]] = {name: [] for name in loaders}
    calls = {name: partial(load, loader, device, count, cpu[name]) for name, loader in loaders.items()}
    for name, ms in interleave(calls, effort).items():
        sides[name] |= {
            "ms": percentiles(ms),
            "cpu_ms_per_image": 1e3 * statistics.median(cpu[name]) / row["images_per_call"],
        }
    return row


def _side(name: str, work: Workload, device: torch.device) -> Side:
    """A way to load; its first call opens the images, and builds the cache if there is none."""
    said: list[str] = []

    def make() -> Any:
        if name in PEERS:
            return PilLoader(disk_files(work.root), PEERS[name], device)
        work.opened[name] = open_side(name, work.root, device, said.append)
        return FastleLoader(work.opened[name], device)

    exact = name in OURS and name not in INEXACT
    return Side(name=name, make=make, ours=name in OURS, gates={"pixel": 0} if exact else {}, labels={"said": said})


def open_side(name: str, root: Path, device: torch.device, say: Callable[[str], object]) -> Images:
    """The training images of CelebA at `root`, through the decoder and the cache of one of fastle's sides.

    Raises:
        DataError: The side cannot be had here.
    """
    decoder, cache = OURS[name]
    config = make_config("celeba", data=root, size=SIZE).data
    return open_images(config, "train", Loading(decoder=decoder, cache=cache, device=device, say=say))


def difference(batches: Iterable[Tensor], wanted: Sequence[Tensor]) -> int:
    """The largest difference of two pixels, of 255; 0 means that all bits are the same.

    Raises:
        ValueError: There are more or fewer batches, or one has another shape or type.
    """
    largest = 0
    for got, right in zip(batches, wanted, strict=True):
        if got.shape != right.shape or got.dtype != right.dtype:
            raise ValueError(f"a batch is {got.dtype} {tuple(got.shape)}, not {right.dtype} {tuple(right.shape)}")
        largest = max(largest, int((got.cpu().short() - right.short()).abs().max()))
    return largest


def load(
    loader: FastleLoader | PilLoader, device: torch.device, count: int, cpu_seconds: list[float], turn: int
) -> float:
    """Milliseconds of loading `count` batches; appends the CPU seconds of the process and the loader's workers."""
    used = time.process_time() + loader.worker_seconds()
    begin = time.perf_counter()
    for _ in loader.batches(turn * count, (turn + 1) * count):
        pass
    synchronize(device)
    ms = 1e3 * (time.perf_counter() - begin)
    cpu_seconds.append(time.process_time() + loader.worker_seconds() - used)
    return ms


def images_per_second(row: Row, name: str) -> float:
    """A side's rate."""
    return 1e3 * row["images_per_call"] / row["sides"][name]["ms"]["p50"]


def columns(row: Row) -> list[Column]:
    """The columns of a row's table."""
    if row["part"] == "step":
        return [
            *time_columns(),
            Column("over\nfixed", lambda name, side: "–" if name == FIXED else f"{side['over_fixed']:+.2%}"),
            Column("data\nwait", lambda name, side: "–" if name == FIXED else f"{side['wait_share']:.2%}"),
        ]
    peers = [name for name in PEERS if "ms" in row["sides"].get(name, {})]
    best = max(peers, key=partial(images_per_second, row), default=BASELINE)

    def faster_than(peer: str) -> Callable[[str, Row], str]:
        return lambda name, side: ratio(row["sides"][peer]["ms"]["p50"], side["ms"]["p50"])

    return [
        *time_columns(),
        Column("images/s", lambda name, side: digits(images_per_second(row, name))),
        Column(f"speed-up\nover {BASELINE}", faster_than(BASELINE)),
        Column("over the\nbest PIL", faster_than(best)),
        Column("CPU ms\nper image", lambda name, side: digits(side["cpu_ms_per_image"])),
        Column("first\ncall", lambda name, side: f"{side['first_call_s']:.1f} s"),
        Column("pixels\ndiffer by", lambda name, side: f"{side['pixel_error']:.0f}"),
    ]


def panels(row: Row) -> list[Panel]:
    """Images per second, and what loading costs a step."""
    timed = [name for name, side in row["sides"].items() if "ms" in side]
    if row["part"] == "loading":
        rates = {name: images_per_second(row, name) for name in timed}
        return [Panel("images/s", {name: (rate, digits(rate)) for name, rate in rates.items()}, log=True)]
    fed = {name: row["sides"][name] for name in timed if name != FIXED}
    bars = {
        name: (100 * side["over_fixed"], f"{side['over_fixed']:+.1%} (data wait {side['wait_share']:.1%})")
        for name, side in fed.items()
    }
    return [Panel("step over a fixed batch, %", bars)]


def notes(report: Row) -> list[str]:
    """What the figures mean."""
    row = report["rows"][0]
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if number)
    return [
        f"{versions}, {row['cores']} CPU cores; images: {row['source']}",
        "pixels differ by: the largest difference of a pixel to torchvision's decoder, of 255. first call: opening the "
        "images, building the cache, loading once",
        f"ms: of loading {row['images_per_call']:,} images, in another order in each call, or of one training step",
        "data wait: the share of a step that the loop waited for a batch. over fixed: what loading adds to a step, the "
        "median over pairs of calls. On a CPU decoding takes its cores from the step; on a GPU the loop runs ahead of "
        "the device, and may wait for a batch while the device still works",
    ]


BENCHMARK = Benchmark(
    name="loader",
    # `main` knows the folder of the images
    cases=lambda flags, device: [],
    measure=lambda row, device, effort: row(device, effort),
    columns=columns,
    panels=panels,
    notes=notes,
)

if __name__ == "__main__":
    sys.exit(main())
