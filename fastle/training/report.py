"""What a run leaves for people: metrics.jsonl, image grids and curves. Also the measures of a latent's health."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastle.checkpoint import CheckpointError
from fastle.config import Size, sides_of
from fastle.files import one_line, open_regular, parse_json, write_atomic
from fastle.method.model import unit_range
from fastle.options import pair_text

TILE = 96  # pixels: small images are enlarged to about this size, by whole factors
GAP = 4  # pixels between images
LABEL = 15  # font size of the rows' names
STARTS = "starts.jsonl"
GRID_ROWS = ("input", "reconstruction", "masked input", "its reconstruction")  # the last two in the masked setting
TERMS = ("pixel", "agreement", "full_view", "consistency", "clean", "masked", "sigreg")


@torch.no_grad()
def latent_spread(z: Tensor) -> Tensor:
    """The root of the mean variance of a latent's channels; 0 if all latents are the same.

    Args:
        z: (B, D), or (B, c, h, w), whose positions count as samples of c channels.
    """
    return _samples(z).var(0, correction=0).mean().sqrt()


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    """The effective rank (Roy & Vetterli, 2007), in [1, D]: exp of the entropy of the covariance's eigenvalues.

    Args:
        z: (B, D), or (B, c, h, w), whose positions count as samples of c channels.
    """
    samples = _samples(z)
    centred = samples - samples.mean(0)
    # both products have the same positive eigenvalues, and one of them may not fit in memory
    product = centred.T @ centred if len(centred) >= centred.shape[1] else centred @ centred.T
    # on the CPU where a GPU has no such solver
    eigenvalues = torch.linalg.eigvalsh(product if product.is_cuda else product.cpu()).clamp_min(0)
    share = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return torch.special.entr(share).sum().exp()


def _samples(z: Tensor) -> Tensor:
    return (z if z.ndim == 2 else z.permute(0, 2, 3, 1).flatten(0, 2)).float()


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to metrics.jsonl, which holds one JSON object per line, in the order of the steps.

    A number that is not finite becomes null.
    """
    with path.open("ab") as file:
        file.write(_line(row))


