"""A run's model for others: the folder of a saved model, whose card says how it was trained and what it reaches."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastle.checkpoint import Checkpoint, CheckpointError, read_run_config
from fastle.config import ConfigError, RunConfig, setting_as_typed
from fastle.files import read_json
from fastle.method.pretrained import check_folder, model_of_run, plain_card, save_pretrained
from fastle.presets import command_of

from .report import read_metrics

# of `evaluate`, in the order of the card's table
FIGURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "contrast": "contrast", "sharpness": "sharpness"}


def save_run(
    run: Path,
    folder: Path,
    *,
    weights: str = "model",
    bf16: bool = False,
    about: str | None = None,
    license_name: str | None = None,
) -> list[str]:
    """Saves the model of a run's newest good checkpoint as `Autoencoder.from_pretrained` reads it, with a full card.

    Args:
        run: The run directory.
        folder: Where the model goes; created if need be.
        weights: "model", or the name of an average that the run keeps, such as "ema-050".
        bf16: Whether to save the parameters in bf16.
        about: What the images are and whose, in the card's words.
        license_name: The licence of the weights, as the hub names it: "apache-2.0".

    Returns:
        Lines to show: what the card lacks, and which checkpoints could not be used.

    Raises:
        FastleError: The run cannot be read, or the folder holds files of something else, or cannot be written to.
    """
    for flag, text in (("--about", about), ("--license", license_name)):
        if text is not None and (not text.strip() or not text.isprintable()):
            raise ConfigError(f"{flag} must be a line of text, not {text!r}")
    if license_name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_name):
        raise ConfigError(f"--license {license_name}: give the name of a licence as the hub has it, such as apache-2.0")
    check_folder(folder)
    config = read_run_config(run)
    model, checkpoint, remark = model_of_run(run, "cpu", weights)
    remarks = [] if remark is None else [remark]
    figures, stale = _figures(run, checkpoint, weights)
    if stale:
        remarks.append(f"left out, as they are of another checkpoint or other weights: {', '.join(stale)}")
    if not figures:
        again = f"fastle eval {run}" + ("" if weights == "model" else f" --weights {weights}")
        remarks.append(f"the card has no figures of test images: `{again}` measures them, then run this again")
    name = folder.resolve().name
    text = plain_card(config.model, name, bf16=bf16, license_name=license_name) + "".join(
        f"\n## {title}\n\n{body}\n"
        for title, body in (
            ("Data", _data(config, checkpoint, about)),
            ("Training", _training(config, checkpoint, weights)),
            ("Figures", _table(figures, _validation(run, checkpoint, weights), bf16=bf16)),
            ("Limits", _limits(config)),
            ("Licence", _licence(license_name)),
        )
    )
    save_pretrained(model, folder, bf16=bf16, card=text, hole_ratio=config.objective.hole_ratio)
    return remarks


def _data(config: RunConfig, checkpoint: Checkpoint, about: str | None) -> str:
    known = {"cifar10": "CIFAR-10", "celeba": "CelebA", "shapes": "Drawn shapes, made by fastle"}
    what = about or known.get(config.data.dataset, _source(config))
    count = checkpoint.metadata.get("train_images")
    number = "" if count is None else f" {count:,} images to train;"
    colour = "grey" if config.data.channels == 1 else "RGB"
    return f"{what.rstrip('.')}.{number} {_pixels(config)}, {colour}."


def _pixels(config: RunConfig) -> str:
    height, width = config.model.sides
    return f"{height}×{width} pixels" + ("" if height == width else " (height × width)")


def _source(config: RunConfig) -> str:
    where = "Images given in Python" if config.data.root is None else "A folder of images"
    return f"{where}, of which nothing more was said"


def _training(config: RunConfig, checkpoint: Checkpoint, weights: str) -> str:
    """The command, the steps and every setting."""
    command = command_of(config)
    how = "A configuration for which there is no command." if command is None else f"    {command}"
    steps = f"{checkpoint.step:,} steps of {config.train.batch_size} images, in fastle {_version()}."
    averaged = "" if weights == "model" else f" The weights are an average over the run, {weights}."
    groups = {name: values for name, values in config.settings().items() if name != "data"}
    rows = "\n".join(
        f"| {group} | {', '.join(f'{name} {setting_as_typed(name, value)}' for name, value in values.items())} |"
        for group, values in groups.items()
    )
    return f"{how}\n\n{steps}{averaged}\n\n| | |\n|---|---|\n{rows}"


def _figures(run: Path, checkpoint: Checkpoint, weights: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What `fastle eval` has measured of this checkpoint, and the names of the files that are of others."""
    figures, stale = [], []
    for path in sorted(run.glob("eval-*.json")):
        try:
            values = read_json(path)
            # fastle 0.1 measured one set of weights and did not name it
            of_this = (values["checkpoint"], values.get("weights", "model")) == (checkpoint.path.name, weights)
            rows = [
                {"images": values["images"], "data": values["data"], "input": name}
                | {figure: float(measured[figure]) for figure in FIGURES}
                for name, measured in values.items()
                if name in ("clean", "masked")
            ]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{path} cannot be used: remove it, or measure again by `fastle eval`") from None
        if of_this:
            figures += rows
        else:
            stale.append(path.name)
    return figures, stale


def _validation(run: Path, checkpoint: Checkpoint, weights: str) -> float | None:
    """The PSNR on the validation images, in dB, when the checkpoint was saved; None if it was not measured then."""
    name = "valid_psnr" if weights == "model" else f"valid_psnr_{weights}"
    rows = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
    value = rows.get(checkpoint.step, {}).get(name)
    return None if value is None else float(value)


def _table(figures: list[dict[str, Any]], validation: float | None, *, bf16: bool) -> str:
    lines = []
    if figures:
        lines += [f"| images | input | {' | '.join(FIGURES.values())} |", f"|---|---|{'---:|' * len(FIGURES)}"]
        for row in figures:
            # the name of a folder may say what its images are; its path is private
            source = row["data"] if row["data"] == "test split" else Path(row["data"]).name
            values = " | ".join(f"{row[name]:.2f}" if name == "psnr" else f"{row[name]:.3f}" for name in FIGURES)
            lines.append(f"| {row['images']:,} of {source} | {row['input']} | {values} |")
        lines.append("\nMeans over images, by `fastle eval`. Contrast and sharpness are relative to the images' own.")
    if validation is not None:
        lines.append(f"\nPSNR on the validation images: {validation:.2f} dB.")
    if lines and bf16:
        lines.append("\nMeasured before the parameters were rounded to bf16.")
    return "\n".join(lines).strip() or "None have been measured."


def _limits(config: RunConfig) -> str:
    size, channels = _pixels(config), "grey" if config.model.channels == 1 else "RGB"
    loss = (
        "It was trained on pixel errors, so that fine texture is blurred."
        if config.objective.name == "pixel"
        else "No reconstruction loss was used: what the judge does not see, such as exact colour, may be off."
    )
    sizes = (
        f"It takes {channels} images of {size}."
        if config.model.latent is not None
        else f"It learnt on {channels} images of {size}, and takes any whose sides are divisible by 8."
    )
    return f"""- {sizes}
- It knows images like those above. Of others it loses more.
- {loss}
- It reconstructs. It was not trained to make new images, and nobody has looked for bias in what it loses."""


def _licence(name: str | None) -> str:
    return "None is stated: ask who made the model." if name is None else f"The weights: {name}."


def _version() -> str:
    try:
        return version("fastle")
    except PackageNotFoundError:
        return "of a checkout"
