"""The views against what people run today, forward and forward + backward: correctness, time, memory, bandwidth.

    python bench/views_bench.py                       # the shapes that people run: on a CPU some minutes
    python bench/views_bench.py --quick               # five of them, under two minutes on two cores
    python bench/views_bench.py --shapes crop:3x16x3x128x128:19 hole:16x3x128x128:76 --json FILE
    python bench/views_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. What it knows, for images [V]xBxCxHxW, V views with the
same boxes or masks:

    crop:16x3x128x128:19              a box of side 19, resized to the image's size
    crop:16x3x128x128:48x80:64x96     a box of 48 rows and 80 columns, resized to 64 rows and 96 columns
    hole:16x3x128x128:76              a square of side 76, filled with the image's mean
    pixels:16x3x128x128:0.7           seven of ten pixels set to zero, drawn anew in each call

Each is two rows: "forward", which keeps what the backward needs, and "both", forward + backward. Their difference is
the backward's own time. `bench/views_sides.py` lists the sides.

GB/s counts the bytes that have to move, each pixel that is needed once. Their floor is a copy of half a gigabyte (on a
GPU two), measured in the same process. On a CPU small images stay in its caches, and may go faster than that.
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

# first, so that what is measured is the code whose commit the report names
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import Parser, run
from bench.measure import Case, Result, Side, copy_bandwidth, tensors
from bench.views_plot import draw
from bench.views_sides import PACKAGES, Images, Size, Views, make_sides

ROTATION = 3  # inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# of fp32 as the issue asks; a bf16 result is rounded once, by 2^-8 of itself
GATES = {"fp32": (1e-6, 1e-5), "bf16": (4e-3, 4e-3)}
SIZE = r"[1-9]\d*"
SYNTAX = re.compile(
    rf"(?P<operator>crop|hole|pixels):(?P<images>{SIZE}(x{SIZE}){{3,4}})"
    rf":(?P<amount>\d+(\.\d+)?|{SIZE}x{SIZE})(:(?P<out>{SIZE}(x{SIZE})?))?"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is done to which images.

    Args:
        operator: "crop", "hole" or "pixels".
        views: how many images share boxes or masks.
        images: (B, C, H, W).
        amount: of a crop or hole its rows and columns; of pixels the ratio that is masked.
        out: of a crop, the size it is resized to.
    """

    operator: str
    views: int
    images: tuple[int, int, int, int]
    amount: Size | float
    out: Size

    @classmethod
    def parse(cls, text: str) -> Shape:
        """What the module's text lists.

        Raises:
            ArgumentTypeError: it is none of that, or the box does not fit.
        """
        found = SYNTAX.fullmatch(text)
        if not found:
            wanted = "crop:BxCxHxW:SIDE, crop:BxCxHxW:HxW:HxW, hole:BxCxHxW:SIDE or pixels:BxCxHxW:RATIO"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}; VxBxCxHxW are V views")
        *views, batch, channels, height, width = map(int, found["images"].split("x"))
        operator, given, out = found["operator"], found["amount"], found["out"]
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


def _size(text: str) -> Size:
    """Of "19" or "48x80"."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns or rows)


def _sides(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(map(Shape.parse, texts))


HEADLINE = {
    "cpu": _shapes(
        "crop:16x3x128x128:19",
        "hole:16x3x128x128:76",
        "pixels:16x3x128x128:0.7",
        "crop:3x16x3x128x128:19",
        "crop:128x3x32x32:9",
    ),
    "cuda": _shapes(
        "crop:3x128x3x128x128:19",
        "hole:128x3x128x128:76",
        "pixels:3x128x3x128x128:0.7",
        "crop:3x512x3x128x128:19",
        "crop:128x3x128x128:19",
    ),
}
MORE = _shapes("crop:16x3x128x128:64", "crop:16x3x96x128:48x80:64x96")


@dataclass(frozen=True, slots=True)
class Task:
    """A row: a shape, of what its images are, and whether its backward is timed with it."""

    shape: Shape
    dtype: str
    layout: str
    backward: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """An input: images of V views, a box corner for each sample, and the gradients to what is made of the images."""

    images: Images
    top: Tensor
    left: Tensor
    cotangents: Images


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    parser = Parser(
        "views_bench.py", "Crops, holes and pixel masks against grid_sample and others: right, fast, small?"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="SHAPE", help="such as crop:3x16x3x128x128:19 (three views)"
    )
    # without a default: on a GPU the first shape is then measured with each of them
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the images; default: fp32, for the GPU's first both")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="default: contiguous, for the GPU's first shape both")
    return run(parser, argv, name="views", shapes=pick_tasks, make_case=make_case, draw=draw)


def pick_tasks(flags: argparse.Namespace, device: torch.device) -> list[Task]:
    """What to measure: the device's headline shapes first, for runs under a time limit."""
    shapes = flags.shapes or (*HEADLINE[device.type], *(() if flags.quick else MORE))
    tasks = []
    for i, shape in enumerate(shapes):
        every = device.type == "cuda" and i == 0 and not flags.shapes
        dtypes = [flags.dtype] if flags.dtype else list(DTYPES) if every else ["fp32"]
        layouts = [flags.layout] if flags.layout else list(LAYOUTS) if every else ["contiguous"]
        tasks += [Task(shape, *variant) for variant in product(dtypes, layouts, (False, True))]
    return tasks


