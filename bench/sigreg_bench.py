"""SIGReg against what people run today, forward + backward: correctness, time, peak memory, on a CPU or a GPU.

    python bench/sigreg_bench.py                      # the shapes that people run: on a CPU a quarter of an hour
    python bench/sigreg_bench.py --quick              # five of them, under two minutes on two cores
    python bench/sigreg_bench.py --shapes 1024x512x1024 64x128x32x256 --json FILE
    python bench/sigreg_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. The sides:

    fastle    the operator, impl="auto"
    eager     the naive form, with every (N, M, K) tensor, as LeJEPA's public code computes
    compiled  the same under torch.compile, static shapes
    chunked   the same, 64 slices at a time, each part checkpointed

Samples are standard normal, which is where SIGReg drives them. It is also the hardest case for the gradient: the cosine
means and their targets nearly cancel. B tests of N samples, D features, M slices, K = 17 knots on [0, 3].
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# first, so that what is measured is the code whose commit the report names
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import Parser, run
from bench.measure import Case, Peaks, Result, Side, peaks
from bench.sigreg_plot import draw
from fastle.kernels import reference
from fastle.kernels.sigreg import sigreg

KNOTS, T_MAX = 17, 3.0
CHUNK = 64  # slices
ROTATION = 3  # inputs
ORACLE_BYTES = 2 * 10**8  # of float64 tensors at once: more is slower on a CPU, whose allocator then asks the system

# operations for each sample and slice, with 16 live knots: one sincos and the recurrence
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 45, 65

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the statistic is fp32 for all of them; a bf16 gradient is rounded at its end, by 2^-8 of itself
GATES = {"fp32": (2e-6, 1e-5), "bf16": (2e-6, 4e-3)}


@dataclass(frozen=True, slots=True)
class Shape:
    """B tests of N samples of D features on M slices."""

    tests: int
    samples: int
    features: int
    slices: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """NxDxM or BxNxDxM.

        Raises:
            ArgumentTypeError: it is neither.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
            wanted = "NxDxM or BxNxDxM in whole numbers from 1, such as 1024x512x1024 or 64x128x32x256"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}")
        sizes = [int(size) for size in text.split("x")]
        return cls(*sizes) if len(sizes) == 4 else cls(1, *sizes)

    def __str__(self) -> str:
        sizes = (self.samples, self.features, self.slices)
        return "x".join(map(str, sizes if self.tests == 1 else (self.tests, *sizes)))


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(map(Shape.parse, texts))


