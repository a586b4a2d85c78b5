"""The display of a run: a live table on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

WARM_UP = 5  # first steps that the rates leave out: allocators, thread pools and file caches fill up in them
PLAIN_SECONDS = 10.0  # plain lines are at least this far apart
PLAIN_COLUMNS = 80  # of plain lines


class Clock:
    """Measures the time spent in steps, without validation and saving, and the rate since the warm-up.

    Args:
        images_per_step: The batch size of all ranks together.
        now: Returns the time in seconds. Tests pass their own.

    Attributes:
        steps: The number of steps that have ended.
    """

    def __init__(self, images_per_step: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._images, self._now = images_per_step, now
        self.steps = 0
        self._spent, self._resumed_at = 0.0, now()
        self._warm_up = 0.0

    def step(self) -> None:
        """Notes that a step has ended."""
        self.steps += 1
        if self.steps == WARM_UP:
            self._warm_up = self.elapsed()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what happens in the `with` block."""
        self._spent = self.elapsed()
        try:
            yield
        finally:
            self._resumed_at = self._now()

    def elapsed(self) -> float:
        """Seconds spent in steps. Not meaningful while paused."""
        return self._spent + self._now() - self._resumed_at

    def seconds_per_step(self) -> float | None:
        """The mean since the warm-up, or None during it."""
        steps = self.steps - WARM_UP
        return None if steps < 1 else (self.elapsed() - self._warm_up) / steps

    def images_per_second(self) -> float | None:
        """The rate of all ranks together, or None during the warm-up."""
        seconds = self.seconds_per_step()
        return self._images / seconds if seconds else None


class Display:
    """Shows rows of metrics as they come. Use it in a `with` statement.

    Args:
        console: Where the metrics are shown.
        total: The number of steps of the run.
        shown: Whether anything is shown at all.
        rows: Whether metrics and routine messages are shown.
    """

    def __init__(self, console: Console, total: int, *, shown: bool = True, rows: bool = True) -> None:
        self._console, self._total, self._shown, self._rows = console, total, shown, shown and rows
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(None), expand=True
        )
        self._task: TaskID = self._progress.add_task("train", total=total)
        live = self._rows and console.is_terminal
        self._live = Live(console=console, auto_refresh=False, transient=False) if live else None
        self._last_line = -PLAIN_SECONDS
        self._newest: dict[str, Any] = {}

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Prints a routine message, only if `rows` is set."""
        if self._rows:
            self.say(text)

    def update(self, row: dict[str, Any], eta: float | None, *, force: bool = False) -> None:
        """Shows the newest metrics.

        Args:
            row: A row of metrics.jsonl.
            eta: Seconds to the end of the run, or None if not known yet.
            force: Without a terminal, print a line even if the last one is less than `PLAIN_SECONDS` old.
        """
        if not self._rows:
            return
        remaining = "warming up" if eta is None else format_seconds(eta)
        if self._live is not None:
            # metrics that only some rows have keep their place in the table
            self._newest |= row
            self._progress.update(self._task, completed=row["step"])
            self._live.update(Group(self._progress, _table(_formatted(self._newest, remaining))), refresh=True)
        elif force or time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            metrics = [f"{name} {value}" for name, value in _formatted(row, remaining).items()]
            self.say(_wrapped([f"step {row['step']}/{self._total}", *metrics]))


def _formatted(row: dict[str, Any], remaining: str) -> dict[str, str]:
    metrics = {name.replace("_", " "): format_metric(name, value) for name, value in row.items() if name != "step"}
    return {"ETA": remaining} | metrics


def _wrapped(parts: list[str]) -> str:
    """Joins parts into lines of at most `PLAIN_COLUMNS` that break between parts only; later lines are indented."""
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= PLAIN_COLUMNS:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"    {part}")
    return "\n".join(lines)


def _table(metrics: dict[str, str]) -> Table:
    """Names above values, eight to a line."""
    grid = Table.grid(padding=(0, 3))
    names, values = list(metrics), list(metrics.values())
    for start in range(0, len(names), 8):
        grid.add_row(*(f"[dim]{name}[/dim]" for name in names[start : start + 8]))
        grid.add_row(*values[start : start + 8])
    return grid


def format_metric(name: str, value: Any) -> str:
    """Formats a metric for people."""
    if value is None:
        return "–"
    if name == "data_wait":
        return f"{value:.1%}"
    if name in ("epoch", "images_per_second"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if name in ("valid_psnr", "effective_rank") else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Formats a duration: 12 s, 3 min 05 s, 2 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