def make_case(task: Task, flags: argparse.Namespace, device: torch.device) -> Case:
    """The rows' case: inputs from a fixed seed, the oracle, and the sides."""
    shape = task.shape
    generator = torch.Generator().manual_seed(0)
    inputs = [make_batch(task, generator, device) for _ in range(ROTATION)]
    traffic = bytes_to_move(shape, inputs[0].images[0].element_size(), backward=task.backward)
    copied = copy_bandwidth(device)
    variant = ("" if task.dtype == "fp32" else f" {task.dtype}") + (" NHWC" if task.layout == "channels-last" else "")
    return Case(
        labels={
            "shape": f"{shape}{variant}",
            "pass": "both" if task.backward else "forward",
            "operator": shape.operator,
            "views": shape.views,
            "images": list(shape.images),
            "amount": shape.amount,
            "out": list(shape.out),
            "dtype": task.dtype,
            "layout": task.layout,
            "copy_gb_per_s": copied / 1e9,
        },
        inputs=inputs,
        exact=exact(shape, inputs[0], backward=task.backward),
        gates=GATES[task.dtype][: 1 + task.backward],
        sides=[
            Side(name=name, step=partial(_step, views, backward=task.backward), package=PACKAGES.get(name))
            for name, views in make_sides(shape.operator, shape.amount, shape.out).items()
        ],
        floors={"copy": 1e3 * traffic / copied},
        traffic=traffic,
    )


def make_batch(task: Task, generator: torch.Generator, device: torch.device) -> Batch:
    """Images in [0.1, 1), so that a masked pixel is none of theirs; corners of boxes that fit; normal gradients."""
    shape = task.shape
    batch, channels, *size = shape.images
    rows, columns = (0, 0) if isinstance(shape.amount, float) else shape.amount

    def moved(x: Tensor) -> Tensor:
        return x.to(device, DTYPES[task.dtype], memory_format=LAYOUTS[task.layout])

    images = [0.1 + 0.9 * torch.rand(shape.images, generator=generator) for _ in range(shape.views)]
    top, left = (
        torch.randint(extent - side + 1, (batch,), generator=generator).to(device)
        for extent, side in zip(size, (rows, columns), strict=True)
    )
    cotangents = [torch.randn(batch, channels, *shape.out, generator=generator) for _ in range(shape.views)]
    return Batch(
        images=tuple(moved(x).requires_grad_() for x in images),
        top=top,
        left=left,
        # a forward has no use for them
        cotangents=tuple(map(moved, cotangents)) if task.backward else (),
    )


def _step(views: Views, batch: Batch, *, backward: bool) -> Result:
    outputs = views(batch.images, batch.top, batch.left)
    values = tuple(view.detach() for view in outputs)
    return (values, torch.autograd.grad(outputs, batch.images, batch.cotangents)) if backward else (values,)


def exact(shape: Shape, batch: Batch, *, backward: bool) -> Result | Callable[[Result], Result]:
    """What an input gives, in float64; of pixels, what it gives with the mask that is seen in a result."""
    images = [x.detach().double() for x in batch.images]
    gradients = [g.double() for g in batch.cotangents]
    amount = shape.amount
    if isinstance(amount, float):
        return partial(_exact_pixels, images, gradients, int(amount * math.prod(shape.images[2:])))
    if shape.operator == "hole":
        inside = torch.zeros_like(images[0][:, :1])
        for sample, top, left in zip(inside, batch.top.tolist(), batch.left.tolist(), strict=True):
            sample[:, top : top + amount[0], left : left + amount[1]] = 1
        share = 1 / math.prod(shape.images[2:])
        values = [x + inside * (share * x.sum((2, 3), keepdim=True) - x) for x in images]
        # the rectangle passes on the mean's gradient only, which is the same for every pixel
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
    return (values, backwards) if backward else (values,)


def _hat(corner: Tensor, side: int, n: int, extent: int) -> Tensor:
    """(B, 1, n, extent) float64: how much of each of the image's lines is in each of the n lines of the result."""
    lines = torch.arange(n, device=corner.device, dtype=torch.float64) * ((side - 1) / max(n - 1, 1))
    position = (corner[:, None] + lines)[:, None, :, None]
    return (1 - (position - torch.arange(extent, device=corner.device)).abs()).clamp_min(0)


def _exact_pixels(images: Sequence[Tensor], gradients: Sequence[Tensor], count: int, result: Result) -> Result:
    """Images and gradients without the `count` pixels of each sample that are least in the result's first channel.

    In a right result those are the masked ones, exactly 0. In one that masks more, fewer, or not the same in all
    channels and views, some pixel is not what it is here, and no pixel of an image is near 0.
    """
    first = tensors(result[0])[0][:, :1].detach()
    masked = first.flatten(1).argsort(dim=1)[:, :count]
    keep = torch.ones_like(first.flatten(1), dtype=torch.float64).scatter(1, masked, 0).view(first.shape)
    return tuple([x * keep for x in values] for values in (images, gradients)[: len(result)])


def bytes_to_move(shape: Shape, item: int, *, backward: bool) -> int:
    """What has to go through memory, in bytes, for numbers of `item` bytes.

    A crop's forward reads the box and writes the result; its backward reads the gradient and writes that of the whole
    image. A hole or mask reads and writes whole images each time: masked pixels are strewn over all lines of memory.
    """
    batch, channels, *size = shape.images
    whole, result = math.prod(size), math.prod(shape.out)
    if shape.operator == "crop":
        assert not isinstance(shape.amount, float)
        pixels = math.prod(shape.amount) + result + backward * (result + whole)
    else:
        pixels = (1 + backward) * 2 * whole
    return item * shape.views * batch * channels * pixels


if __name__ == "__main__":
    sys.exit(main())
