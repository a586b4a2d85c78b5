"""The learning rate of each step, as a share of the peak."""

from __future__ import annotations

import math

from fastle.config import TrainConfig


def rate_share(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step over `config.lr`.

    All schedules begin with a linear warm-up over the first `config.warmup` of the run. After it "constant" stays at 1,
    "cosine" falls along half a cosine to 0 at `total`, and "trapezoid" stays at 1 until the last `config.decay` of the
    run, over which it falls linearly to 0 at `total`.

    Args:
        step: The number of steps taken before this one, from 0 to total − 1.
        total: Steps of the whole run, at least 1.

    Returns:
        A share in (0, 1].
    """
    rise = config.warmup * total
    # the first step of a warm-up moves, and the last one is at the peak
    share = min(1.0, (step + 1) / rise) if rise else 1.0
    if config.schedule == "cosine" and step >= rise:
        share *= (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2
    elif config.schedule == "trapezoid":
        share *= min(1.0, (total - step) / (config.decay * total))
    return share
