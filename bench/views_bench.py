"""The views against what people run today, forward and forward + backward: correctness, time, memory, bandwidth.

    python bench/views_bench.py                       # the shapes that people run: on a CPU some minutes
    python bench/views_bench.py --quick               # five of them, under two minutes on two cores
    python bench/views_bench.py --shapes crop:3x16x3x128x128:19 hole:16x3x128x128:76 --json FILE
    python bench/views_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. Shapes, for images [V]xBxCxHxW of V views that share boxes
or masks:

    crop:16x3x128x128:19              a box of side 19, resized to the image's size
    crop:16x3x128x128:48x80:64x96     a box of 48 rows and 80 columns, resized to 64 rows and 96 columns
    hole:16x3x128x128:76              a square of side 76, filled with the image's mean
    pixels:16x3x128x128:0.7           seven of ten pixels set to zero, drawn anew in each call

Each shape gives two rows: "forward", which keeps what the backward needs, and "both", forward + backward. The sides are
fastle's operator with impl="auto" and the peers of `bench/common/peers.py`, each also under torch.compile.

GB/s counts the bytes that have to move, each pixel that is needed once. "of copy" compares it with a copy of half a
gigabyte (on a GPU two), measured in the same process. On a CPU small images stay in the caches, and may be faster.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# first, so that the code that is measured is that of the commit in the report
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common.command import Benchmark, make_parser, run
from bench.common.measure import DTYPES, ROTATION, Case, Side, relative_error
from bench.common.peers import HeightWidth, Tensors, compiled, eager_holes, eager_masks, grid_crops, roi_crops
from bench.common.plot import Panel, time_and_memory
from bench.common.table import Column, Row, digits, operator_columns
from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_patches
from fastle.profiling.measure import copy_bandwidth

# from images and the corners of the boxes to views
MakeViews: TypeAlias = Callable[[Tensors, Tensor, Tensor], Tensors]
# views and, unless only the forward is timed, the gradients to the images
Result: TypeAlias = tuple[Tensors, ...]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# a bf16 result is rounded once, by 2^-8 of itself
GATES = {"fp32": {"value": 1e-6, "gradient": 1e-5}, "bf16": {"value": 4e-3, "gradient": 4e-3}}
SIZE = r"[1-9]\d*"
SYNTAX = re.compile(
    rf"(?P<operator>crop|hole|pixels):(?P<images>{SIZE}(x{SIZE}){{3,4}})"
    rf":(?P<amount>\d+(\.\d+)?|{SIZE}x{SIZE})(:(?P<out>{SIZE}(x{SIZE})?))?"
)


class ViewShape(NamedTuple):
    """What is done to which images.

    Attributes:
        operator: "crop", "hole" or "pixels".
        views: How many images share boxes or masks.
        images: (B, C, H, W).
        amount: Rows and columns of a crop or hole; the ratio of pixels that is masked.
        out: Rows and columns to which a crop is resized.
    """

    operator: str
    views: int
    images: tuple[int, int, int, int]
    amount: HeightWidth | float
    out: HeightWidth

    @classmethod
    def parse(cls, text: str) -> ViewShape:
        """Reads a shape as the module's docstring lists them.

        Raises:
            ArgumentTypeError: The text is no shape, or the box does not fit.
        """
        match = SYNTAX.fullmatch(text)
        if not match:
            wanted = "crop:BxCxHxW:SIDE, crop:BxCxHxW:HxW:HxW, hole:BxCxHxW:SIDE or pixels:BxCxHxW:RATIO"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}; VxBxCxHxW are V views")
        *views, batch, channels, height, width = map(int, match["images"].split("x"))
        operator, given, out = match["operator"], match["amount"], match["out"]
        if out and operator != "crop":
            raise argparse.ArgumentTypeError(f"{text!r}: only a crop has an output size; leave out :{out}")
        if operator == "pixels":
            if "x" in given or float(given) >= 1:
                raise argparse.ArgumentTypeError(f"{text!r}: {given} is no ratio; give a number from 0 to below 1")
        elif "." in given or not all(
            0 < side <= limit for side, limit in zip(_size(given), (height, width), strict=True)
        ):
            wanted = f"a side, or rows x columns, from 1 to {height}x{width}"
            raise argparse.ArgumentTypeError(f"{text!r}: {given} does not fit the images; give {wanted}")
        return cls(
            operator=operator,
            views=views[0] if views else 1,
            images=(batch, channels, height, width),
            amount=float(given) if operator == "pixels" else _size(given),
            out=_size(out) if out else (height, width),
        )

    def __str__(self) -> str:
        amount = f"{self.amount:g}" if isinstance(self.amount, float) else _sides(self.amount)
        images = "x".join(map(str, self.images if self.views == 1 else (self.views, *self.images)))
        out = "" if self.out == self.images[2:] else f":{_sides(self.out)}"
        return f"{self.operator}:{images}:{amount}{out}"


def _size(text: str) -> HeightWidth:
    """Rows and columns of "19" or "48x80"."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns or rows)


