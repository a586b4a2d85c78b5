"""The whole training step against the plain eager one: correctness, time, FLOP, memory, on a CPU or a GPU.

    python bench/step_bench.py                        # on a CPU five settings, most of the time spent compiling
    python bench/step_bench.py --quick                # a CPU: CIFAR-10 at batch 32
    python bench/step_bench.py --shapes celeba-masked-512:128 cifar10:128 --json FILE
    python bench/step_bench.py --shapes celeba-spatial:4 --sides plain "fastle compiled bf16"
    python bench/step_bench.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. A shape is SETTING:BATCH, a setting one of fastle's
presets with the post's recipe; that of -tuned is the default recipe's objective, with AdamW at a constant rate and with
no bound on the gradient. A call is one step on a uint8 batch that is on the device already: draws, forward, backward,
AdamW.
The sides:

    plain                   fastle/training/plain_step.py: eager, fp32, contiguous
    plain bf16              the same under autocast, channels-last
    plain compiled          channels-last, its loss as one graph of torch.compile
    plain captured          the same, in CUDA graphs by torch.compile's mode "reduce-overhead"; CUDA only
    fastle eager            Trainer(mode="eager"), fp32
    fastle compiled         mode="compiled"
    fastle captured         mode="captured"; CUDA only
    … bf16                  the same in bf16

A CPU without AVX-512 emulates bf16, so slowly that those sides run there only if --sides names them.
fp32 is with PyTorch's defaults: on a GPU convolutions may use TF32, matrix products do not.

A training step changes what it starts from, so that only its first call can be right or wrong. All sides start from the
same weights, batch and draws. Loss and gradients of the first step must be those of fastle's objective in float64, and
the weights must move as AdamW's formula says for the side's own gradients. The gates (with what was measured):

    fp32   loss 1e-5 relative (4e-7 on a CPU), gradients 1e-3 (2e-5): rounding, and room for other orders of sums.
           With TF32 convolutions (PyTorch's default on a GPU), whose products keep 11 bits: 1e-4 (5e-6 on an H100) and
           5e-3 (8e-4)
    bf16   loss 2e-2 (3e-3), gradients 0.1 (2e-2): a product keeps 8 bits, a gradient goes through some thirty of them
    both   3e-3 of the movement (5e-4): fp32 keeps 6e-8 of a weight of 1, which a rate of 1e-4 moves by 1e-4

A gradient's error is the largest over the parameters, in Euclidean norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# first, so that the code that is measured is that of the commit in the report
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common.command import Benchmark, make_parser, pick_sides, run
from bench.common.measure import ROTATION, Case, Side
from bench.common.plot import Panel
from bench.common.table import Column, Row, digits, error_columns, ratio, time_columns
from fastle.choices import StepMode
from fastle.config import Precision, RunConfig
from fastle.method.model import Autoencoder
from fastle.method.objective import SelfTeaching
from fastle.presets import make_config
from fastle.profiling.measure import count_flop, matmul_peak, product_type
from fastle.training.plain_step import PlainStep, StartingPoint
from fastle.training.trainer import Trainer

Step: TypeAlias = PlainStep | Trainer

SETTINGS: dict[str, Callable[..., RunConfig]] = {
    "celeba-masked-128": partial(make_config, "celeba", recipe="post", masked=True, latent=128),
    "celeba-masked-512": partial(make_config, "celeba", recipe="post", masked=True, latent=512),
    "celeba-masked-512-tuned": partial(
        make_config,
        "celeba",
        masked=True,
        latent=512,
        schedule="constant",
        warmup=0.0,
        clip=0.0,
        optimizer="adamw",
    ),
    "celeba-spatial": partial(make_config, "celeba", recipe="post"),
    "cifar10": partial(make_config, "cifar10", recipe="post"),
}
IN_FP32 = ("plain", "plain compiled", "plain captured", "fastle eager", "fastle compiled", "fastle captured")
NAMES = tuple(name + precision for name in IN_FP32 for precision in ("", " bf16"))
GATES = {
    "fp32": {"value": 1e-5, "gradient": 1e-3, "update": 3e-3},
    "tf32": {"value": 1e-4, "gradient": 5e-3, "update": 3e-3},
    "bf16": {"value": 2e-2, "gradient": 0.1, "update": 3e-3},
}
COUNTED = 2  # images whose FLOP are counted: FLOP grow in proportion to the number of images
CHUNK = 16  # images whose float64 activations are held at once
# gradients smaller than this share of the largest are measured by that: a bias's before a BatchNorm is only rounding
SMALL = 0.1
WEIGHT_DECAY, EPS = 1e-2, 1e-8  # AdamW's defaults


class StepShape(NamedTuple):
    """A setting and its batch."""

    setting: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> StepShape:
        """Reads SETTING:BATCH.

        Raises:
            ArgumentTypeError: The text is something else.
        """
        setting, _, batch = text.partition(":")
        if setting not in SETTINGS or not batch.isdecimal() or int(batch) < 2:
            wanted = f"SETTING:BATCH, a setting of {', '.join(SETTINGS)} and a batch from 2"
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: give {wanted}")
        return cls(setting, int(batch))

    def __str__(self) -> str:
        return f"{self.setting}:{self.batch}"


QUICK = {
    "cpu": [StepShape("cifar10", 32)],
    "cuda": [StepShape("celeba-masked-512", 128), StepShape("cifar10", 128)],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row was refused."""
    description = "The training step against the plain eager one: right, fast, small?"
    quick = "fewer repeats; without --shapes one or two shapes only"
    parser = make_parser("step_bench.py", description, quick=quick, sides=NAMES)
    example = "SETTING:BATCH, such as celeba-masked-128:4"
    parser.add_argument("--shapes", nargs="+", type=StepShape.parse, metavar="SHAPE", help=example)
    return run(parser, BENCHMARK, argv)


