"""What `scripts/reproduce.py` writes for readers: tables in Markdown, pictures of reconstructions and of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from bench.reproduce.measure import FADED, Record
from bench.reproduce.rows import ROWS, Group, Row
from fastle.config import HOLE_RATIO, DataConfig
from fastle.data import open_images
from fastle.method.model import Autoencoder
from fastle.training.evaluate import evenly_spaced, reconstruction_rows
from fastle.training.probe import NEIGHBOURS, C
from fastle.training.report import save_grid

PICTURED = 8  # images in a row
SAMPLE_ROWS = 4
UNKNOWN = "–"
Cell = Callable[[str, Record], str]


def markdown(report: Record) -> str:
    """The tables of a report: photographs, hole, shapes, learning rates, representation, machines."""
    rows = report["rows"]
    command = f"python scripts/reproduce.py --data cifar10-jpeg {report['flags']}"
    lines = [
        f"# Results, `{report['flags']}`",
        "",
        f"Written by `{command}`. To do one row again, add `--rows NAME --overwrite`.",
    ]
    if report["trial"]:
        lines += [
            "",
            f"**A trial of {report['trial']} steps, shorter than the table's runs. Do not quote its figures.**",
        ]
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
CIFAR-10 as JPEG files at 32×32, with {train:,} training images. The figures are means over all {test:,} test images.
{valid:,} more are held out of the training split{choose}. Every row has the same model
(`hidden` {hidden}, a latent of {latent}), {steps:,} steps of batch {batch}; {seeds}. The optimizer is AdamW and the
judge step-frozen unless the row names another. PSNR is in dB and averaged over images; Y is luma and CbCr chroma, of
full-range BT.601. Contrast is the standard deviation of the reconstructions' luma over that of the images."""
HOLE = """\
The same photographs and settings, with a square hole in the input and a pooled latent of {latent}. The holes are the
same in every row. Clean figures are those of the same model on images without a hole."""
SHAPES = """\
Grey images of 32×32, {train:,} for training and {test:,} for testing; {steps:,} steps of batch {batch} at a learning
rate of {lr:g}; {seeds}."""
RATES = """\
PSNR on the held-out images after a quarter of the steps, with the first seed. Rows with a hole are measured on images
with a hole."""
REPRESENTATION = """\
Test accuracy of classifiers on the frozen latents of the first seed: a logistic regression on standardised latents
(C = {c}), and the vote of the {neighbours} nearest by cosine. Faded is the distance mse(J(x), J(x')) that the encoder,
as a judge, sees between images and the same images at {faded:.0%} of their contrast, with own and with target
statistics. Where SIGReg sets the scale, a constant image is at a distance of about 1."""


def _photographs(rows: Record) -> dict[str, Cell]:
    def gap(name: str, record: Record) -> str:
        # the baseline of the same optimizer; both means are over the same seeds
        peer = "pixel-muon" if record["settings"]["config"]["train"].get("optimizer") == "muon" else "pixel"
        baseline = rows.get(peer, {}).get("mean", {}).get("clean", {}).get("psnr")
        return UNKNOWN if baseline is None else f"{baseline - record['mean']['clean']['psnr']:.2f}"

    return {
        "lr": lambda name, record: f"{record['lr']:g}",
        "PSNR": _figure("clean", "psnr"),
        "behind the baseline": gap,
        "SSIM": _figure("clean", "ssim"),
        "contrast": _figure("clean", "contrast"),
        "sharpness": _figure("clean", "sharpness"),
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
        "sharpness": _figure("masked", "sharpness"),
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
        if name not in record["mean"][kind]:
            # measured before there was such a figure
            return UNKNOWN
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
    done = [(name, record) for name, record in there.items() if "failed" not in record]
    columns = {title: cell for title, cell in columns.items() if any(cell(*of) != UNKNOWN for of in done)}
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
        choose=" and choose the learning rate" if any(record["search"] for record in there.values()) else "",
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
        tried = (
            f"{lr}: {psnr:.2f}" if isinstance(psnr, float) else f"{lr}: not finite"
            for lr, psnr in record["search"].items()
        )
        steps = record["settings"]["search_steps"]
        cells.append([f"`{name}`", f"{steps:,}", ", ".join(tried), f"{record['lr']:g}" if "lr" in record else "–"])
    return ["", "## Learning rates", "", RATES, "", *_table(["row", "steps", "PSNR at each rate", "chosen"], cells)]


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
    about = REPRESENTATION.format(c=C, neighbours=NEIGHBOURS, faded=FADED)
    headings = ["row", "labelled images", "linear probe", "k-NN", "faded, own", "faded, target"]
    return ["", "## Representation", "", about, "", *_table(headings, cells)]


def _machines(rows: Record) -> Iterable[str]:
    machines: dict[str, list[str]] = {}
    for name, record in rows.items():
        here = record["environment"]
        versions = ", ".join(f"{what} {here[what]}" for what in ("torch", "cuda", "driver", "python") if here[what])
        where = f"{here['device']}, {here['threads']} threads, {versions}, commit {here['commit'] or 'unknown'}"
        machines.setdefault(where, []).append(f"`{name}`")
    # the names of the rows matter only if there are several machines
    return (f"- {where}" + (f": {', '.join(names)}" if len(machines) > 1 else "") for where, names in machines.items())


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", "---"] + ["---:"] * (len(headings) - 2)
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *cells)]


def _rows_of(group: Group) -> list[Row]:
    return [row for row in ROWS if row.group == group]


@torch.no_grad()
def save_reconstructions(
    path: Path, group: Group, runs: Mapping[str, Path], data: DataConfig, device: torch.device
) -> bool:
    """Writes a PNG of test images and of each run's reconstructions. Returns False if the group has no run."""
    there = {row.name: runs[row.name] for row in _rows_of(group) if row.name in runs}
    if not there:
        return False
    images = open_images(data, "test")
    batch = images.batch(evenly_spaced(len(images), PICTURED)).to(device)
    rows: dict[str, Tensor] = {}
    for name, run in there.items():
        made = reconstruction_rows(Autoencoder.from_pretrained(run, device), batch, _hole_ratio(group))
        for what, shown in made:
            # all runs have the same inputs
            rows[what if "input" in what else name if what == "reconstruction" else f"{name}, hole"] = shown
    save_grid(path, list(rows.items()))
    return True


@torch.no_grad()
def save_samples(path: Path, model: Autoencoder, device: torch.device) -> None:
    """Writes a PNG of images that the decoder makes from z ~ N(0, I)."""
    shape = (SAMPLE_ROWS * PICTURED, *model.config.latent_shape)
    z = torch.randn(shape, generator=Generator().manual_seed(0)).to(device)
    rows = model.eval().decode(z).split(PICTURED)
    save_grid(path, [("z ~ N(0, I)" if not i else "", row) for i, row in enumerate(rows)])


def _hole_ratio(group: Group) -> float | None:
    return HOLE_RATIO if group == "hole" else None
