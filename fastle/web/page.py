"""The page of one or several runs: curves, grids, figures, settings, machines and commands, in one HTML file.

The file needs no other and loads none: styles, script, pictures and numbers are in it, and its own policy forbids
requests. What a run directory holds may come from others, and is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastle.checkpoint import CheckpointError, read_run_config
from fastle.config import RunConfig, setting_as_typed
from fastle.files import one_line, read_json, write_atomic
from fastle.training.display import format_metric, format_seconds
from fastle.training.report import TERMS, grids, read_grid, read_metrics, read_starts

PARTS = Path(__file__).parent / "report"
BASE = PARTS.parent / "base.css"
MOST_GRIDS = 16  # of a run, evenly spaced, since each adds pictures to the file
# curves in the order of the page, and whether their axis is logarithmic
CURVES = {
    "total": ("Loss", True),
    **{name: (f"Loss term: {name.replace('_', ' ')}", True) for name in TERMS},
    "valid_psnr": ("Validation PSNR, dB", False),
    "latent_spread": ("Latent spread (0 is collapse)", False),
    "effective_rank": ("Effective rank of the latent (1 is collapse)", False),
    "images_per_second": ("Images per second", False),
    "data_wait": ("Waiting for data, share of the time", False),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds for people.

    Attributes:
        path, config: The directory and its configuration.
        rows: Of metrics.jsonl.
        figures: The contents of eval-*.json, by file name.
        starts: Of starts.jsonl.
        notes: What could not be read.
    """

    path: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    figures: dict[str, dict[str, Any]]
    starts: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path)

    def last(self, metric: str) -> Any:
        """The newest value of a metric, or None."""
        return next((row[metric] for row in reversed(self.rows) if row.get(metric) is not None), None)


def write_page(paths: Sequence[Path], output: Path) -> None:
    """Writes the page of runs.

    Args:
        paths: The run directories. None is changed.
        output: The HTML file.

    Raises:
        FastleError: A directory holds no run, or its configuration or metrics cannot be read, or `output` cannot be
            written; then it is as it was.
    """
    page = make_page([read_run(path) for path in paths])
    write_atomic(output, page.encode(), "make room, then run the same command again")


def read_run(path: Path) -> Run:
    """Reads a run directory. Raises FastleError if its configuration or its metrics cannot be read."""
    figures, notes = {}, []
    for file in sorted(path.glob("eval-*.json")):
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            notes.append(f"{file.name} cannot be read ({one_line(error)})")
            continue
        if isinstance(content, dict):
            figures[file.name] = content
    return Run(path, read_run_config(path), read_metrics(path / "metrics.jsonl"), figures, read_starts(path), notes)


def make_page(runs: Sequence[Run]) -> str:
    """The HTML of the page of runs."""
    pictures = [_pictures(run) for run in runs]
    data = {"runs": [{"name": run.name, "curves": _curves(run)} for run in runs], "grids": pictures}
    parts = {
        "title": escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        "style": "\n".join(path.read_text(encoding="utf-8") for path in (BASE, PARTS / "report.css")),
        "script": (PARTS / "report.js").read_text(encoding="utf-8"),
        # a script ends at its first "</script", wherever that stands
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "summary": _summary(runs),
        "charts": "\n".join(_chart(name) for name in CURVES if any(_has(run, name) for run in runs))
        or "<p>No values were noted yet.</p>",
        "grids": "\n".join(_grid(i, run) for i, run in enumerate(runs) if pictures[i]["frames"])
        or "<p>No pictures were saved yet.</p>",
        "figures": _figures(runs),
        "settings": _settings(runs),
        "starts": _starts(runs),
        "notes": "".join(f"<p>{escape(f'{run.name}: {note}')}</p>" for run in runs for note in run.notes),
    }
    page = (PARTS / "report.html").read_text(encoding="utf-8")
    # piece by piece, so that braces within a part are not taken for a placeholder
    first, *pieces = page.split("{{")
    return first + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))


# pictures and curves


def _curves(run: Run) -> dict[str, list[float | None]]:
    names = ["step", *(name for name in CURVES if _has(run, name))]
    return {name: [_short(row.get(name)) for row in run.rows] for name in names}


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def _has(run: Run, name: str) -> bool:
    return any(row.get(name) is not None for row in run.rows)