def pick_cases(flags: argparse.Namespace, device: torch.device) -> list[Callable[[torch.device], Case]]:
    """How to make each case.

    Raises:
        ConfigError: --sides names one that this device does not have.
    """
    sides = pick_sides(flags, device, [name for name in NAMES if device.type == "cuda" or "captured" not in name])
    if not flags.sides and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # a product takes a hundred times as long as in fp32
        sides = [name for name in sides if "bf16" not in name]
        print("the sides in bf16 are left out: this CPU has no AVX-512, and emulates it", file=sys.stderr)
    return [partial(make_case, shape, sides) for shape in pick_shapes(flags, device)]


def pick_shapes(flags: argparse.Namespace, device: torch.device) -> list[StepShape]:
    """What to measure: the quick shapes first, for runs under a time limit."""
    if flags.shapes:
        return list(flags.shapes)
    if flags.quick:
        return QUICK[device.type]
    if device.type == "cpu":
        return [StepShape(setting, 32 if setting == "cifar10" else 4) for setting in SETTINGS]
    every = [StepShape(setting, batch) for batch in (128, 16, 512) for setting in SETTINGS]
    return list(dict.fromkeys((*QUICK["cuda"], *every)))


def make_case(shape: StepShape, names: Sequence[str], device: torch.device) -> Case:
    """The case of a shape: batches from a fixed seed, the sides, and their errors."""
    config = SETTINGS[shape.setting](batch_size=shape.batch)
    start = StartingPoint(config, device)
    generator = torch.Generator().manual_seed(0)
    inputs = [make_batch(config, generator).to(device) for _ in range(ROTATION)]
    products = {product_type("bf16" if "bf16" in name else "fp32", device) for name in names}
    loss, gradients = exact(start, inputs[0])
    before = start.parameters()

    def errors(result: FirstStep) -> dict[str, float]:
        moved = [after.double() - at_start for after, at_start in zip(result.weights, before, strict=True)]
        return {
            "value": distance([result.loss], [loss]),
            "gradient": distance(result.gradients, gradients),
            "update": distance(moved, adamw(before, result.gradients, config.train.lr)),
        }

    return Case(
        labels={
            "shape": str(shape),
            "setting": shape.setting,
            "batch": shape.batch,
            "flops_per_image": count_flops(SETTINGS[shape.setting](), device),
            "peak_flops": {product: matmul_peak(product, device) for product in products},
        },
        inputs=inputs,
        sides=[make_side(start, name) for name in names],
        errors=errors,
        first=first_step,
        capture=False,
    )


