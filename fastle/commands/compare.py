"""fastle compare: the figures of runs side by side, and where their configurations differ."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from fastle.checkpoint import CheckpointError, checkpoints, read_run_config
from fastle.config import ConfigError, RunConfig, setting_as_typed
from fastle.files import read_json, write_atomic
from fastle.options import shown
from fastle.training.report import grids, read_metrics

from .cli import Output
from .outputs import check_output

# each from the last row of metrics that has it
METRICS = ("valid_psnr", "total", "latent_spread", "effective_rank", "images_per_second")
GAP = 8  # pixels between grids
RunColumn = dict[str, str]  # figures or settings of a run, by the names of their rows


def run(flags: argparse.Namespace, console: Output) -> None:
    """Prints the comparison that the flags ask for, and writes the picture."""
    runs = [Path(name) for name in flags.runs]
    if len({path.resolve() for path in runs}) < len(runs):
        raise ConfigError("a run stands there twice: name each once")
    configs = [read_run_config(path) for path in runs]
    output = None if flags.output is None else Path(flags.output)
    newest = []
    if output is not None:
        check_output(output, (".png",))
        newest = [_newest_grid(path) for path in runs]
    columns = [_figures(path, config) for path, config in zip(runs, configs, strict=True)]
    console.print(_table("figures", runs, columns))
    differing = _differing(configs)
    if any(differing):
        console.print(_table("settings that differ", runs, differing))
    else:
        console.print("all settings are the same")
    if len({config.data for config in configs}) > 1:
        text = "the runs have other images, so compare them by `fastle eval RUN --data DIR` on one folder"
        console.say(text)
    if output is not None:
        _save_side_by_side(output, newest)
        console.say(f"written to {output}")


def _figures(run: Path, config: RunConfig) -> RunColumn:
    """The figures of a run, by the names of their rows."""
    rows = read_metrics(run / "metrics.jsonl")
    saved = checkpoints(run)
    column = {
        "step": f"{rows[-1]['step']:,}" if rows else "",
        "checkpoint": saved[-1].stem if saved else "",
        "parameters": f"{config.model.parameter_count / 1e6:.2f} M",
        "compression": f"{config.model.compression:g}x",
    }
    for name in METRICS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            column[name.replace("_", " ")] = f"{values[-1]:.4g}"
    for path in sorted((*run.glob("eval-*.json"), *run.glob("probe-*.json"))):
        try:
            column |= _measured(path.stem, read_json(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{path} cannot be used: remove it, or measure again") from None
    return column


def _measured(stem: str, values: dict[str, Any]) -> RunColumn:
    """The figures of a file that `fastle eval` or `fastle probe` wrote, and the step that was measured."""
    kind, _, what = stem.partition("-")
    if kind == "probe":
        encoder = values["encoder"]
        return {f"probe {what} {name}": f"{float(encoder[name]):.1%}" for name in ("linear", "knn")}
    column = {f"{what} step": f"{int(values['step']):,}"}
    for setting in ("clean", "masked"):
        for name in ("psnr", "ssim", "lpips", "fid"):
            if name in values.get(setting, {}):
                column[f"{what} {setting} {name}"] = f"{float(values[setting][name]):.4g}"
    return column


def _differing(configs: list[RunConfig]) -> list[RunColumn]:
    """The settings of each run that are not the same in all."""
    columns = [
        {
            name.replace("_", "-"): shown(setting_as_typed(name, value))
            for group in config.settings().values()
            for name, value in group.items()
        }
        for config in configs
    ]
    names = {name for column in columns for name in column}
    same = {name for name in names if len({column.get(name) for column in columns}) == 1}
    return [{name: value for name, value in column.items() if name not in same} for column in columns]


def _table(title: str, runs: list[Path], columns: list[RunColumn]) -> Table:
    table = Table(title, *map(str, runs))
    # in the order in which the names first appear
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _newest_grid(run: Path) -> Path:
    paths = grids(run)
    if not paths:
        raise CheckpointError(f"{run} has no grid yet: leave -o out, or let it train to its first report")
    return paths[-1]


def _save_side_by_side(output: Path, paths: list[Path]) -> None:
    images = []
    for grid in paths:
        try:
            images.append(Image.open(grid).convert("RGB"))
        except OSError as error:
            raise CheckpointError(f"{grid} cannot be read ({error}): remove it") from None
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), "white")
    at = 0
    for image in images:
        canvas.paste(image, (at, 0))
        at += image.width + GAP
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG")
    write_atomic(output, encoded.getvalue(), "make room or give another name")
