"""What fastle-train prints of a run before it begins; without torch, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from fastle.config import RunConfig, setting_as_typed
from fastle.folders import find_shards
from fastle.lengths import steps_per_epoch, total_steps, train_size

from .cli import Output, wrapped


def show_config(config: RunConfig, path: Path, console: Output) -> None:
    """Prints the whole configuration, and what follows from it."""

    def show(label: str, *items: str) -> None:
        console.say(wrapped(label, list(items)))

    for group, values in config.settings().items():
        show(group, *(f"{name.replace('_', '-')} {setting_as_typed(name, value)}" for name, value in values.items()))
    count = f"{config.model.parameter_count / 1e6:.2f} M"
    latent = " x ".join(map(str, config.model.latent_shape))
    show("parameters", count, f"compression {config.model.compression:g}x", f"latent {latent}")
    show("steps", _length(config))
    show("run", str(path))


def _why_unknown(config: RunConfig) -> str:
    root = config.data.root
    return "whose images are counted once it starts" if root and find_shards(Path(root)) else "which is not there"


def _length(config: RunConfig) -> str:
    images = train_size(config.data)
    if images is None:
        return (
            f"{config.train.steps:,}"
            if config.train.steps
            else f"{config.train.epochs} epochs of --data, {_why_unknown(config)}"
        )
    epoch_steps = steps_per_epoch(images, config.train.batch_size)
    total = total_steps(config, epoch_steps)
    return f"{total:,} ({total / epoch_steps:.3g} epochs of {epoch_steps:,})"
