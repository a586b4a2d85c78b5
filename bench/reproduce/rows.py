"""The rows that `scripts/reproduce.py` trains, the two scales, and the configuration of each training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from fastle.config import ConfigError, RunConfig
from fastle.presets import make_config

ScaleName = Literal["small", "full", "falling"]
Group = Literal["photographs", "hole", "shapes"]
SIZE = 32
SHAPES_STEPS = 800
SEARCH_SHARE = 4  # the learning rate is chosen after this part of the steps
TARGET: dict[str, Any] = {"judge_statistics": "target"}
# the rows whose latents are classified, and whose decoders are given noise
PROBED = ("pixel", "crop-0.3", "crop-0.3-target", "masked-pixel", "masked", "masked-target")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        name: What --rows takes.
        group: The table that the row belongs to.
        about: The row in words.
        options: Arguments of `make_config`, besides those that all rows of the group share.
    """

    name: str
    group: Group
    about: str
    options: Mapping[str, Any]

    @property
    def probed(self) -> bool:
        """Whether the latents are classified and the decoder is given noise."""
        return self.name in PROBED


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What all rows on photographs share.

    Attributes:
        hidden: The width after the stem.
        batch_size, steps: Of each training.
        rates: The learning rates to choose from.
        hole_rates: Those of the rows with a hole, whose pooled latents need lower ones.
        seeds: One training for each; the first is also probed and pictured.
        probe_images: At most so many training images are probed; None takes all of them.
        options: Further arguments of `make_config`.
    """

    hidden: int
    batch_size: int
    steps: int
    rates: tuple[float, ...]
    hole_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    probe_images: int | None
    options: Mapping[str, Any] = field(default_factory=dict)


SCALES: dict[ScaleName, Scale] = {
    "small": Scale(
        hidden=32, batch_size=64, steps=1500, rates=(1e-3, 3e-3), hole_rates=(3e-4, 1e-3), seeds=(0,),
        probe_images=10_000,
    ),
    "full": Scale(
        hidden=64, batch_size=128, steps=10_000, rates=(3e-4, 1e-3), hole_rates=(3e-4, 1e-3), seeds=(0, 1, 2),
        probe_images=None,
    ),
    # the tuned recipe's schedule for all rows
    "falling": Scale(
        hidden=32, batch_size=64, steps=1000, rates=(2e-3, 4e-3, 8e-3), hole_rates=(1e-3, 2e-3), seeds=(0, 1, 2),
        probe_images=10_000, options={"schedule": "trapezoid", "warmup": 0.05},
    ),
}  # fmt: skip


# the post's statistics, whatever the presets have
POST: dict[str, Any] = {"judge_statistics": "own"}
# the recipe "tuned" for spatial latents of 32 px, without its blurred views
SHARP: dict[str, Any] = TARGET | {
    "judge_depth": "features", "full_view": True, "crop_ratio": 0.6, "sigreg_weight": 0.003,
}  # fmt: skip
# the recipe "tuned" for masked models of 32 px, as it was with one hole and as it is
ONE_HOLE: dict[str, Any] = TARGET | {
    "judge_depth": "features", "crop_ratio": 0.3, "crop_ratio_max": 1.0, "crops": 2,
    "branch_statistics": "joint", "masked_weight": 3.0, "judge_reach": 0.3,
}  # fmt: skip
TUNED_MASKED: dict[str, Any] = ONE_HOLE | {"holes": 4, "sigreg_weight": 0.005}

MUON: dict[str, Any] = {"optimizer": "muon"}
# the judge compares with the images themselves
FAR: dict[str, Any] = {"judge_reach": 1.0}


def _photographs(name: str, about: str, **options: Any) -> Row:
    # judge statistics have no effect on the baseline
    post = {} if options.get("objective") == "pixel" else POST
    return Row(name=name, group="photographs", about=about, options=post | options)


def _hole(name: str, about: str, **options: Any) -> Row:
    post = {} if options.get("objective") == "pixel" else POST
    return Row(name=name, group="hole", about=about, options=post | options | {"masked": True})


def _shapes(name: str, about: str, **options: Any) -> Row:
    return Row(name=name, group="shapes", about=about, options=POST | options)


ROWS: tuple[Row, ...] = (
    _photographs("pixel", "pixel baseline", objective="pixel"),
    _photographs("identity-live", "untransformed, live judge", transform="identity", judge="live"),
    _photographs("identity", "untransformed", transform="identity"),
    _photographs("pixel-mask-live", "pixel mask 0.7, live judge", transform="pixel-mask", judge="live"),
    _photographs("pixel-mask", "pixel mask 0.7", transform="pixel-mask"),
    _photographs("patch-mask", "patch mask 0.7", transform="patch-mask"),
    _photographs("channel-mask", "channel mask 0.7", transform="channel-mask"),
    _photographs("crop-0.3-live", "crop-resize 0.3, live judge", crop_ratio=0.3, judge="live"),
    _photographs("crop-0.1", "crop-resize 0.1", crop_ratio=0.1),
    _photographs("crop-0.15", "crop-resize 0.15", crop_ratio=0.15),
    _photographs("crop-0.3", "crop-resize 0.3", crop_ratio=0.3),
    _photographs("crop-0.5", "crop-resize 0.5", crop_ratio=0.5),
    _photographs("noise", "Gaussian noise 0.1", transform="noise"),
    _photographs("detail", "detail stack and full view", transform="detail"),
    _photographs("crop-0.3-ema", "crop-resize 0.3, EMA judge", crop_ratio=0.3, judge="ema"),
    _hole("masked-pixel", "pixel baseline", objective="pixel"),
    _hole("masked-pixel-both", "pixel baseline of both branches", objective="pixel", clean_branch=True),
    _hole("masked", "symmetric, crop-resize 0.3", crop_ratio=0.3),
    _shapes("shapes-pixel-mask", "pixel mask 0.7", transform="pixel-mask"),
    _shapes("shapes-pixel-mask-live", "pixel mask 0.7, live judge", transform="pixel-mask", judge="live"),
    _shapes("shapes-crop", "crop-resize 0.3", crop_ratio=0.3),
    _shapes("shapes-crop-live", "crop-resize 0.3, live judge", crop_ratio=0.3, judge="live"),
    # not in the post
    _photographs("crop-0.1-to-1", "crop-resize 0.1 to 1, a side each step", crop_ratio=0.1, crop_ratio_max=1.0),
    _photographs("crop-0.3-twice", "two crops, crop-resize 0.3", crop_ratio=0.3, crops=2),
    _photographs("crop-0.1-to-1-twice", "two crops, crop-resize 0.1 to 1", crop_ratio=0.1, crop_ratio_max=1.0, crops=2),
    _photographs("crop-0.3-four-times", "four crops, crop-resize 0.3", crop_ratio=0.3, crops=4),
    _photographs("identity-target", "untransformed, target statistics", transform="identity", **TARGET),
    _photographs("noise-target", "Gaussian noise 0.1, target statistics", transform="noise", **TARGET),
    _photographs("crop-0.3-target", "crop-resize 0.3, target statistics", crop_ratio=0.3, **TARGET),
    _photographs(
        "crop-0.3-twice-target", "two crops, crop-resize 0.3, target statistics", crop_ratio=0.3, crops=2, **TARGET
    ),
    _photographs(
        "crop-0.1-to-1-twice-target",
        "two crops, crop-resize 0.1 to 1, target statistics",
        crop_ratio=0.1,
        crop_ratio_max=1.0,
        crops=2,
        **TARGET,
    ),
    _photographs("pixel-muon", "pixel baseline, Muon", objective="pixel", **MUON),
    _photographs(
        "tuned",
        "recipe tuned: the blocks' features, crop-resize 0.6, a blurred view, the whole image, Muon",
        blur_views=(3,),
        **SHARP | MUON,
    ),
    _photographs("tuned-two-blurs", "recipe tuned, blurred by boxes of 3 and 11", blur_views=(3, 11), **SHARP | MUON),
    _photographs(
        "tuned-all",
        "recipe tuned with the stem's features too, blurred by boxes of 1 and 3",
        blur_views=(1, 3),
        **SHARP | MUON | {"judge_depth": "all"},
    ),
    _photographs("tuned-sharp", "recipe tuned without a blurred view", **SHARP | MUON),
    _photographs("tuned-adamw", "recipe tuned without a blurred view, AdamW", **SHARP),
    _photographs("tuned-adamw-all", "that, with the stem's features too", **SHARP | {"judge_depth": "all"}),
    _hole("masked-target", "symmetric, crop-resize 0.3, target statistics", crop_ratio=0.3, **TARGET),
    _hole("masked-pixel-muon", "pixel baseline, Muon", objective="pixel", **MUON),
    _hole("masked-pixel-both-muon", "pixel baseline of both, Muon", objective="pixel", clean_branch=True, **MUON),
    _hole(
        "masked-tuned",
        "recipe tuned: the blocks' features, two crops of 0.3 to 1, a reach of 0.3, four holes, Muon",
        **TUNED_MASKED | MUON,
    ),
    _hole("masked-tuned-one-hole", "recipe tuned with one hole and λ = 0.03, Muon", **ONE_HOLE | MUON),
    _hole("masked-tuned-adamw", "recipe tuned with one hole and λ = 0.03, AdamW", **ONE_HOLE),
    _hole("masked-tuned-far", "that, with a reach of 1", **ONE_HOLE | FAR),
    _hole(
        "masked-tuned-whole",
        "that, but one crop of 0.15 to 0.6, and the whole image",
        **ONE_HOLE | FAR | {"crop_ratio": 0.15, "crop_ratio_max": 0.6, "crops": None, "full_view": True},
    ),
    _hole(
        "masked-tuned-0.6",
        "that, but a crop of 0.6",
        **ONE_HOLE | FAR | {"crop_ratio": 0.6, "crop_ratio_max": None, "crops": None, "full_view": True},
    ),
    _hole(
        "masked-tuned-own",
        "that, but a crop of 0.3, each branch normalised by itself, and both of the same weight",
        **TARGET | {"judge_depth": "features", "full_view": True, "crop_ratio": 0.3},
    ),
    _shapes("shapes-crop-target", "crop-resize 0.3, target statistics", crop_ratio=0.3, **TARGET),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All trainings of a row at a scale.

    Attributes:
        row: The row.
        config: The first training; the others differ in learning rate, seed and length.
        rates: One learning rate, or several to choose from after `search_steps` steps.
        seeds: One training for each.
        search_steps: The length of the trainings that choose the rate.
        probe_images: At most so many training images are probed; None takes all of them, 0 probes nothing.
        images: The number of images in each split.
    """

    row: Row
    config: RunConfig
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    search_steps: int
    probe_images: int | None
    images: Mapping[str, int]

    def run(self, rate: float, seed: int, steps: int | None = None) -> RunConfig:
        """The configuration of one training; by default of the whole length."""
        length = self.config.train.steps if steps is None else steps
        return replace(self.config, train=replace(self.config.train, lr=rate, seed=seed, steps=length))

    def settings(self) -> dict[str, Any]:
        """Everything that decides the figures, for JSON. The folder of the images does not decide them."""
        config = replace(self.config, data=replace(self.config.data, root=None))
        return {
            "config": config.to_dict(),
            "learning_rates": list(self.rates),
            "search_steps": self.search_steps,
            "seeds": list(self.seeds),
            "probe_images": self.probe_images,
            "images": dict(self.images),
        }


