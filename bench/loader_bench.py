"""How fast batches of CelebA are loaded, what that costs, and how long a training step waits for them.

    python bench/loader_bench.py                      # 4,096 JPEGs, which it makes
    python bench/loader_bench.py --quick              # 1,024 of them, fewer repeats
    python bench/loader_bench.py --data DIR --json FILE
    python bench/loader_bench.py --sides pil-0 dali cache-host
    python bench/loader_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. `bench/loader_sides.py` lists the sides. The images are
178x218, a crop of 128x128 is what is loaded, 128 at a time. Those of --data are copied, the files as they are, so that
all layouts are read alike. Files and caches lie in a temporary folder ($TMPDIR), and so in the system's page cache.

First row, "loading": every side's first batches are compared with those of torchvision's decoder. fastle's sides have
to give the same, bit for bit (dali-gpu, whose decoder computes otherwise, is said by how much it differs), or the row
is refused: it has no times. Then the sides take turns at as many batches as there are images, at most 32. CPU time is
that of the process and of the loader's workers.

Second row, "step": real training steps, fed by each of fastle's sides, against the same steps on one batch that is on
the device already. On a CPU the preset of CelebA with hidden 16 at batch 16, so that a step is short enough for loading
to be seen at all; on a GPU the masked preset with a latent of 512 at batch 128 in bf16, captured or compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

# first, so that what is measured is the code whose commit the report names
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import BenchError, Parser, run
from bench.loader_report import draw, show, summary
from bench.loader_sides import (
    BATCH,
    INEXACT,
    NAMES,
    OURS,
    PEERS,
    REFERENCE,
    FastleLoader,
    Loader,
    PilLoader,
    Workload,
    copy_celeba,
    disk_files,
    make_celeba,
    names,
    open_side,
    own_clock,
)
from bench.loader_step import measure_step
from bench.measure import Effort, Row, interleave, synchronize
from fastle.errors import FastleError

IMAGES, QUICK_IMAGES = 4096, 1024
MOST_STEPS = 32  # batches of a call
BASELINE = "pil-0"


@dataclass(frozen=True, slots=True)
class Part:
    """One row."""

    name: str
    work: Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    parser = Parser(
        "loader_bench.py",
        "Loading CelebA: right, how fast, at what cost, and does a step wait?",
        quick=f"fewer repeats, and without --images {QUICK_IMAGES:,} of them",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="your CelebA, in any layout; default: images it makes")
    parser.add_argument("--images", type=int, metavar="N", help=f"so many; default: {IMAGES:,}")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", choices=NAMES, help=f"of {', '.join(NAMES)}")
    with ExitStack() as stack:
        return run(
            parser,
            argv,
            name="loader",
            shapes=lambda flags, device: prepare(flags, device, stack),
            make_case=lambda part, flags, device: part,
            draw=draw,
            measure=measure,
            show=show,
            summary=summary,
        )


def prepare(flags: argparse.Namespace, device: torch.device, stack: ExitStack) -> list[Part]:
    """Makes the images, or copies the user's, into a folder that `stack` removes. Caches go there too.

    Raises:
        BenchError: --sides names one that this device does not have, or --data and --images cannot be.
    """
    for name in flags.sides or ():
        if name not in names(device):
            raise BenchError(f"--sides {name}: not on {device.type}; give some of {', '.join(names(device))}")
    wanted = (QUICK_IMAGES if flags.quick else IMAGES) if flags.images is None else flags.images
    if wanted < BATCH:
        raise BenchError(f"--images {wanted} is less than a batch: give {BATCH} or more")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-bench-")))
    stack.enter_context(_caches_in(folder / "caches"))
    root, count, source = folder / "celeba", wanted, "made here"
    if flags.data is None:
        make_celeba(root, wanted)
    else:
        source = str(flags.data)
        try:
            count = copy_celeba(flags.data, root, wanted)
        except (FastleError, OSError) as error:
            raise BenchError(f"--data: {error}") from None
        if count < BATCH:
            raise BenchError(f"--data {flags.data} has {count} training images, less than a batch of {BATCH}")
    work = Workload(root=root, source=source, count=count, sides=flags.sides or names(device))
    # a step is fed by fastle's sides only
    return [Part(name, work) for name in ("loading", "step") if name == "loading" or set(work.sides) & OURS.keys()]


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def measure(part: Part, device: torch.device, effort: Effort) -> Row:
    """A row: its labels, "refused" (None or why), "sides" by name."""
    found = (measure_loading if part.name == "loading" else measure_step)(part.work, device, effort)
    packages = ("torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    labels: Row = {"part": part.name, "images": part.work.count, "source": part.work.source}
    return labels | {"cores": os.cpu_count(), "versions": {name: _version(name) for name in packages}} | found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_loading(work: Workload, device: torch.device, effort: Effort) -> Row:
    """Correctness, then images a second and CPU time for each image."""
    steps = min(work.count // BATCH, MOST_STEPS)
    reference = FastleLoader(open_side(REFERENCE, work.root, torch.device("cpu"), str), torch.device("cpu"))
    wanted = list(reference.batches(0, steps))
    sides: dict[str, Row] = {}
    loaders: dict[str, Loader] = {}
    for name in work.sides:
        sides[name], loader = _open(name, work, device, wanted)
        if loader is not None:
            loaders[name] = loader
    size = sum(file.stat().st_size for file in work.root.rglob("*.jpg")) / work.count
    row: Row = {
        "shape": f"{work.count:,} files of {size / 1e3:.1f} KB",
        "batch": BATCH,
        "images_per_call": steps * BATCH,
        "mean_bytes": size,
        "refused": refusal(sides),
        "sides": sides,
    }
    work.refused = row["refused"]
    if row["refused"]:
        return row
    cpu: dict[str, list[float]] = {name: [] for name in loaders}
    calls = {name: partial(_load, loader, device, steps, cpu[name]) for name, loader in loaders.items()}
    for name, ms in interleave(calls, own_clock, effort).items():
        sides[name] |= {"ms": ms, "images_per_s": rates(ms, steps * BATCH)}
        sides[name]["cpu_ms_per_image"] = 1e3 * statistics.median(cpu[name]) / (steps * BATCH)
    return row | comparison(sides)


def _open(name: str, work: Workload, device: torch.device, wanted: Sequence[Tensor]) -> tuple[Row, Loader | None]:
    """How long a side takes to be ready (its cache built, its first batches loaded), and how far off these are."""
    said: list[str] = []
    begin = time.perf_counter()
    try:
        if name in PEERS:
            loader: Loader = PilLoader(disk_files(work.root), PEERS[name], device)
        else:
            images = open_side(name, work.root, device, said.append)
            loader = FastleLoader(images, device)
        opened = time.perf_counter() - begin
        off = difference(loader.batches(0, len(wanted)), wanted)
        if name not in PEERS:
            work.opened[name] = images
    except FastleError as error:
        return {"status": "cannot be had", "note": f"cannot be had: {error}"}, None
    except Exception as error:  # noqa: BLE001  (of any kind: other sides have something to say)
        traceback.print_exc()
        line = next(iter(str(error).strip().splitlines()), "")
        return {"status": "failed", "note": f"failed: {type(error).__name__}: {line}"}, None
    return {"status": "measured", "open_s": opened, "difference": off, "said": said}, loader


def difference(batches: Iterable[Tensor], wanted: Sequence[Tensor]) -> int:
    """The largest difference of two pixels; 0 says that all bits are the same.

    Raises:
        ValueError: they are not as many, or of another shape or type.
    """
    largest = 0
    for got, right in zip(batches, wanted, strict=True):
        if got.shape != right.shape or got.dtype != right.dtype:
            raise ValueError(f"a batch is {got.dtype} {tuple(got.shape)}, not {right.dtype} {tuple(right.shape)}")
        largest = max(largest, int((got.cpu().short() - right.short()).abs().max()))
    return largest


def refusal(sides: dict[str, Row]) -> str | None:
    """Why the times do not count. None: they do."""
    wrong = [
        f"{name} differs from {REFERENCE}'s decoder by up to {side['difference']}"
        for name, side in sides.items()
        if name in OURS and name not in INEXACT and side.get("difference")
    ]
    if not any(side["status"] == "measured" for side in sides.values()):
        wrong = [f"{name} {side['note']}" for name, side in sides.items()]
    return "; ".join(wrong) or None


def _load(loader: Loader, device: torch.device, steps: int, cpu: list[float], turn: int) -> float:
    """ms of so many batches; the CPU seconds go to `cpu`."""
    used = time.process_time() + loader.workers_seconds()
    begin = time.perf_counter()
    for _ in loader.batches(turn * steps, (turn + 1) * steps):
        pass
    synchronize(device)
    ms = 1e3 * (time.perf_counter() - begin)
    cpu.append(time.process_time() + loader.workers_seconds() - used)
    return ms


def rates(ms: Row, images: int) -> Row:
    """Images a second from the percentiles of the ms that `images` take: the slowest ms are the lowest rates."""
    low, middle, high = (1e3 * images / ms[name] for name in ("p80", "p50", "p20"))
    return {"p20": low, "p50": middle, "p80": high}


def comparison(sides: dict[str, Row]) -> Row:
    """How much faster each side is than PIL without workers, and than the better of PIL's sides."""
    medians = {name: side["images_per_s"]["p50"] for name, side in sides.items() if "images_per_s" in side}
    best = max((name for name in PEERS if name in medians), key=medians.__getitem__, default=None)
    over = {"ratios": BASELINE, "best_ratios": best}
    return {"baseline": BASELINE, "best_peer": best} | {
        key: {name: rate / medians[peer] for name, rate in medians.items()} if peer in medians else {}
        for key, peer in over.items()
    }


if __name__ == "__main__":
    sys.exit(main())
