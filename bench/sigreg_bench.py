"""SIGReg against what people run today, forward + backward: correctness, time, peak memory, on a CPU or a GPU.

    python bench/sigreg_bench.py                      # the shapes that people run: on a CPU a quarter of an hour
    python bench/sigreg_bench.py --quick              # five of them, under two minutes on two cores
    python bench/sigreg_bench.py --shapes 1024x512x1024 64x128x32x256 --json FILE
    python bench/sigreg_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. The sides:

    fastle    the operator, impl="auto"
    eager     the naive form, with every (N, M, K) tensor, as LeJEPA's public code computes it
    compiled  the same under torch.compile, static shapes
    chunked   the same, 64 slices at a time, each part checkpointed

Samples are standard normal, the distribution to which SIGReg drives them. It is also the hardest case for the gradient,
because the cosine means and their targets nearly cancel. B tests of N samples, D features, M slices, K = 17 knots on
[0, 3].
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# first, so that the code that is measured is that of the commit in the report
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common.command import Benchmark, make_parser, run
from bench.common.measure import DTYPES, ROTATION, Case, Side, relative_error
from bench.common.peers import CHUNK, KNOTS, T_MAX, Tensors, chunked_sigreg, compiled, naive_sigreg
from bench.common.plot import time_and_memory
from bench.common.table import operator_columns
from fastle.kernels import reference
from fastle.kernels.sigreg import sigreg

ORACLE_BYTES = 2 * 10**8  # of float64 tensors at once: on a CPU more is slower, as the allocator then asks the system
# the statistic is fp32 for both; a bf16 gradient is rounded at its end, by 2^-8 of itself
GATES = {"fp32": {"value": 2e-6, "gradient": 1e-5}, "bf16": {"value": 2e-6, "gradient": 4e-3}}


class SigregShape(NamedTuple):
    """B tests of N samples of D features on M slices."""

    tests: int
    samples: int
    features: int
    slices: int

    @classmethod
    def parse(cls, text: str) -> SigregShape:
        """Reads NxDxM or BxNxDxM.

        Raises:
            ArgumentTypeError: The text is neither.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
            wanted = "NxDxM or BxNxDxM in whole numbers from 1, such as 1024x512x1024 or 64x128x32x256"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}")
        sizes = [int(size) for size in text.split("x")]
        return cls(*sizes) if len(sizes) == 4 else cls(1, *sizes)

    def __str__(self) -> str:
        return "x".join(map(str, self[1:] if self.tests == 1 else self))


def _shapes(texts: str) -> list[SigregShape]:
    return list(map(SigregShape.parse, texts.split()))


HEADLINE = {
    "cpu": _shapes("1024x512x1024 64x128x32x256 16384x128x256 128x512x256 128x128x256"),
    "cuda": _shapes("2048x512x1024 8x512x512x1024 256x128x32x256 128x512x256 65536x512x1024"),
}
NAMED = [*HEADLINE["cpu"], *HEADLINE["cuda"], *_shapes("4x256x16x256")]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    description = "SIGReg, forward + backward, against the naive form: right, fast, small?"
    parser = make_parser("sigreg_bench.py", description, quick="fewer repeats; without --shapes five shapes only")
    example = "NxDxM or BxNxDxM, such as 1024x512x1024"
    parser.add_argument("--shapes", nargs="+", type=SigregShape.parse, metavar="SHAPE", help=example)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the samples; default: fp32")
    return run(parser, BENCHMARK, argv)


def pick_shapes(flags: argparse.Namespace, device: torch.device) -> list[SigregShape]:
    """What to measure: the device's headline shapes first, for runs under a time limit."""
    if flags.shapes:
        return list(flags.shapes)
    return list(dict.fromkeys((*HEADLINE[device.type], *(() if flags.quick else NAMED))))


def make_case(shape: SigregShape, dtype: str, device: torch.device) -> Case:
    """The case of a shape: inputs and slices from a fixed seed, the sides, and their errors."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.samples, shape.features) if shape.tests == 1 else shape[:3]
    inputs = [torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for _ in range(ROTATION)]
    slices = torch.randn(shape.features, shape.slices, generator=generator)
    slices = (slices / slices.norm(dim=0)).to(device)
    exact_results = exact(inputs[0], slices, room=ORACLE_BYTES)

    def errors(result: tuple[Tensors, Tensors]) -> dict[str, float]:
        pairs = zip(("value", "gradient"), result, exact_results, strict=True)
        return {name: relative_error(got, wanted) for name, got, wanted in pairs}

    whole = 4 * shape.tests * shape.samples * shape.slices * KNOTS  # bytes of an (N, M, K) tensor
    # autograd's backward holds six such tensors at its peak, by the profiler's count; Inductor recomputes most of them
    peers = {
        "eager": (naive_sigreg, 6 * whole),
        "compiled": (compiled(naive_sigreg), whole),
        "chunked": (chunked_sigreg, 6 * whole * min(CHUNK, shape.slices) // shape.slices),
    }
    ours = partial(_forward_backward, partial(sigreg, t_max=T_MAX, knots=KNOTS), slices)
    return Case(
        labels={"shape": str(shape), **shape._asdict(), "knots": KNOTS, "t_max": T_MAX, "dtype": dtype},
        inputs=[z.requires_grad_() for z in inputs],
        errors=errors,
        sides=[
            Side(name="fastle", make=lambda: ours, ours=True, gates=GATES[dtype]),
            *(
                Side(name=name, make=partial(_make, loss, slices), gates=GATES[dtype], needs=needs)
                for name, (loss, needs) in peers.items()
            ),
        ],
    )


def _make(loss: Callable[..., Tensor], slices: Tensor) -> Callable[[Tensor], tuple[Tensors, Tensors]]:
    return partial(_forward_backward, loss, slices)


def _forward_backward(loss: Callable[..., Tensor], slices: Tensor, z: Tensor) -> tuple[Tensors, Tensors]:
    value = loss(z, slices)
    return (value.detach(),), torch.autograd.grad(value, z)


def exact(z: Tensor, slices: Tensor, *, room: int) -> tuple[Tensors, Tensors]:
    """The loss of z (..., N, D) and its gradient in float64, as many slices (D, M) at once as fit into `room` bytes."""
    z = z.detach().double().requires_grad_()
    tensor_bytes = 8 * KNOTS * math.prod(z.shape[:-1])
    statistics = math.prod(z.shape[:-2]) * slices.shape[1]
    loss, gradient = torch.zeros((), dtype=torch.float64, device=z.device), torch.zeros_like(z)
    for part in slices.double().split(max(1, room // (6 * tensor_bytes)), dim=1):
        value = reference.sigreg(z, part, t_max=T_MAX, knots=KNOTS).sum() / statistics
        loss += value.detach()
        gradient += torch.autograd.grad(value, z)[0]
    return (loss,), (gradient,)


BENCHMARK = Benchmark(
    name="sigreg",
    cases=lambda flags, device: [partial(make_case, shape, flags.dtype) for shape in pick_shapes(flags, device)],
    columns=operator_columns,
    panels=time_and_memory,
    notes=lambda report: ["×: a side's figure over fastle's. The first call includes compilation"],
)

if __name__ == "__main__":
    sys.exit(main())