def make_plan(
    row: Row,
    scale: ScaleName,
    *,
    data: Path | None,
    images: Mapping[str, int],
    steps: int | None = None,
    seeds: int | None = None,
) -> Plan:
    """The trainings of a row.

    Args:
        row: The row.
        scale: Which `Scale` to take.
        data: The folder that holds the photographs' train/ and test/; shapes need none.
        images: The number of images in each split.
        steps: Another length, for a trial.
        seeds: Another number of seeds, counted from 0.

    Raises:
        ConfigError: See `make_config`.
    """
    shared = SCALES[scale]
    if row.group == "shapes":
        config = make_config("shapes", recipe="post", steps=steps or SHAPES_STEPS, precision="fp32", **row.options)
        rates: tuple[float, ...] = (config.train.lr,)
    else:
        config = make_config(
            "folder",
            data=data,
            size=SIZE,
            hidden=shared.hidden,
            steps=steps or shared.steps,
            batch_size=shared.batch_size,
            precision="fp32",
            recipe="post",
            **shared.options,
            **row.options,
        )
        rates = shared.hole_rates if row.group == "hole" else shared.rates
    length = cast(int, config.train.steps)
    return Plan(
        row=row,
        config=replace(config, train=replace(config.train, lr=rates[0], seed=shared.seeds[0])),
        rates=rates,
        seeds=shared.seeds if seeds is None else tuple(range(seeds)),
        search_steps=max(1, length // SEARCH_SHARE),
        probe_images=shared.probe_images if row.probed else 0,
        images=images,
    )


def same_settings(ours: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Whether stored settings equal ours. Fields that the stored version of fastle lacked have their defaults."""
    try:
        config = RunConfig.from_dict(kept["config"])
    except (ConfigError, KeyError, TypeError, AttributeError):
        return False
    return {**kept, "config": config.to_dict()} == ours


def pick_rows(names: Sequence[str] | None) -> list[Row]:
    """The rows with these names, or all rows, in the order of the table.

    Raises:
        ConfigError: There is no such row.
    """
    known = {row.name: row for row in ROWS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--rows {name}: there is no such row; there are {', '.join(known)}")
    return [row for row in ROWS if names is None or row.name in names]
