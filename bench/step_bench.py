"""The whole training step against the plain eager one: correctness, time, operations, memory, on a CPU or a GPU.

    python bench/step_bench.py                        # on a CPU four settings, most of the time spent compiling
    python bench/step_bench.py --quick                # CelebA masked 128 at batch 4; on a GPU what marks are for
    python bench/step_bench.py --shapes celeba-masked-512:128 cifar10:128 --json FILE
    python bench/step_bench.py --shapes celeba-spatial:4 --sides plain "fastle compiled bf16"
    python bench/step_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. `bench/step_sides.py` lists the sides; a shape is
SETTING:BATCH, a setting one of fastle's presets. A call is one step on a uint8 batch that is on the device already:
draws, forward, backward, AdamW.

All sides start from the same weights, batch and draws. The first step's loss and gradients have to be those of fastle's
objective in float64, within the gates; the weights have to move as AdamW says. The gates, and what was measured:

    fp32   loss 1e-5 relative (4e-7 on a CPU), gradients 1e-3 (2e-5): rounding, and room for other orders of sums.
           With TF32 convolutions (PyTorch's default on a GPU), whose products keep 11 bits: 2e-3 and 2e-2, not measured
    bf16   loss 2e-2 (3e-3), gradients 0.1 (2e-2): a product keeps 8 bits, a gradient goes through some thirty of them
    both   3e-3 of the movement (5e-4): fp32 keeps 6e-8 of a weight of 1, which a rate of 1e-4 moves by 1e-4

A gradient's error is the largest over the parameters, of Euclidean norms; see `bench/step_measure.py`.

Where a CPU has AVX-512, torch 2.15's Inductor may compile the bf16 step into one that gives NaN, the plain one too
(`torch._inductor.config.cpp.simdlen = 256` avoided it in a down block). Then the gates refuse the row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# first, so that what is measured is the code whose commit the report names
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import BenchError, Parser, run
from bench.step_measure import Case, Gates, measure
from bench.step_report import draw, show, summary
from bench.step_sides import NAMES, Start, count_flops, exact, make_sides, measured_peak, names, products
from fastle.config import Precision, RunConfig
from fastle.presets import make_config

ROTATION = 3  # inputs
SETTINGS: dict[str, Callable[..., RunConfig]] = {
    "celeba-masked-128": partial(make_config, "celeba", masked=True, latent=128),
    "celeba-masked-512": partial(make_config, "celeba", masked=True, latent=512),
    "celeba-spatial": partial(make_config, "celeba"),
    "cifar10": partial(make_config, "cifar10"),
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
GATES: dict[str, Gates] = {"fp32": (1e-5, 1e-3, 3e-3), "tf32": (2e-3, 2e-2, 3e-3), "bf16": (2e-2, 0.1, 3e-3)}


@dataclass(frozen=True, slots=True)
class Shape:
    """A setting and its batch."""

    setting: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """SETTING:BATCH.

        Raises:
            ArgumentTypeError: it is not.
        """
        setting, _, batch = text.partition(":")
        if setting not in SETTINGS or not batch.isdecimal() or int(batch) < 2:
            wanted = f"SETTING:BATCH, a setting of {', '.join(SETTINGS)} and a batch from 2"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}")
        return cls(setting, int(batch))

    def __str__(self) -> str:
        return f"{self.setting}:{self.batch}"


def _shapes(*texts: str) -> list[Shape]:
    return list(map(Shape.parse, texts))


QUICK = {"cpu": _shapes("celeba-masked-128:4"), "cuda": _shapes("celeba-masked-512:128", "cifar10:128")}
BATCHES = (128, 16, 512)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    parser = Parser(
        "step_bench.py",
        "The training step against the plain eager one: right, fast, small?",
        quick="fewer repeats, and without --shapes only those that marks are for",
    )
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="SHAPE", help="SETTING:BATCH, such as celeba-masked-128:4"
    )
    parser.add_argument("--sides", nargs="+", metavar="SIDE", choices=NAMES, help=f"of {', '.join(NAMES)}")
    return run(
        parser,
        argv,
        name="step",
        shapes=pick_shapes,
        make_case=make_case,
        draw=draw,
        measure=measure,
        show=show,
        summary=summary,
    )


def pick_shapes(flags: argparse.Namespace, device: torch.device) -> list[Shape]:
    """What to measure: those that marks are for first, for runs under a time limit.

    Raises:
        BenchError: --sides names one that this device does not have.
    """
    for name in flags.sides or ():
        if name not in names(device):
            raise BenchError(f"--sides {name}: not on {device.type}; give some of {', '.join(names(device))}")
    if flags.shapes:
        return list(flags.shapes)
    if flags.quick:
        return QUICK[device.type]
    if device.type == "cpu":
        return [Shape(setting, 32 if setting == "cifar10" else 4) for setting in SETTINGS]
    every = [Shape(setting, batch) for batch in BATCHES for setting in SETTINGS]
    return list(dict.fromkeys((*QUICK["cuda"], *every)))


def make_case(shape: Shape, flags: argparse.Namespace, device: torch.device) -> Case:
    """The row of a shape: batches from a fixed seed, the exact result, the sides."""
    config = SETTINGS[shape.setting](batch_size=shape.batch)
    start = Start(config, device)
    generator = torch.Generator().manual_seed(0)
    inputs = [make_batch(config, generator).to(device) for _ in range(ROTATION)]
    kinds = {precision: products(device, precision) for precision in PRECISIONS}
    flops = count_flops(SETTINGS[shape.setting](), device)
    peaks: dict[str, float] = {precision: measured_peak(device, kind) for precision, kind in kinds.items()}
    return Case(
        labels={
            "shape": str(shape),
            "setting": shape.setting,
            "batch": shape.batch,
            "flops_per_image": flops,
            "peak_flops": {kind: peaks[precision] for precision, kind in kinds.items()},
            "convolutions": kinds["fp32"],
        },
        inputs=inputs,
        exact=exact(start, inputs[0]),
        before=start.parameters(),
        lr=config.train.lr,
        gates={precision: GATES[kind] for precision, kind in kinds.items()},
        sides=make_sides(start, flags.sides or names(device)),
        flops=flops,
        peaks=peaks,
    )


def make_batch(config: RunConfig, generator: torch.Generator) -> Tensor:
    """uint8 (B, C, size, size): patches of colour with soft edges, and a little noise.

    Noise alone would not do: its codes are so alike that the BatchNorm turns rounding into signal.
    """
    batch, channels, size = config.train.batch_size, config.model.channels, config.model.size
    coarse = torch.rand(batch, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    noise = torch.randn(smooth.shape, generator=generator)
    return (255 * (smooth + 0.02 * noise).clamp(0, 1)).round().to(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