def make_batch(config: RunConfig, generator: torch.Generator) -> Tensor:
    """uint8 (B, C, H, W): patches of colour with soft edges, and a little noise.

    Noise alone would not do: its codes are so similar that the BatchNorm turns rounding into signal.
    """
    batch, channels = config.train.batch_size, config.model.channels
    coarse = torch.rand(batch, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, config.model.sides, mode="bilinear", align_corners=True)
    noise = torch.randn(smooth.shape, generator=generator)
    return (255 * (smooth + 0.02 * noise).clamp(0, 1)).round().to(torch.uint8)


def make_side(start: StartingPoint, name: str) -> Side:
    """The side of a name."""
    ours, kind = name.startswith("fastle"), name.split()[1:]
    precision: Precision = "bf16" if "bf16" in kind else "fp32"
    make: Callable[[], Step]
    if ours:
        train = dataclasses.replace(start.config.train, precision=precision)
        config, mode = dataclasses.replace(start.config, train=train), cast(StepMode, kind[0])
        make = partial(Trainer, config, start.device, mode=mode)
    else:
        # all but the author's own structure get the layout that suits convolutions
        channels_last = bool(kind)
        mode = cast(StepMode, next((word for word in kind if word != "bf16"), "eager"))
        make = partial(PlainStep, start, precision=precision, channels_last=channels_last, mode=mode)
    product = product_type(precision, start.device)
    return Side(name=name, make=make, ours=ours, gates=GATES[product], labels={"precision": precision})


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What a first step did: its loss, and for each parameter the gradient and the weights after the step."""

    loss: Tensor
    gradients: list[Tensor]
    weights: list[Tensor]


def first_step(step: Step, images: Tensor) -> FirstStep:
    """Takes the first step, and reads what it did.

    Gradients are read from AdamW's first moment, (1 − β1) times the gradient: this is what the optimizer saw, whatever
    a graph or a compiled step leaves in `.grad`.

    Raises:
        RuntimeError: fastle's step continues in another mode than it was made for.
    """
    mode = getattr(step, "mode", None)
    loss = step(images)
    if getattr(step, "mode", None) != mode:
        raise RuntimeError(f"the step went on as {step.mode}")  # type: ignore[union-attr]
    (group,) = step.optimizer.param_groups
    return FirstStep(
        # the next captured step overwrites this one's loss
        loss=(loss if isinstance(loss, Tensor) else loss.total).detach().clone(),
        gradients=[step.optimizer.state[p]["exp_avg"].double() / (1 - group["betas"][0]) for p in group["params"]],
        weights=[p.detach().clone() for p in group["params"]],
    )


class Chunked(nn.Module):
    """A module that mixes no samples, run on some of them at a time; the backward computes each part again.

    Its arguments are batches of one length.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *batches: Tensor) -> Tensor:
        if len(batches[0]) <= CHUNK:
            return self.inner(*batches)
        parts = zip(*(batch.split(CHUNK) for batch in batches), strict=True)
        return torch.cat([checkpoint(self.inner, *part, use_reentrant=False) for part in parts])


