"""What `scripts/reproduce.py` leaves for people: the table in Markdown, rows of reconstructions, grids of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from bench.reproduce.measure import FADED, NEIGHBOURS, PROBE_C, Record
from bench.reproduce.rows import ROWS, Group, Row
from fastle.config import DataConfig
from fastle.data import open_images
from fastle.method.model import Autoencoder
from fastle.presets import HOLE_RATIO
from fastle.training.evaluate import evenly_spaced, reconstruction_rows
from fastle.training.report import save_grid

PICTURED = 8  # images in a row
SAMPLE_ROWS = 4
Cell = Callable[[str, Record], str]


def markdown(report: Record) -> str:
    """The tables of a report: photographs, hole, shapes, learning rates, representation, machines."""
    rows = report["rows"]
    command = f"python scripts/reproduce.py --data cifar10-jpeg {report['flags']}"
    lines = [
        f"# Results, `{report['flags']}`",
        "",
        f"Written by `{command}`. One line alone, anew: the same with `--rows NAME --overwrite`.",
    ]
    if report["trial"]:
        lines += ["", f"**A trial of {report['trial']} steps, not the table's length: no figures to quote.**"]
    lines += _section("Photographs", "photographs", rows, _photographs(rows), PHOTOGRAPHS)
    lines += _section(f"With a hole of {HOLE_RATIO:.0%} in the input", "hole", rows, _hole(), HOLE)
    lines += _section("Drawn shapes", "shapes", rows, _shapes(), SHAPES)
    lines += _rates(rows)
    lines += _representation(rows)
    failed = {name: record["failed"] for name, record in rows.items() if "failed" in record}
    if failed:
        lines += ["", "## Failed", "", *(f"- `{name}`: {reason}" for name, reason in failed.items())]
    lines += ["", "## Where", "", *_machines(rows)]
    return "\n".join(lines) + "\n"


PHOTOGRAPHS = """\
CIFAR-10 as JPEG files, 32×32. {train:,} training images, {test:,} test images, all of them measured; the {valid:,} that
are held out of the training split choose the learning rate. Every line has the same model ({hidden} wide, a code of
{latent}), {steps:,} steps of batch {batch}, and the same AdamW; {seeds}. The judge is the step-frozen one unless the
line names another. PSNR in dB, each image's, averaged; Y is luma and CbCr chroma, of full-range BT.601.
Contrast is the reconstructions' standard deviation of luma over the images'."""
HOLE = """\
The same photographs and protocol with a square hole, the same in every line, and a pooled code of {latent}. Clean is
the model on images without a hole."""
SHAPES = """\
Grey, 32×32, {train:,} to train and {test:,} to test, {steps:,} steps of batch {batch} at learning rate
{lr:g}; {seeds}."""


def _photographs(rows: Record) -> dict[str, Cell]:
    # a gap is that of the same seeds' means
    baseline = rows.get("pixel", {}).get("mean", {}).get("clean", {}).get("psnr")

    def gap(name: str, record: Record) -> str:
        return "–" if baseline is None else f"{baseline - record['mean']['clean']['psnr']:.2f}"

    return {
        "lr": lambda name, record: f"{record['lr']:g}",
        "PSNR": _figure("clean", "psnr"),
        "behind `pixel`": gap,
        "SSIM": _figure("clean", "ssim"),
        "contrast": _figure("clean", "contrast"),
        "PSNR of Y": _figure("clean", "psnr_luma"),
        "PSNR of CbCr": _figure("clean", "psnr_chroma"),
        "minutes": _minutes,
    }


def _hole() -> dict[str, Cell]:
    return {
        "lr": lambda name, record: f"{record['lr']:g}",
        "PSNR": _figure("masked", "psnr"),
        "inside": _figure("masked", "psnr_inside"),
        "outside": _figure("masked", "psnr_outside"),
        "SSIM": _figure("masked", "ssim"),
        "contrast": _figure("masked", "contrast"),
        "PSNR of Y": _figure("masked", "psnr_luma"),
        "PSNR of CbCr": _figure("masked", "psnr_chroma"),
        "clean PSNR": _figure("clean", "psnr"),
        "clean SSIM": _figure("clean", "ssim"),
        "minutes": _minutes,
    }


def _shapes() -> dict[str, Cell]:
    figures = {"PSNR": "psnr", "SSIM": "ssim", "contrast": "contrast"}
    return {title: _figure("clean", name) for title, name in figures.items()} | {"minutes": _minutes}


def _figure(kind: str, name: str) -> Cell:
    digits = 2 if name.startswith("psnr") else 3

    def cell(_: str, record: Record) -> str:
        mean, (low, high) = record["mean"][kind][name], record["spread"][kind][name]
        extent = f" ({low:.{digits}f}–{high:.{digits}f})" if len(record["runs"]) > 1 else ""
        return f"{mean:.{digits}f}{extent}"

    return cell


def _minutes(_: str, record: Record) -> str:
    return f"{record['seconds'] / 60:.1f}"


def _section(title: str, group: Group, rows: Record, columns: Mapping[str, Cell], about: str) -> list[str]:
    there = {row.name: rows[row.name] for row in _rows_of(group) if row.name in rows}
    if not there:
        return []
    words = {row.name: row.about for row in ROWS}
    cells = [
        [f"`{name}`", words[name]]
        + (["failed"] * len(columns) if "failed" in record else [cell(name, record) for cell in columns.values()])
        for name, record in there.items()
    ]
    settings = next(iter(there.values()))["settings"]
    config = settings["config"]
    model, train, seeds = config["model"], config["train"], settings["seeds"]
    spatial = f"{model['map_channels']}×{model['size'] // 8}×{model['size'] // 8}"
    text = about.format(
        **settings["images"],
        hidden=model["hidden"],
        latent=spatial if model["latent"] is None else model["latent"],
        steps=train["steps"],
        batch=train["batch_size"],
        lr=train["lr"],
        seeds="one seed" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds, least and greatest in brackets",
    )
    return ["", f"## {title}", "", text, "", *_table(["row", "what", *columns], cells)]


def _rates(rows: Record) -> list[str]:
    searched = {name: record for name, record in rows.items() if record["search"]}
    if not searched:
        return []
    cells = []
    for name, record in searched.items():
        found = (
            f"{lr}: {psnr:.2f}" if isinstance(psnr, float) else f"{lr}: not finite"
            for lr, psnr in record["search"].items()
        )
        steps = record["settings"]["search_steps"]
        cells.append([f"`{name}`", f"{steps:,}", ", ".join(found), f"{record['lr']:g}" if "lr" in record else "–"])
    about = (
        "PSNR of the held-out images after a quarter of the steps, with the first seed; of images with a hole where "
    )
    about += "there is one."
    return ["", "## Learning rates", "", about, "", *_table(["row", "steps", "PSNR at each rate", "chosen"], cells)]


def _representation(rows: Record) -> list[str]:
    probed = {name: record["representation"] for name, record in rows.items() if "representation" in record}
    if not probed:
        return []
    cells = [
        [
            f"`{name}`",
            f"{of['training_images']:,}",
            f"{of['linear']:.1%}",
            f"{of['knn']:.1%}",
            f"{of['faded_own']:.3f}",
            f"{of['faded_target']:.3f}",
        ]
        for name, of in probed.items()
    ]
    about = (
        "Accuracy on the test split, from the frozen code of the first seed: logistic regression on standardised codes "
    )
    about += (
        f"(C = {PROBE_C}), and the vote of the {NEIGHBOURS} nearest by cosine. Faded: the distance that the encoder as "
        f"a judge sees between images and the same at {FADED:.0%} of their contrast, mse(J(x), J(x')), with own and "
        "with target statistics; where SIGReg sets the scale a constant picture is at about 1."
    )
    headings = ["row", "labelled images", "linear probe", "k-NN", "faded, own", "faded, target"]
    return ["", "## Representation", "", about, "", *_table(headings, cells)]


def _machines(rows: Record) -> Iterable[str]:
    found: dict[str, list[str]] = {}
    for name, record in rows.items():
        here = record["environment"]
        versions = ", ".join(f"{what} {here[what]}" for what in ("torch", "cuda", "driver", "python") if here[what])
        where = f"{here['device']}, {here['threads']} threads, {versions}, commit {here['commit'] or 'unknown'}"
        found.setdefault(where, []).append(f"`{name}`")
    # one machine for all of them needs no names
    return (f"- {where}" + (f": {', '.join(names)}" if len(found) > 1 else "") for where, names in found.items())


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", "---"] + ["---:"] * (len(headings) - 2)
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *cells)]


def _rows_of(group: Group) -> list[Row]:
    return [row for row in ROWS if row.group == group]


@torch.no_grad()
def draw_reconstructions(
    path: Path, group: Group, runs: Mapping[str, Path], data: DataConfig, device: torch.device
) -> bool:
    """Writes a PNG: test images, and what each row's run makes of them. Whether there was a run of the group."""
    there = {row.name: runs[row.name] for row in _rows_of(group) if row.name in runs}
    if not there:
        return False
    images = open_images(data, "test")
    batch = images.batch(evenly_spaced(len(images), PICTURED)).to(device)
    rows: dict[str, Tensor] = {}
    for name, run in there.items():
        made = reconstruction_rows(Autoencoder.from_pretrained(run, device), batch, _hole_ratio(group))
        for what, shown in made:
            # the inputs are the same for all
            rows[what if "input" in what else name if what == "reconstruction" else f"{name}, hole"] = shown
    save_grid(path, list(rows.items()))
    return True


@torch.no_grad()
def draw_samples(path: Path, model: Autoencoder, device: torch.device) -> None:
    """Writes a PNG of what the decoder makes of z ~ N(0, I)."""
    shape = (SAMPLE_ROWS * PICTURED, *model.config.latent_shape)
    z = torch.randn(shape, generator=Generator().manual_seed(0)).to(device)
    rows = model.eval().decode(z).split(PICTURED)
    save_grid(path, [("z ~ N(0, I)" if not i else "", row) for i, row in enumerate(rows)])


def _hole_ratio(group: Group) -> float | None:
    return HOLE_RATIO if group == "hole" else None