def _sides(size: HeightWidth) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _shapes(texts: str) -> list[ViewShape]:
    return list(map(ViewShape.parse, texts.split()))


HEADLINE = {
    "cpu": _shapes(
        "crop:16x3x128x128:19 hole:16x3x128x128:76 pixels:16x3x128x128:0.7 crop:3x16x3x128x128:19 crop:128x3x32x32:9"
    ),
    "cuda": _shapes(
        "crop:3x128x3x128x128:19 hole:128x3x128x128:76 pixels:3x128x3x128x128:0.7 crop:3x512x3x128x128:19 "
        "crop:128x3x128x128:19"
    ),
}
MORE = _shapes("crop:16x3x128x128:64 crop:16x3x96x128:48x80:64x96")


class ViewBatch(NamedTuple):
    """An input: images of V views, a box corner for each sample, and the gradients to the views."""

    images: Tensors
    top: Tensor
    left: Tensor
    cotangents: Tensors


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    description = "Crops, holes and pixel masks against grid_sample and others: right, fast, small?"
    parser = make_parser("views_bench.py", description, quick="fewer repeats; without --shapes five shapes only")
    example = "such as crop:3x16x3x128x128:19 (three views)"
    parser.add_argument("--shapes", nargs="+", type=ViewShape.parse, metavar="SHAPE", help=example)
    # without a default: on a GPU the first shape is then measured with each of them
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp32; both for a GPU's first shape")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="default: contiguous; both for a GPU's first shape")
    return run(parser, BENCHMARK, argv)


def pick_cases(flags: argparse.Namespace, device: torch.device) -> list[Callable[[torch.device], Case]]:
    """How to make each case: the device's headline shapes first, for runs under a time limit."""
    shapes = flags.shapes or (*HEADLINE[device.type], *(() if flags.quick else MORE))
    cases: list[Callable[[torch.device], Case]] = []
    for i, shape in enumerate(shapes):
        every = device.type == "cuda" and i == 0 and not flags.shapes
        dtypes = [flags.dtype] if flags.dtype else list(DTYPES) if every else ["fp32"]
        layouts = [flags.layout] if flags.layout else list(LAYOUTS) if every else ["contiguous"]
        cases += [partial(make_case, shape, *variant) for variant in product(dtypes, layouts, (False, True))]
    return cases