HEADLINE = {
    "cpu": _shapes("1024x512x1024", "64x128x32x256", "16384x128x256", "128x512x256", "128x128x256"),
    "cuda": _shapes("2048x512x1024", "8x512x512x1024", "256x128x32x256", "128x512x256", "65536x512x1024"),
}
NAMED = (*HEADLINE["cpu"], *HEADLINE["cuda"], *_shapes("4x256x16x256"))
GRID = tuple(Shape(1, *sizes) for sizes in product((128, 512, 4096, 65536), (16, 128, 192, 512), (256, 1024, 4096)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    parser = Parser("sigreg_bench.py", "SIGReg, forward + backward, against the naive form: right, fast, small?")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="SHAPE", help="NxDxM or BxNxDxM, such as 1024x512x1024"
    )
    which.add_argument("--grid", action="store_true", help="the full grid, hours on a CPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the samples; default: fp32")
    return run(parser, argv, name="sigreg", shapes=pick_shapes, make_case=make_case, draw=draw)


def pick_shapes(flags: argparse.Namespace, device: torch.device) -> list[Shape]:
    """What to measure: the device's headline shapes first, for runs under a time limit."""
    headline = HEADLINE[device.type]
    if flags.shapes:
        return list(flags.shapes)
    if flags.grid:
        return list(dict.fromkeys((*headline, *NAMED, *GRID)))
    return list(headline if flags.quick else dict.fromkeys((*headline, *NAMED)))


def make_case(shape: Shape, flags: argparse.Namespace, device: torch.device) -> Case:
    """The row of a shape: inputs and slices from a fixed seed, the oracle, and the sides."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.samples, shape.features) if shape.tests == 1 else (shape.tests, shape.samples, shape.features)
    inputs = [
        torch.randn(size, generator=generator).to(device, DTYPES[flags.dtype]).requires_grad_() for _ in range(ROTATION)
    ]
    slices = torch.randn(shape.features, shape.slices, generator=generator)
    slices = (slices / slices.norm(dim=0)).to(device)
    big = 4 * shape.tests * shape.samples * shape.slices * KNOTS  # bytes of an (N, M, K) tensor
    part = big * min(CHUNK, shape.slices) // shape.slices
    return Case(
        labels={
            "shape": str(shape),
            "tests": shape.tests,
            "samples": shape.samples,
            "features": shape.features,
            "slices": shape.slices,
            "knots": KNOTS,
            "t_max": T_MAX,
            "dtype": flags.dtype,
        },
        inputs=inputs,
        exact=exact(inputs[0], slices, room=ORACLE_BYTES),
        gates=GATES[flags.dtype],
        sides=[
            Side(name="fastle", step=_step(lambda z: sigreg(z, slices, t_max=T_MAX, knots=KNOTS))),
            # the profiler counts six such tensors at the peak of autograd's backward
            Side(name="eager", step=_step(partial(naive, slices=slices)), needs=6 * big),
            # and less than one, since Inductor computes most of them anew
            Side(name="compiled", step=_step(partial(_compiled_naive(), slices=slices)), needs=big),
            Side(name="chunked", step=_step(partial(chunked, slices=slices)), needs=6 * part),
        ],
        floors=floors(shape, inputs[0].element_size(), peaks(device)),
    )


def _step(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Result]:
    def step(z: Tensor) -> Result:
        value = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
        return value.detach(), gradient

    return step


def naive(z: Tensor, slices: Tensor) -> Tensor:
    """The loss of samples (..., N, D) on slices (D, M), in fp32: a scalar."""
    return reference.sigreg(z.float(), slices, t_max=T_MAX, knots=KNOTS).mean()


def _compiled_naive() -> Callable[..., Tensor]:
    # with the whole graph or an error: a silent fallback would be timed as if it were compiled
    return torch.compile(naive, dynamic=False, fullgraph=True)


def chunked(z: Tensor, slices: Tensor) -> Tensor:
    """`naive`, `CHUNK` slices at a time, each part computed again in the backward."""

    def part_sum(z: Tensor, part: Tensor) -> Tensor:
        return reference.sigreg(z, part, t_max=T_MAX, knots=KNOTS).sum()

    z = z.float()
    # nothing here is random, and reading a generator's state is not allowed in a CUDA graph
    sums = [
        checkpoint(part_sum, z, part, use_reentrant=False, preserve_rng_state=False)
        for part in slices.split(CHUNK, dim=1)
    ]
    return torch.stack(sums).sum() / _statistics(z, slices)


def exact(z: Tensor, slices: Tensor, *, room: int) -> Result:
    """The loss and its gradient to z (..., N, D) in float64, as many slices (D, M) at once as fit into `room` bytes."""
    z = z.detach().double().requires_grad_()
    tensor_bytes = 8 * KNOTS * math.prod(z.shape[:-1])
    loss, gradient = torch.zeros((), dtype=torch.float64, device=z.device), torch.zeros_like(z)
    for part in slices.double().split(max(1, room // (6 * tensor_bytes)), dim=1):
        value = reference.sigreg(z, part, t_max=T_MAX, knots=KNOTS).sum() / _statistics(z, slices)
        loss += value.detach()
        gradient += torch.autograd.grad(value, z)[0]
    return loss, gradient


def _statistics(z: Tensor, slices: Tensor) -> int:
    """How many statistics the loss is the mean of."""
    return math.prod(z.shape[:-2]) * slices.shape[1]


def floors(shape: Shape, item_bytes: int, peak: Peaks | None) -> dict[str, float]:
    """ms that forward + backward take at least: the largest of products, operations and bytes, each at its peak.

    Two products, that of the forward and that of the gradient; the operations of the recurrence; samples, slices and
    gradient through memory once. "fp32": the products share the fp32 units with the operations. "tensor": tensor cores
    do them meanwhile, in a single pass of TF32, which alone would not be exact enough.

    Args:
        item_bytes: of a number of the samples.
    """
    if peak is None:
        return {}
    rows = shape.tests * shape.samples
    multiply_adds = 2 * rows * shape.features * shape.slices
    operations = (FORWARD_OPERATIONS + BACKWARD_OPERATIONS) * rows * shape.slices
    traffic = (2 * item_bytes * rows * shape.features + 4 * shape.features * shape.slices) / peak.traffic
    issue = peak.fp32 / 2  # a multiply-add counts as two operations, and takes one instruction
    return {
        "fp32": 1e3 * max((multiply_adds + operations) / issue, traffic),
        "tensor": 1e3 * max(2 * multiply_adds / peak.tf32, operations / issue, traffic),
    }


if __name__ == "__main__":
    sys.exit(main())
