"""What the benchmarks' pictures share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from bench.measure import Row


def machine(report: Row) -> str:
    """What a picture's title says of where its figures come from."""
    here = report["environment"]
    commit = (here["commit"] or "unknown")[:10] + ("-dirty" if str(here["commit"]).endswith("-dirty") else "")
    threads = "" if here["device_type"] == "cuda" else f", threads {here['threads']}"
    return f"{here['device']}{threads}, torch {here['torch']}, commit {commit}"


def write(figure: Any, path: Path) -> None:
    """The figure as a PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    encoded = io.BytesIO()
    FigureCanvasAgg(figure).print_png(encoded)
    path.write_bytes(encoded.getvalue())