def make_case(shape: ViewShape, dtype: str, layout: str, backward: bool, device: torch.device) -> Case:
    """The case of a shape: inputs from a fixed seed, the sides, and their errors."""
    generator = torch.Generator().manual_seed(0)
    inputs = [make_batch(shape, dtype, layout, generator, device) for _ in range(ROTATION)]
    kind = ("" if dtype == "fp32" else f" {dtype}") + (" NHWC" if layout == "channels-last" else "")
    results = ("value", "gradient")[: 1 + backward]

    def errors(result: Result) -> dict[str, float]:
        pairs = zip(results, result, exact(shape, inputs[0], result), strict=True)
        return {name: relative_error(got, wanted) for name, got, wanted in pairs}

    return Case(
        labels={
            "shape": f"{shape}{kind}",
            "pass": "both" if backward else "forward",
            **shape._asdict(),
            "dtype": dtype,
            "layout": layout,
            "traffic_bytes": bytes_to_move(shape, DTYPES[dtype].itemsize, backward=backward),
            "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        },
        inputs=inputs,
        errors=errors,
        sides=[
            Side(
                name=name,
                make=partial(_make, views, backward),
                ours=name == "fastle",
                gates={result: GATES[dtype][result] for result in results},
            )
            for name, views in make_sides(shape).items()
        ],
    )


def make_sides(shape: ViewShape) -> dict[str, MakeViews]:
    """What makes the views of a shape, by each side's name, fastle's first."""
    amount = shape.amount
    peers: dict[str, MakeViews]
    if isinstance(amount, float):
        ours: MakeViews = partial(our_masks, ratio=amount)
        peers = {"eager": partial(eager_masks, ratio=amount)}
        names = {"eager": "compiled"}
    elif shape.operator == "hole":
        ours, peers = partial(our_holes, hole=amount), {"eager": partial(eager_holes, hole=amount)}
        names = {"eager": "compiled"}
    else:
        ours = partial(our_crops, box=amount, out=shape.out)
        both = {"grid_sample": grid_crops, "roi_align": roi_crops}
        peers = {name: partial(peer, box=amount, out=shape.out) for name, peer in both.items()}
        names = {name: f"{name} compiled" for name in both}
    sides = {"fastle": ours}
    for name, peer in peers.items():
        sides |= {name: peer, names[name]: compiled(peer)}
    return sides


def our_crops(images: Tensors, top: Tensor, left: Tensor, *, box: HeightWidth, out: HeightWidth) -> Tensors:
    return tuple(crop_resize(images, top, left, *box, out_size=out))


def our_holes(images: Tensors, top: Tensor, left: Tensor, *, hole: HeightWidth) -> Tensors:
    return tuple(mask_fill(images, top, left, *hole))


def our_masks(images: Tensors, top: Tensor, left: Tensor, *, ratio: float) -> Tensors:
    # the draw belongs to what is compared: eager draws too
    seeds = torch.randint(2**32, top.shape, device=top.device)
    return tuple(mask_patches(images, seeds, ratio=ratio))


def make_batch(
    shape: ViewShape, dtype: str, layout: str, generator: torch.Generator, device: torch.device
) -> ViewBatch:
    """Images in [0.1, 1), where no pixel looks masked; corners of boxes that fit; normally distributed gradients."""
    batch, channels, *size = shape.images
    box = (0, 0) if isinstance(shape.amount, float) else shape.amount

    def moved(x: Tensor) -> Tensor:
        return x.to(device, DTYPES[dtype], memory_format=LAYOUTS[layout])

    images = [0.1 + 0.9 * torch.rand(shape.images, generator=generator) for _ in range(shape.views)]
    top, left = (
        torch.randint(extent - side + 1, (batch,), generator=generator).to(device)
        for extent, side in zip(size, box, strict=True)
    )
    cotangents = [torch.randn(batch, channels, *shape.out, generator=generator) for _ in range(shape.views)]
    return ViewBatch(tuple(moved(x).requires_grad_() for x in images), top, left, tuple(map(moved, cotangents)))


def _make(views: MakeViews, backward: bool) -> Callable[[ViewBatch], Result]:
    return partial(forward_backward if backward else forward, views)


def forward(views: MakeViews, batch: ViewBatch) -> Result:
    return (tuple(view.detach() for view in views(batch.images, batch.top, batch.left)),)


def forward_backward(views: MakeViews, batch: ViewBatch) -> Result:
    outputs = views(batch.images, batch.top, batch.left)
    return tuple(view.detach() for view in outputs), torch.autograd.grad(outputs, batch.images, batch.cotangents)


def exact(shape: ViewShape, batch: ViewBatch, result: Result) -> Result:
    """Views, and gradients if `result` has them, in float64. Masks are read from `result`, because sides draw them."""
    images, gradients = ([x.detach().double() for x in xs] for xs in (batch.images, batch.cotangents))
    amount = shape.amount
    if isinstance(amount, float):
        keep = _unmasked(result[0][0], int(amount * math.prod(shape.images[2:])))
        values, backwards = [x * keep for x in images], [g * keep for g in gradients]
    elif shape.operator == "hole":
        inside = torch.zeros_like(images[0][:, :1])
        for sample, top, left in zip(inside, batch.top.tolist(), batch.left.tolist(), strict=True):
            sample[:, top : top + amount[0], left : left + amount[1]] = 1
        share = 1 / math.prod(shape.images[2:])
        values = [x + inside * (share * x.sum((2, 3), keepdim=True) - x) for x in images]
        # inside the hole only the mean has a gradient, which is the same for every pixel
        backwards = [g * (1 - inside) + share * (g * inside).sum((2, 3), keepdim=True) for g in gradients]
    else:
        vertical, horizontal = (
            _hat(corner, side, n, extent)
            for corner, side, n, extent in zip(
                (batch.top, batch.left), amount, shape.out, shape.images[2:], strict=True
            )
        )
        values = [vertical @ x @ horizontal.mT for x in images]
        backwards = [vertical.mT @ g @ horizontal for g in gradients]
    return (tuple(values), tuple(backwards))[: len(result)]


def _hat(corner: Tensor, side: int, n: int, extent: int) -> Tensor:
    """(B, 1, n, extent) float64: the weight of each of the image's lines in each of the n lines of the result."""
    lines = torch.arange(n, device=corner.device, dtype=torch.float64) * ((side - 1) / max(n - 1, 1))
    position = (corner[:, None] + lines)[:, None, :, None]
    return (1 - (position - torch.arange(extent, device=corner.device)).abs()).clamp_min(0)


def _unmasked(view: Tensor, count: int) -> Tensor:
    """(B, 1, H, W) float64: 0 at the `count` pixels of each sample that are least in the view's first channel, else 1.

    In a right result those are the masked ones, exactly 0. If a result masks more or fewer pixels, or not the same in
    all channels and views, some pixel differs from this mask's, because no pixel of an image is near 0.
    """
    first = view[:, :1].detach()
    masked = first.flatten(1).argsort(dim=1)[:, :count]
    return torch.ones_like(first.flatten(1), dtype=torch.float64).scatter(1, masked, 0).view(first.shape)


def bytes_to_move(shape: ViewShape, item: int, *, backward: bool) -> int:
    """Bytes that must go through memory, for numbers of `item` bytes.

    A crop's forward reads the box and writes the result; its backward reads the gradient and writes that of the whole
    image. A hole or mask reads and writes whole images each time, because masked pixels lie in all lines of memory.
    """
    batch, channels, *size = shape.images
    whole, result = math.prod(size), math.prod(shape.out)
    if isinstance(shape.amount, float) or shape.operator == "hole":
        pixels = (1 + backward) * 2 * whole
    else:
        pixels = math.prod(shape.amount) + result + backward * (result + whole)
    return item * shape.views * batch * channels * pixels


def columns(row: Row) -> list[Column]:
    """The columns of a row's table."""

    def rate(name: str, side: Row) -> float:
        return row["traffic_bytes"] / (side["graph_ms"] if "graph_ms" in side else side["ms"])["p50"] / 1e6

    return [
        *operator_columns(row),
        Column("GB/s", lambda name, side: digits(rate(name, side))),
        Column("of\ncopy", lambda name, side: f"{rate(name, side) / row['copy_gb_per_s']:.0%}"),
    ]


def panels(row: Row) -> list[Panel]:
    """Forward + backward only; the table has the rows of the forward alone."""
    return time_and_memory(row) if row["pass"] == "both" else []


BENCHMARK = Benchmark(
    name="views",
    cases=pick_cases,
    columns=columns,
    panels=panels,
    notes=lambda report: [
        "both: forward + backward. ×: a side's figure over fastle's. The first call includes compilation"
    ],
)

if __name__ == "__main__":
    sys.exit(main())
