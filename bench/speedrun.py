"""How many steps and seconds of training a quality takes: fastle's recipe, the post's plain step, the pixel baseline.

    python bench/speedrun.py --data DIR --json FILE            # hidden 64, batch 128, seeds 0, 1 and 2
    python bench/speedrun.py --data DIR --quick                # hidden 32, batch 64
    python bench/speedrun.py --data DIR --quick --seeds 1 --sides fastle pixel
    python bench/speedrun.py --from FILE --plot FILE.png

It measures the fastle of its own checkout, installed or not. --data holds train/ and test/ with CIFAR-10's photographs,
as `scripts/reproduce.py` takes them. Each seed makes a row. The sides:

    fastle      the default recipe, compiled; its rate falls to zero over --steps
    pixel       the pixel baseline with the same schedule, compiled
    post        --recipe post in fastle/training/plain_step.py, eager: the author's structure; at most --limit steps

The sides take turns of 25 steps, after each of which the mean PSNR of 1,000 held-out photographs is measured. A side is
done when it has reached the highest target, when it has diverged, or at the end of its steps. Its clock runs only while
it trains, the wait for images included. The first step, which compiles, stands apart: no side's clock counts it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# first, so that the code that is measured is that of the commit in the report
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common.command import Benchmark, make_parser, pick_sides, run
from bench.common.plot import Panel
from bench.common.table import Column, Row, digits, ratio
from fastle.config import ConfigError, RunConfig
from fastle.data import Feed, Images, Loading, open_images
from fastle.machine import synchronize
from fastle.method.model import Autoencoder
from fastle.presets import make_config
from fastle.profiling.measure import percentiles
from fastle.training.evaluate import validation_psnr
from fastle.training.plain_step import PlainStep, StartingPoint
from fastle.training.trainer import Trainer

TARGETS = (22.0, 23.0, 24.0)  # dB
EVERY = 25  # steps of a turn
VALIDATED = 1000  # images
SIZES = {False: {"hidden": 64, "batch_size": 128}, True: {"hidden": 32, "batch_size": 64}}
STEPS, LIMIT, SEEDS = 400, 4000, 3
SIDES = ("fastle", "pixel", "post")


@dataclass(slots=True, kw_only=True)
class Runner:
    """One side of one seed.

    Attributes:
        call: Takes a step on a batch.
        model: The autoencoder with its present weights.
        batches: What the steps take.
        limit: The most steps.
        seconds: Of all steps but the first.
        first: Seconds of the first step.
        ms: Of each step but the first.
        curve: Steps, seconds and dB after each turn; -inf of a model whose weights are not finite.
    """

    call: Callable[[Tensor], Any]
    model: Callable[[], Autoencoder]
    batches: Iterator[Tensor]
    limit: int
    seconds: float = 0.0
    first: float = 0.0
    ms: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the highest target is reached, or every step is taken."""
        if not self.curve:
            return False
        taken, _, psnr = self.curve[-1]
        return psnr >= TARGETS[-1] or psnr == -math.inf or taken >= self.limit

    def turn(self, valid: Images, device: torch.device) -> None:
        """Takes the steps of a turn, and measures the PSNR."""
        taken = self.curve[-1][0] if self.curve else 0
        for _ in range(min(EVERY, self.limit - taken)):
            began = time.perf_counter()
            self.call(next(self.batches))
            synchronize(device)
            elapsed = time.perf_counter() - began
            taken += 1
            if taken == 1:
                self.first = elapsed
                continue
            self.seconds += elapsed
            self.ms.append(1e3 * elapsed)
        psnr = validation_psnr(self.model(), valid, limit=VALIDATED, device=device)
        self.curve.append((taken, round(self.seconds, 3), round(psnr, 3) if math.isfinite(psnr) else -math.inf))

    def figures(self) -> Row:
        """What the report says of the side. `reached` has steps and seconds, or None, for each target."""
        reached = {f"{target:g}": next((x[:2] for x in self.curve if x[2] >= target), None) for target in TARGETS}
        return {
            "ms": percentiles(self.ms),
            "first_step_seconds": round(self.first, 1),
            "reached": reached,
            "best": _number(max(psnr for _, _, psnr in self.curve)),
            "curve": [(taken, seconds, _number(psnr)) for taken, seconds, psnr in self.curve],
        }


def _number(psnr: float) -> float | None:
    # JSON knows no infinity
    return psnr if math.isfinite(psnr) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    description = "Seconds and steps of training to 22, 23 and 24 dB."
    parser = make_parser("speedrun.py", description, quick="half the width, half the batch", sides=SIDES)
    parser.add_argument("--data", type=Path, metavar="DIR", help="train/ and test/ with CIFAR-10's photographs")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="seeds 0 to N - 1; default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="of fastle and pixel; default: %(default)s"
    )
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help="steps of post; default: %(default)s")
    return run(parser, BENCHMARK, argv)


