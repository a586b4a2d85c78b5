"""The second row of the loaders' bench: real training steps, fed by each of fastle's sides, or by none."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice, repeat
from typing import cast, get_args

import torch
from torch import Tensor

from bench.loader_sides import BATCH, SEED, Workload, own_clock
from bench.measure import Effort, Row, interleave, synchronize
from fastle.config import RunConfig
from fastle.data import Feed, Images
from fastle.errors import FastleError
from fastle.presets import make_config
from fastle.training.trainer import StepMode, Trainer

FIXED = "fixed batch"
WARM_STEPS = 4  # untimed: the feed is ahead of the first ones
STEPS = {"cpu": 6, "cuda": 50}  # timed in a call
CPU_HIDDEN, CPU_BATCH, GPU_LATENT = 16, 16, 512


def measure_step(work: Workload, device: torch.device, effort: Effort) -> Row:
    """Steps on one fixed batch and on loaded ones: ms, the share of them spent waiting for the feed, what they cost."""
    config, mode = step_config(work, device)
    batch = config.train.batch_size
    if device.type == "cpu":
        shape = f"CelebA at hidden {config.model.hidden} (not the preset's), batch {batch}"
    else:
        shape = f"CelebA masked, latent {config.model.latent}, batch {batch}"
    sides: dict[str, Row] = {name: {"status": "measured"} for name in (FIXED, *work.opened)}
    row: Row = {
        "shape": shape,
        "batch": batch,
        "mode": mode,
        "precision": config.train.precision,
        "steps_per_call": STEPS[device.type],
        "refused": work.refused,
        "sides": sides,
    }
    if not work.opened:
        row["refused"] = work.refused or "none of fastle's sides can be had"
    if row["refused"]:
        return row
    step = Trainer(config, device, mode=mode)
    fixed = next(iter(work.opened.values())).batch(range(batch)).to(device)
    try:
        for _ in range(WARM_STEPS):  # the first one compiles
            step(fixed)
    except FastleError as error:
        return row | {"refused": str(error)}
    row["mode"] = step.mode  # what cannot be captured goes on compiled
    waits: dict[str, list[float]] = {name: [] for name in sides}
    times: dict[str, list[float]] = {name: [] for name in sides}
    calls = {name: partial(_train, step, work.opened.get(name, fixed), waits[name], times[name]) for name in sides}
    for name, ms in interleave(calls, own_clock, effort).items():
        sides[name]["ms"] = ms
        sides[name]["wait_share"] = statistics.median(waits[name])
        # pairs of a round, so that a machine that slows down in between slows both
        pairs = zip(times[name], times[FIXED], strict=True)
        sides[name]["over_fixed"] = statistics.median(mine / base for mine, base in pairs) - 1
    return row


def step_config(work: Workload, device: torch.device) -> tuple[RunConfig, StepMode]:
    """The run whose steps are timed, and their mode."""
    if device.type == "cpu":
        config = make_config("celeba", data=work.root, batch_size=CPU_BATCH, seed=SEED)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=CPU_HIDDEN)), "eager"
    config = make_config(
        "celeba", data=work.root, masked=True, latent=GPU_LATENT, batch_size=BATCH, seed=SEED, precision="bf16"
    )
    # the fastest there is: it is the one that loading has to keep up with
    modes = [mode for mode in ("captured", "compiled", "eager") if mode in get_args(StepMode)]
    return config, cast(StepMode, modes[0])


def _train(step: Trainer, source: Images | Tensor, waits: list[float], times: list[float], turn: int) -> float:
    """ms of a step, fed by the images or the same batch again and again; its share of waiting goes to `waits`."""
    steps = STEPS[step.device.type]
    with ExitStack() as stack:
        feed = None
        batches: Iterable[Tensor]
        if isinstance(source, Tensor):
            batches = repeat(source)
        else:
            start = turn * (WARM_STEPS + steps)
            # the feed still decodes ahead at the last step that is timed
            stop = start + 2 * WARM_STEPS + steps
            size, seed = step.config.train.batch_size, step.config.train.seed
            feed = Feed(source, batch_size=size, seed=seed, device=step.device, start_step=start, stop_step=stop)
            batches = stack.enter_context(feed)
        ready = iter(batches)
        for images in islice(ready, WARM_STEPS):
            step(images)
        synchronize(step.device)
        waited = feed.wait if feed else 0.0
        begin = time.perf_counter()
        for images in islice(ready, steps):
            step(images)
        synchronize(step.device)
        seconds = time.perf_counter() - begin
        waits.append(((feed.wait if feed else 0.0) - waited) / seconds)
    times.append(1e3 * seconds / steps)
    return times[-1]
