"""The update, the length and the seed of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastle.options import Checked, ConfigError, option

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["constant", "cosine", "trapezoid"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Checked):
    """The loop: the optimizer, the learning rate of each step, and averages of the weights.

    Attributes:
        steps, epochs: The length of the run; one of the two.
        batch_size: Of all ranks together.
        accumulate: Parts of a batch, whose gradients are averaged; each has statistics and draws of its own.
        optimizer: "adamw", or "muon": Muon for the weights of the layers, and AdamW for biases and the BatchNorm.
        lr: Peak of the learning rate, above 0.
        schedule, warmup, decay: How it changes over the run; see `fastle.training.schedule`.
        weight_decay: Decoupled, as AdamW's; at least 0.
        clip: Bound on the norm of the gradient of all weights, above 0; None, or 0 when it is set, for no bound.
        averages: Lengths of averages of the weights, σ_rel of EDM2; see `fastle.training.average`.
        seed: Of the weights, the order of the images and every draw.
        precision: "bf16" is autocast with fp32 weights, latent and statistics; "auto" lets the device decide when a run
            starts, which keeps what was chosen (`fastle.training.precision`).
    """

    steps: int | None = option("length of the run; a finished run goes on with more", initial=None, at_least=1)
    epochs: int | None = option("length of the run in passes over the images", initial=None, at_least=1)
    # the judge's BatchNorm has no variance over one image
    batch_size: int = option("images in a step, of all processes together", initial=128, at_least=2)
    accumulate: int = option(
        "take the gradient of a batch in this many parts, each with statistics of its own", initial=1, at_least=1
    )
    optimizer: Optimizer = option(
        "what updates the weights: AdamW, or Muon with AdamW for biases and the BatchNorm",
        initial="adamw",
        default="the recipe's",
    )
    lr: float = option("learning rate, its peak where it changes", above=0, metavar="LR")
    schedule: Schedule = option(
        "whether the learning rate stays, falls along a cosine, or falls linearly in the last part of the run",
        initial="constant",
        default="the recipe's",
    )
    warmup: float = option(
        "first share of the run, over which the learning rate rises from 0",
        initial=0.0,
        at_least=0,
        below=1,
        metavar="R",
        default="the recipe's",
    )
    decay: float = option(
        "last share of the run, over which --schedule trapezoid falls", initial=0.4, above=0, at_most=1, metavar="R"
    )
    weight_decay: float = option("weight decay, decoupled from the gradient", initial=0.01, at_least=0, metavar="W")
    clip: float | None = option(
        "bound on the norm of the gradient, 0 for none", initial=None, at_least=0, metavar="G", default="the recipe's"
    )
    averages: tuple[float, ...] = option(
        "lengths of averages of the weights, as a share of the run (0.05 is EDM2's shortest)",
        initial=(),
        many=True,
        above=0,
        below=0.28,
        metavar="R",
        default="none",
    )
    seed: int = option(
        "seed of the weights, the order of the images and every draw", initial=0, at_least=0, below=2**63
    )
    # configurations of earlier versions name no precision: all were fp32
    precision: Precision = option(
        "bf16 is autocast, with weights and statistics in fp32",
        initial="fp32",
        default="auto: bf16 on a GPU that has it, else fp32",
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.clip == 0:
            object.__setattr__(self, "clip", None)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either --steps or --epochs, not both")
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size} into parts of 2 or more"
            )
