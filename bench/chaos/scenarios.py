"""What can happen to a run: kills, signals, flipped bytes, mutated JSON, a full disk, a second process, a lost rank.

Every event happens to a run that is under way, and then the same command is run again. It must end with the weights and
the metrics of a run that nothing happened to, equal to the bit, after at most `TRIES` tries; each try that fails may
say so in one line, and where that line names a way out, the way out is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import fastle.training.loop
from fastle.checkpoint import checkpoints, load_checkpoint
from fastle.errors import FastleError
from fastle.training.report import check_metrics

from .field import PATIENCE, STEPS, Field, Process
from .mutations import MUTATIONS

REPORTS = 3  # of a run: pictures take longer than its steps
TRIES = 4
# what a row of metrics says of the moment. its losses are means since the last row, and a stop makes a row of its own;
# its times depend on the machine
MOMENT = ("epoch", "valid_psnr", "latent_spread", "effective_rank")
# weights by name, and what each row of metrics says of its moment, by step
State = tuple[dict[str, Tensor], dict[int, dict[str, Any]]]


def _state(run: Path) -> State:
    """Weights and metrics of a finished run."""
    checkpoint = load_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}.safetensors")
    rows, damaged = check_metrics(run / "metrics.jsonl")
    if damaged:
        raise FastleError(f"lines {damaged} of metrics.jsonl are damaged")
    return checkpoint.tensors, {row["step"]: {name: row.get(name) for name in MOMENT} for row in rows}


def chaos(folder: Path, *, minutes: float, seed: int, only: str | None = None) -> dict[str, Any]:
    """Does things to a run for so many minutes. `folder` is empty and for this alone."""
    torch.set_num_threads(1)
    fastle.training.loop.REPORTS = REPORTS
    field = Field(folder)
    field.make_images()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    disk = _mount(folder / "disk")
    expected: dict[int, State] = {}
    for field.ranks in (1, 2):
        calm = folder / f"calm-{field.ranks}"
        if not field.finish(calm):
            return {"faults": [{"event": "none", "untidy": field.untidy}]}
        expected[field.ranks] = _state(calm)
    events = {only: EVENTS[only]} if only else {n: e for n, e in EVENTS.items() if disk or n != "full disk"}
    counts: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    end, number = time.monotonic() + 60 * minutes, 0
    try:
        while time.monotonic() < end:
            field.random, field.ranks, field.untidy = Random(f"{seed}-{number}"), 1, []
            # each kind in turn, so that a short time sees as many as it can
            name = list(events)[number % len(events)]
            shutil.rmtree(field.run, ignore_errors=True)
            events[name](field)
            lost = _finish(field, expected[field.ranks])
            counts[name] += 1
            if field.untidy or lost:
                faults.append({"number": number, "event": name, "lost": lost, "untidy": field.untidy})
                print(f"{number} {name}: {lost} {field.untidy}")
            number += 1
    finally:
        if disk:
            subprocess.run(["umount", "-l", str(folder / "disk")], check=False)
    return {"seed": seed, "events": dict(counts), "total": number, "faults": faults}


def _finish(field: Field, expected: State) -> str:
    """Runs the same command until it succeeds, takes the ways out, and says what is lost, or ""."""
    for _ in range(TRIES):
        if field.finish(field.run):
            break
        # what the errors about a damaged config.json and damaged checkpoints recommend
        field.end(field.start(["check", str(field.run), "--restore-config"], program="fastle"))
        if checkpoints(field.run) and not _any_intact(field.run):
            shutil.rmtree(field.run)
    else:
        return f"not finished after {TRIES} tries"
    try:
        weights, rows = _state(field.run)
    except FastleError as error:
        return str(error)
    if weights.keys() != expected[0].keys() or not all(torch.equal(t, expected[0][n]) for n, t in weights.items()):
        return "the weights are others"
    # a damaged line may be missing
    if any(rows.get(step, row) != row for step, row in expected[1].items()) or STEPS not in rows:
        return "the metrics are others"
    return ""


def _any_intact(run: Path) -> bool:
    for path in checkpoints(run):
        with contextlib.suppress(FastleError):
            load_checkpoint(path)
            return True
    return False


def _under_way(field: Field, *, saved: bool = False) -> Process:
    """Starts the run, and waits for a moment of it, or until it has a checkpoint."""
    process = field.start(field.command(field.run))
    end = time.monotonic() + field.random.uniform(0, 4)
    if saved:
        while not checkpoints(field.run) and not process.ended() and time.monotonic() < end + PATIENCE:
            time.sleep(0.02)
        time.sleep(field.random.uniform(0, 1))
    else:
        time.sleep(end - time.monotonic())
    return process


def _kill(field: Field) -> None:
    """SIGKILL at any moment, more than once."""
    for _ in range(field.random.choice((1, 1, 3))):
        process = _under_way(field)
        process.kill(signal.SIGKILL)
        field.end(process, -signal.SIGKILL)


def _kill_saving(field: Field) -> None:
    """SIGKILL while a checkpoint is written."""
    _kill_when(field, lambda: any((field.run / "checkpoints").glob(".*.tmp")))


def _kill_caching(field: Field) -> None:
    """SIGKILL while the cache is written."""
    for path in field.caches.glob("*.safetensors*"):
        path.unlink()
    _kill_when(field, lambda: any(field.caches.glob("*.partial")))


def _kill_when(field: Field, moment: Callable[[], bool]) -> None:
    process = field.start(field.command(field.run))
    end = time.monotonic() + PATIENCE
    while not moment() and time.monotonic() < end and not process.ended():
        time.sleep(0.0005)
    time.sleep(field.random.uniform(0, 0.01))
    process.kill(signal.SIGKILL)
    field.end(process, -signal.SIGKILL)


def _signal(field: Field) -> None:
    """A signal that asks the run to stop, or to save and go on."""
    process = _under_way(field)
    signum = field.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
    process.kill(signum)
    field.end(process, -signum, 128 + signum)


def _flip_checkpoint(field: Field) -> None:
    """Flipped bytes, zeros or a cut in the newest checkpoint, or in all of them."""
    process = _under_way(field, saved=True)
    process.kill(signal.SIGKILL)
    field.end(process, -signal.SIGKILL)
    saved = checkpoints(field.run)
    for path in saved if field.random.random() < 0.2 else saved[-1:]:
        _damage(path, field.random)


def _flip_cache(field: Field) -> None:
    """Damage to the cache while no run has it open, or a cut while one has."""
    process = _under_way(field, saved=True) if field.random.random() < 0.5 else None
    for path in field.caches.glob("*.safetensors"):
        # checksums are checked when a cache is opened, and a run that reads it notices only that bytes are missing
        _damage(path, field.random, how=2 if process else None)
    if process:
        field.end(process)


def _mutate_json(field: Field) -> None:
    """Damage to config.json and metrics.jsonl."""
    process = _under_way(field, saved=True)
    process.kill(signal.SIGKILL)
    field.end(process, -signal.SIGKILL)
    path = field.run / "config.json"
    if path.exists():
        _, mutate = field.random.choice(MUTATIONS[".json"])
        path.write_bytes(mutate(path.read_bytes(), field.random))
    rows = field.run / "metrics.jsonl"
    if rows.exists() and rows.stat().st_size:
        # if a line before the last checkpoint is damaged, the others must be kept. no flipped bits: the log has no
        # checksums, and another digit goes unnoticed
        _damage(rows, field.random, how=field.random.choice((1, 2)))


def _damage(path: Path, random: Random, how: int | None = None) -> None:
    """Flips a bit (0), writes zeros (1) or cuts the file (2), in place, as a failing disk would; drawn by default."""
    with contextlib.suppress(FileNotFoundError):
        data = bytearray(path.read_bytes())
        if not data:
            return
        at = random.randrange(len(data))
        how = random.randrange(3) if how is None else how
        if how == 0:
            data[at] ^= 1 << random.randrange(8)
        elif how == 1:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        with path.open("r+b") as file:
            file.write(data)
            if how == 2:
                file.truncate(at)


def _fill_disk(field: Field) -> None:
    """A disk that fills up at any moment, and has room again later."""
    process = _under_way(field)
    ballast = field.folder / "disk" / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(field.random.choice((512, 4096, 65536))))
    field.end(process)
    ballast.unlink()


def _second_process(field: Field) -> None:
    """The same command again, or one with another seed, while the run is under way."""
    first = _under_way(field, saved=field.random.random() < 0.5)
    second = field.start(field.command(field.run, seed=field.random.choice((0, 0, 1))))
    if field.random.random() < 0.3:
        time.sleep(field.random.uniform(0, 2))
        first.kill(signal.SIGKILL)
    field.end(first, -signal.SIGKILL)
    field.end(second)
    saved = json.loads((field.run / "config.json").read_bytes()) if (field.run / "config.json").exists() else {}
    if saved.get("train", {}).get("seed") == 1:
        # the other run came first, or alone survived
        shutil.rmtree(field.run)


def _lost_rank(field: Field) -> None:
    """Two ranks, of which one or both are killed: one that is left must end by itself."""
    field.ranks = 2
    ranks = field.train(field.run)
    time.sleep(field.random.uniform(1, 6))
    for rank in field.random.choice((ranks[:1], ranks[1:], ranks)):
        rank.kill(signal.SIGKILL)
    for rank in ranks:
        field.end(rank, -signal.SIGKILL)


def _mount(folder: Path) -> bool:
    """Makes a small file system in a folder, where that is allowed. Whether it is."""
    folder.mkdir()
    if shutil.which("mount") is None:
        return False
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0


EVENTS: dict[str, Callable[[Field], None]] = {
    "kill": _kill,
    "kill in a checkpoint": _kill_saving,
    "kill in the cache": _kill_caching,
    "damaged checkpoint": _flip_checkpoint,
    "signal": _signal,
    "damaged cache": _flip_cache,
    "mutated JSON": _mutate_json,
    "full disk": _fill_disk,
    "second process": _second_process,
    "lost rank": _lost_rank,
}