def rewind_metrics(path: Path, step: int) -> None:
    """Drops the rows of steps later than `step`, which a killed run may have left in metrics.jsonl.

    If lines of it are damaged, the file is kept as metrics.jsonl.damaged.
    """
    rows, damaged = check_metrics(path)
    if damaged:
        write_atomic(path.with_name(f"{path.name}.damaged"), path.read_bytes())
    write_atomic(path, b"".join(_line(row) for row in rows if row["step"] <= step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, except a last line that was cut off; an empty list if there is no file.

    Lines that are damaged are left out, with a warning.
    """
    rows, damaged = check_metrics(path)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        warnings.warn(f"{path}: line {damaged[0]}{more} cannot be read, and is left out", stacklevel=1)
    return rows


def check_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of metrics.jsonl as `read_metrics` returns them, and the numbers of the lines that are damaged."""
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    if not path.exists():
        return rows, damaged
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from None
    # a process that was killed may have left a part of a line
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if _is_row(row, after=rows[-1]["step"] if rows else -1):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _is_row(row: Any, *, after: int) -> bool:
    """Whether something is a row of a later step than `after`: a step, and numbers by their names."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and after < row["step"]
        and all(value is None or type(value) in (int, float) for value in row.values())
    )


def _line(row: dict[str, Any]) -> bytes:
    # JSON has no word for NaN and infinity
    values = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(values).encode() + b"\n"


def append_start(run: Path, facts: dict[str, Any]) -> None:
    """Appends a line to starts.jsonl, which says when, where and with which command a run was started or went on."""
    with (run / STARTS).open("ab") as file:
        file.write(json.dumps(facts).encode() + b"\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl. Those that are damaged are left out, with a warning; earlier versions wrote none."""
    path = run / STARTS
    if not path.exists():
        return []
    starts = []
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from None
    for number, line in enumerate(lines, 1):
        try:
            start = parse_json(line)
        except ValueError:
            start = None
        if isinstance(start, dict):
            starts.append(start)
        else:
            warnings.warn(f"{path}: line {number} cannot be read, and is left out", stacklevel=1)
    return starts


def save_grid(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Writes a PNG with one labelled row of images per entry.

    Args:
        path: The PNG file.
        rows: Names and images. The images are (B, C, H, W), uint8 or in [0, 1], all of one shape. With C other than 3,
            only the first channel is shown, as grey.
    """
    batch, _, height, width = rows[0][1].shape
    zoom = max(1, round(TILE / height))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(LABEL)
    margin = _margin([name for name, _ in rows])
    canvas = Image.new("RGB", (margin + batch * (width + GAP), GAP + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(rows):
        y = GAP + r * (height + GAP)
        draw.text((GAP, y + height // 2), name, fill="black", font=font, anchor="lm")
        for b, image in enumerate(images):
            tile = Image.fromarray(_to_rgb(image)).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + b * (width + GAP), y))
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG")
    write_atomic(path, encoded.getvalue())


def grids(run: Path) -> list[Path]:
    """The grids of a run, in the order of their steps."""
    return sorted((run / "grids").glob("step-*.png"))


def read_grid(path: Path | str, size: Size) -> dict[str, Tensor]:
    """The images of a grid that `save_grid` wrote with rows of `GRID_ROWS`.

    Args:
        path: The PNG file.
        size: Of the run's images, pixels: a number for a square, or (height, width).

    Returns:
        By the names of the rows, uint8 (B, 3, H, W): to the bit what `save_grid` was given, if that was uint8.

    Raises:
        CheckpointError: The file is damaged, or is no grid of images of this size.
    """
    height, width = sides_of(size)
    zoom = max(1, round(TILE / height))
    pitch, across = height * zoom + GAP, width * zoom + GAP
    try:
        with open_regular(path) as file:
            picture = np.array(Image.open(file).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}): delete it") from None
    names = GRID_ROWS[: (len(picture) - GAP) // pitch]
    # another version of Pillow may have another font, whose names are a few pixels longer or shorter
    count = round((picture.shape[1] - _margin(names)) / across)
    if len(names) not in (2, 4) or len(picture) != GAP + len(names) * pitch or count < 1:
        raise CheckpointError(f"{path} is no grid of images of {pair_text(size)} px: delete it")
    first = picture.shape[1] - count * across
    tiles = picture[GAP:, first:].reshape(len(names), pitch, count, across, 3)[:, :-GAP:zoom, :, :-GAP:zoom]
    images = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3)))
    return dict(zip(names, images, strict=True))


def _margin(names: Sequence[str]) -> int:
    """The width of the column that names the rows of a grid."""
    font = ImageFont.load_default(LABEL)
    return 2 * GAP + max((int(font.getlength(name)) for name in names), default=0)


def _to_rgb(image: Tensor) -> Any:
    pixels = (unit_range(image).detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    # of anything but RGB, the first channel is shown
    return (pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()


def save_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG of the loss and its terms, the validation PSNR, and the latent's spread and effective rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (losses, quality), (spread, rank) = figure.subplots(2, 2)
    for name in ("total", *TERMS):
        _curve(losses, rows, name, linewidth=2 if name == "total" else 1)
    losses.set(title="loss (terms before weighting)", yscale="log")
    losses.legend(fontsize=8)
    _curve(quality, rows, "valid_psnr", marker="o", markersize=3)
    quality.set(title="validation PSNR, dB")
    _curve(spread, rows, "latent_spread")
    spread.set(title="latent spread (0 is collapse)", ylim=(0, None))
    _curve(rank, rows, "effective_rank")
    rank.set(title="effective rank of the latent (1 is collapse)", ylim=(0, None))
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    encoded = io.BytesIO()
    FigureCanvasAgg(figure).print_png(encoded)
    write_atomic(path, encoded.getvalue())


def _curve(axes: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