def exact(start: StartingPoint, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the first step on a batch, by fastle's objective in float64.

    That the objective is the method is for the tests to show: they compare it with an oracle, and the plain step with
    the objective.
    """
    model = Autoencoder(start.config.model).to(start.device)
    model.load_state_dict(start.weights)
    objective = SelfTeaching(model.double().train(), start.config.objective)
    parameters = list(model.parameters())
    chunked: dict[nn.Module, str] = {model.decoder: "up", model.encoder: "down", objective.judge: "down"}
    for module, name in chunked.items():
        setattr(module, name, nn.Sequential(*(Chunked(block) for block in getattr(module, name))))
    draws = start.draw(images, 0)
    assert draws.slices is not None
    loss = objective(images.double() / 255, dataclasses.replace(draws, slices=draws.slices.double())).total
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


@cache
def count_flops(config: RunConfig, device: torch.device) -> dict[str, float]:
    """FLOP per image that a step executes, of "fastle" and "plain", each eager in fp32."""
    start = StartingPoint(config, device)
    shape = (COUNTED, config.model.channels, *config.model.sides)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    names = {"fastle": "fastle eager", "plain": "plain"}
    return {structure: count_flop(make_side(start, name).make(), images) for structure, name in names.items()}


def adamw(before: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> list[Tensor]:
    """How AdamW's first step moves the weights, in float64: after bias correction its moments are g and g²."""
    pairs = zip(before, gradients, strict=True)
    return [-lr * (WEIGHT_DECAY * w.double() + g.double() / (g.double().abs() + EPS)) for w, g in pairs]


def distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |got − wanted| / |wanted| of the pairs, in Euclidean norms; NaN if a number is not finite.

    Norms of `wanted` that are smaller than `SMALL` of the largest are replaced by that.
    """
    norms = torch.stack([w.double().norm() for w in wanted])
    apart = torch.stack([(g.double() - w).norm() for g, w in zip(got, wanted, strict=True)])
    # a maximum keeps NaN
    return float((apart / norms.clamp_min(SMALL * float(norms.max()))).max())


def images_per_second(row: Row, side: Row) -> float:
    """A side's rate."""
    return 1e3 * row["batch"] / side["ms"]["p50"]


def columns(row: Row) -> list[Column]:
    """The columns of a row's table."""

    def mfu(name: str, side: Row) -> str:
        flops = row["flops_per_image"][name.partition(" ")[0]] * images_per_second(row, side)
        # where convolutions use TF32, that is what fp32 is measured by
        peaks = row["peak_flops"]
        product = "tf32" if side["precision"] == "fp32" and "tf32" in peaks else side["precision"]
        return f"{flops / peaks[product]:.0%}"

    def speed_up(name: str, side: Row) -> str:
        return ratio(row["sides"]["plain"]["ms"]["p50"], side["ms"]["p50"])

    return [
        *time_columns(),
        Column("images/s", lambda name, side: digits(images_per_second(row, side))),
        Column("speed-up\nover plain", speed_up),
        Column("MFU", mfu),
        Column("peak\nMB", lambda name, side: digits(side["peak_bytes"] / 1e6)),
        *error_columns("value", "gradient"),
    ]


def panels(row: Row) -> list[Panel]:
    """Images per second."""
    rates = {name: images_per_second(row, side) for name, side in row["sides"].items() if "ms" in side}
    return [Panel(f"{row['shape']}: images/s", {name: (rate, digits(rate)) for name, rate in rates.items()})]


def notes(report: Row) -> list[str]:
    """What the figures mean."""
    row = report["rows"][0]
    flops = ", ".join(f"{name} {digits(count / 1e9)}" for name, count in row["flops_per_image"].items())
    peaks = ", ".join(f"{name} {peak / 1e12:.3g} TFLOP/s" for name, peak in row["peak_flops"].items())
    return [
        f"MFU: the FLOP that a side's own structure executes in convolutions and matrix products (GFLOP per image of "
        f"{row['shape']}: {flops}), over the fastest large matrix product of this process: {peaks}",
        "peak MB: beyond weights, gradients and moments. first call: construction, compilation, the first step",
    ]


BENCHMARK = Benchmark(
    name="step",
    cases=pick_cases,
    columns=columns,
    panels=panels,
    notes=notes,
)

if __name__ == "__main__":
    sys.exit(main())
