"""The second row of the loader benchmark: how long a training step waits for the batches that are loaded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from bench.common.loaders import BATCH, SEED, Workload
from bench.common.measure import Effort, interleave
from bench.common.table import Row
from fastle.choices import StepMode
from fastle.config import RunConfig
from fastle.data import Feed, Images
from fastle.errors import FastleError
from fastle.machine import synchronize
from fastle.presets import make_config
from fastle.profiling.measure import percentiles
from fastle.training.trainer import Trainer

FIXED = "fixed batch"
WARM_STEPS = 4  # untimed: the feed is ahead of the first steps
STEPS = {"cpu": 6, "cuda": 50}  # timed in a call
CPU_HIDDEN, CPU_BATCH, GPU_LATENT = 16, 16, 512


def measure_step(work: Workload, device: torch.device, effort: Effort) -> Row:
    """Steps on one fixed batch and on loaded ones: ms, the share of it that waited for the feed, and what they cost."""
    config, mode = step_config(work, device)
    batch, model = config.train.batch_size, config.model
    cpu = device.type == "cpu"
    kind = f"at hidden {model.hidden} (not the preset's)" if cpu else f"masked, latent {model.latent}"
    sides: dict[str, Row] = {name: {"status": "measured"} for name in (FIXED, *work.opened)}
    row: Row = {
        "part": "step",
        "shape": f"CelebA {kind}, batch {batch}, {mode}, {config.train.precision}",
        **work.labels(),
        "batch": batch,
        "mode": mode,
        "steps_per_call": STEPS[device.type],
        "refused": work.refused or (None if work.opened else "none of fastle's sides can be had"),
        "sides": sides,
    }
    if row["refused"]:
        return row
    step = Trainer(config, device, mode=mode)
    fixed = next(iter(work.opened.values())).batch(range(batch)).to(device)
    try:
        # the first one compiles
        for _ in range(WARM_STEPS):
            step(fixed)
    except FastleError as error:
        return row | {"refused": str(error)}
    # a step that cannot be captured is compiled instead
    row["mode"] = step.mode
    waits: dict[str, list[float]] = {name: [] for name in sides}
    calls = {name: partial(train, step, work.opened.get(name, fixed), waits[name]) for name in sides}
    times = interleave(calls, effort)
    for name, ms in times.items():
        # pairs of a round, so that a machine that slows down in between slows both
        over = statistics.median(mine / base for mine, base in zip(ms, times[FIXED], strict=True)) - 1
        sides[name] |= {"ms": percentiles(ms), "wait_share": statistics.median(waits[name]), "over_fixed": over}
    return row


def step_config(work: Workload, device: torch.device) -> tuple[RunConfig, StepMode]:
    """The run whose steps are timed, and their mode."""
    options: dict[str, Any] = {"hidden": CPU_HIDDEN, "batch_size": CPU_BATCH, "precision": "fp32"}
    mode: StepMode = "eager"
    if device.type == "cuda":
        options = {"masked": True, "latent": GPU_LATENT, "batch_size": BATCH, "precision": "bf16"}
        # the fastest mode, with which loading has to keep up
        mode = "captured"
    return make_config("celeba", recipe="post", data=work.root, seed=SEED, **options), mode


def train(step: Trainer, source: Images | Tensor, waits: list[float], turn: int) -> float:
    """Milliseconds per step on images, or on the same batch again and again; appends the share that was waiting."""
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
    return 1e3 * seconds / steps
