"""The metrics of the steps between two rows of metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastle.data import Feed
from fastle.errors import FastleError

from .display import Clock
from .report import effective_rank, latent_spread
from .run import RunDirectory
from .trainer import Trainer


class NonFiniteLoss(FastleError):
    """The loss or a weight is NaN or infinite."""


class Window:
    """The steps since the last row of metrics. Their loss terms stay on the device until the row is due.

    Args:
        trainer, clock, feed: Where the metrics come from.
        run: Asked for its last good checkpoint if the loss is not finite.
    """

    def __init__(self, trainer: Trainer, clock: Clock, feed: Feed, run: RunDirectory) -> None:
        self._trainer, self._clock, self._feed, self._run = trainer, clock, feed, run
        self._terms: list[dict[str, Tensor]] = []
        self._elapsed, self._wait = clock.elapsed(), feed.wait

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds the loss terms of one step."""
        self._terms.append(terms)

    def seconds(self) -> float:
        """How long the window has lasted."""
        return self._clock.elapsed() - self._elapsed

    def close(self, latent: Tensor) -> dict[str, Any]:
        """The metrics of the window; a new window begins.

        Args:
            latent: The latent of the newest step, (B, D) or (B, c, h, w).

        Raises:
            NonFiniteLoss: A loss of the window, or a weight after it, is NaN or infinite.
        """
        self._check_finite()
        means = {name: float(torch.stack([terms[name] for terms in self._terms]).mean()) for name in self._terms[0]}
        elapsed, wait, rate = self._clock.elapsed(), self._feed.wait, self._clock.images_per_second()
        row = {
            **means,
            "latent_spread": float(latent_spread(latent)),
            "effective_rank": float(effective_rank(latent)),
            "images_per_second": None if rate is None else round(rate, 1),
            # as a share of the window's time
            "data_wait": round((wait - self._wait) / max(elapsed - self._elapsed, 1e-9), 4),
        }
        self._terms, self._elapsed, self._wait = [], elapsed, wait
        return row

    def _check_finite(self) -> None:
        """Raises NonFiniteLoss, naming the step and its terms, if a loss or a weight is not finite."""
        finite = torch.stack([terms["total"] for terms in self._terms]).isfinite().tolist()
        if not all(finite):
            bad = finite.index(False)
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in self._terms[bad].items())
            fault = f"the loss of step {self._trainer.done - len(finite) + bad + 1} is not finite ({values})"
        elif not self._trainer.weights_are_finite():
            fault = f"after step {self._trainer.done} the weights are not finite"
        else:
            return
        raise NonFiniteLoss(
            f"{fault}; {self._run.last_good_checkpoint()}; try a lower --lr"
            + (" or --precision fp32" if self._trainer.config.train.precision == "bf16" else "")
        )