def _pictures(run: Run) -> dict[str, Any]:
    """The pictures of a run's grids: each once, as a data URI, and for each step the numbers of its pictures."""
    paths = grids(run.path)
    # from the newest backwards
    paths = paths[:: -max(1, -(-len(paths) // MOST_GRIDS))][::-1]
    known: dict[str, int] = {}
    frames = []
    for path in paths:
        try:
            rows = read_grid(path, run.config.model.size)
        except CheckpointError as error:
            run.notes.append(str(error))
            continue
        numbers = {name: known.setdefault(_data_uri(images), len(known)) for name, images in rows.items()}
        frames.append({"step": int(path.stem.removeprefix("step-")), "rows": numbers})
    return {"pictures": list(known), "frames": frames}


def _data_uri(images: Tensor) -> str:
    """A row of uint8 images (B, 3, H, W) as one PNG."""
    encoded = io.BytesIO()
    Image.fromarray(np.concatenate(list(images.permute(0, 2, 3, 1).numpy()), axis=1)).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _chart(name: str) -> str:
    title, logarithmic = CURVES[name]
    scale = ' data-scale="log"' if logarithmic else ""
    return f'<figure class="chart" data-metric="{name}"{scale}><figcaption>{escape(title)}</figcaption></figure>'


def _grid(index: int, run: Run) -> str:
    return (
        f'<article class="grid" data-run="{index}"><h3>{escape(run.name)}</h3>'
        f'<label class="slider"><span>Step</span><input type="range" aria-label="Step of {escape(run.name)}">'
        "<output></output></label><div class=\"rows\"></div></article>"
    )  # fmt: skip


# tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first column of which names the rows."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(text)}</td>" for text in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(runs: Sequence[Run]) -> str:
    header = ["Run", "Steps", "Time in steps", "Validation PSNR", "Images per second", "Waiting for data"]
    rows = []
    for run in runs:
        steps, rate, psnr = run.last("step"), run.last("images_per_second"), run.last("valid_psnr")
        seconds = steps * run.config.train.batch_size / rate if steps and rate else None
        waits = [row["data_wait"] for row in run.rows if row.get("data_wait") is not None]
        rows.append(
            [
                run.name,
                "–" if steps is None else f"{steps:,}",
                "–" if seconds is None else format_seconds(seconds),
                "–" if psnr is None else f"{psnr:.2f} dB",
                format_metric("images_per_second", rate),
                f"{sum(waits) / len(waits):.1%}" if waits else "–",
            ]
        )
    return _table(header, rows)


def _figures(runs: Sequence[Run]) -> str:
    """A table of what `fastle eval` measured: a line for each run, data and kind of input."""
    lines = [
        ([run.name, str(content.get("data", file)), str(content.get("step", "–")), kind], values)
        for run in runs
        for file, content in run.figures.items()
        for kind, values in content.items()
        if isinstance(values, dict)
    ]
    if not lines:
        return "<p>Nothing was measured: <code>fastle eval RUN</code> does.</p>"
    names = list(dict.fromkeys(name for _, values in lines for name in values))
    rows = [[*about, *(_figure(name, values.get(name)) for name in names)] for about, values in lines]
    return _table(["Run", "Images", "Step", "Input", *(name.replace("_", " ") for name in names)], rows)


def _figure(name: str, value: Any) -> str:
    if type(value) not in (int, float):
        return "–"
    return f"{value:.2f}" if "psnr" in name else f"{value:.4f}"


def _settings(runs: Sequence[Run]) -> str:
    """The settings that differ between runs, and behind a click all of them."""
    flat = [
        {
            f"{group}: {name.replace('_', '-')}": str(setting_as_typed(name, value))
            for group, values in run.config.settings().items()
            for name, value in values.items()
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(settings.get(name, "–") for settings in flat)] for name in names]
    header = ["Setting", *(run.name for run in runs)]
    everything = f"<details><summary>All settings</summary>{_table(header, rows)}</details>"
    if len(runs) == 1:
        return everything
    different = [row for row in rows if len(set(row[1:])) > 1]
    return (_table(header, different) if different else "<p>The runs have the same settings.</p>") + everything


def _starts(runs: Sequence[Run]) -> str:
    """When, where and with which command each run was started or went on."""
    header = ["Run", "From step", "Date", "Command", "Device", "torch", "Commit"]
    rows = [
        [
            run.name,
            str(start.get("step", "–")),
            str(start.get("date") or "–")[:16].replace("T", " "),
            str(start.get("command") or "–"),
            _device(start),
            str(start.get("torch") or "–"),
            str(start.get("commit") or "–")[:12],
        ]
        for run in runs
        for start in run.starts
    ]
    if not rows:
        return "<p>These runs do not say: earlier versions of fastle did not note it.</p>"
    return _table(header, rows)


def _device(start: dict[str, Any]) -> str:
    device = str(start.get("device") or "–")
    return f"{device}, {start['threads']} threads" if start.get("device_type") == "cpu" else device