def pick_cases(flags: argparse.Namespace, device: torch.device) -> list[Callable[[torch.device], Row]]:
    """What measures each seed.

    Raises:
        ConfigError: --data is missing, or a number is out of range.
    """
    if flags.data is None:
        raise ConfigError("--data is missing: give the folder that holds train/ and test/")
    for name in ("seeds", "steps", "limit"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(flags, name)}")
    options = {"data": flags.data, "size": 32, **SIZES[flags.quick]}
    lengths = {"fastle": flags.steps, "pixel": flags.steps, "post": flags.limit}
    names = pick_sides(flags, device, SIDES)
    return [
        partial(measure_seed, seed, {name: make_side(name, seed, lengths[name], **options) for name in names})
        for seed in range(flags.seeds)
    ]


def make_side(name: str, seed: int, steps: int, **options: Any) -> RunConfig:
    """The configuration of a side: the preset of a folder, but for what defines the side."""
    own = {"fastle": {}, "pixel": {"objective": "pixel"}, "post": {"recipe": "post"}}[name]
    return make_config("folder", seed=seed, steps=steps, precision="fp32", **own, **options)


def measure_seed(seed: int, sides: Mapping[str, RunConfig], device: torch.device) -> Row:
    """The row of one seed.

    Raises:
        FastleError: The photographs cannot be used.
    """
    config = next(iter(sides.values()))
    loading = Loading(cache="host", device=device)
    images, valid = (open_images(config.data, split, loading) for split in ("train", "valid"))
    # each row compiles its own models, and torch counts all of them towards one limit
    torch.compiler.reset()
    with ExitStack() as stack:
        runners = {name: make_runner(name, side, images, device, stack) for name, side in sides.items()}
        while waiting := [runner for runner in runners.values() if not runner.done]:
            for runner in waiting:
                runner.turn(valid, device)
    # the folder of the photographs does not decide the figures
    settings = {name: replace(side, data=replace(side.data, root=None)).to_dict() for name, side in sides.items()}
    return {
        "shape": f"hidden {config.model.hidden}, batch {config.train.batch_size}, seed {seed}",
        "training_images": len(images),
        "validation_images": min(VALIDATED, len(valid)),
        "refused": None,
        "settings": settings,
        "sides": {name: runner.figures() for name, runner in runners.items()},
    }


def make_runner(name: str, config: RunConfig, images: Images, device: torch.device, stack: ExitStack) -> Runner:
    """What trains a side. `stack` closes its feed."""
    train = config.train
    assert train.steps is not None
    feed = Feed(images, batch_size=train.batch_size, seed=train.seed, device=device, stop_step=train.steps)
    batches = iter(stack.enter_context(feed))
    if name != "post":
        trainer = Trainer(config, device, mode="compiled")
        return Runner(call=trainer, model=lambda: trainer.model, batches=batches, limit=train.steps)
    step, model = PlainStep(StartingPoint(config, device)), Autoencoder(config.model).to(device)

    def weights() -> Autoencoder:
        model.load_state_dict(step.model.state_dict())
        return model

    return Runner(call=step, model=weights, batches=batches, limit=train.steps)


def columns(row: Row) -> list[Column]:
    """Steps and seconds to each target, and how many times the seconds of the first side those are."""
    ours = next(iter(row["sides"].values()))
    result = [Column("ms a\nstep", lambda name, side: f"{side['ms']['p50']:.0f}")]
    for target in map("{:g}".format, TARGETS):
        result += [
            Column(f"steps to\n{target} dB", partial(_reached, target, lambda reached: f"{reached[0]:,}")),
            Column("seconds", partial(_reached, target, lambda reached: f"{reached[1]:.1f}")),
            Column("time ×", partial(_reached, target, partial(_times_ours, ours["reached"][target]))),
        ]
    return [*result, Column("best\ndB", lambda name, side: f"{side['best']:.2f}" if side["best"] else "–")]


def _reached(target: str, text: Callable[[Sequence[float]], str], name: str, side: Row) -> str:
    return text(side["reached"][target]) if side["reached"][target] else "–"


def _times_ours(ours: Sequence[float] | None, reached: Sequence[float]) -> str:
    return ratio(reached[1], ours[1]) if ours else "–"


def panels(row: Row) -> list[Panel]:
    """Seconds to each target; a side that did not reach it has no bar."""
    result = []
    for target in map("{:g}".format, TARGETS):
        reached = {name: side["reached"][target] for name, side in row["sides"].items()}
        bars = {name: (at[1], digits(at[1])) if at else (0.0, "not reached") for name, at in reached.items()}
        result.append(Panel(f"{row['shape']}: seconds to {target} dB", bars))
    return result


def notes(report: Row) -> list[str]:
    """What the tables cannot show."""
    first = [f"{name} {side['first_step_seconds']:.0f} s" for name, side in report["rows"][0]["sides"].items()]
    return [
        f"validated every {EVERY} steps on {report['rows'][0]['validation_images']:,} held-out photographs",
        f"not counted: the first step, which compiles: {', '.join(first)}",
    ]


BENCHMARK = Benchmark(
    name="speedrun",
    cases=pick_cases,
    measure=lambda case, device, effort: case(device),
    columns=columns,
    panels=panels,
    notes=notes,
)

if __name__ == "__main__":
    sys.exit(main())
