"""Mutates the files of a run, and sees what fastle makes of them.

A mutation is found (one line that names the file), harmless (what was read is what was written), or one of these:

    traceback           an error that is not fastle's, or more than a line
    accepted nonsense   something else was read than what was written, and it is not sane
    memory              reading took more than twice the file's size, and `SLACK`

Some mutations renew the checksums, as a program that is wrong would: then what is accepted must be sane.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from bench.common.memory import resident_memory
from fastle.checkpoint import load_checkpoint, newest_good_checkpoint, read_run_config, save_checkpoint
from fastle.errors import FastleError
from fastle.method.pretrained import model_of_run
from fastle.presets import make_config
from fastle.training.report import check_metrics
from fastle.training.trainer import Trainer

from .mutations import MUTATIONS, SIGNED
from .sanity import insane_config, insane_rows

SLACK = 8 * 2**20  # bytes: what Python and torch keep for themselves
LONGEST = 700  # characters of a message
STEP = 3


@dataclass
class Outcome:
    """What became of the cases so far."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    most_memory: float = 0

    def add(self, kind: str, case: int, mutation: str, detail: str = "") -> None:
        """Counts a case, and keeps what is needed to repeat one that must not happen."""
        self.counts[kind] += 1
        if kind not in ("found", "harmless"):
            self.faults.append({"kind": kind, "case": case, "mutation": mutation, "detail": detail[:300]})


class Bench:
    """A small run directory, and what fastle reads from it."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.config = make_config(
            "shapes",
            size=16,
            hidden=4,
            map_channels=4,
            latent=6,
            batch_size=4,
            slices=8,
            steps=9,
            masked=True,
            precision="fp32",
        )
        self.trainer = Trainer(self.config, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEP):
            self.trainer(torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=generator))
        self.run.mkdir()
        (self.run / "config.json").write_text(json.dumps({"format": "fastle run", **self.config.to_dict()}, indent=2))
        rows = [json.dumps({"step": step, "total": 1 / step, "images_per_second": None}) for step in range(1, 9)]
        (self.run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        metadata = {"step": STEP, "train_images": 12_000, "config": self.config.to_dict()}
        self.checkpoint = save_checkpoint(self.run, STEP, self.trainer.state(), metadata)
        self.saved = load_checkpoint(self.checkpoint)
        self.files = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}

    def restore(self) -> None:
        """Puts every file back."""
        shutil.rmtree(self.run)
        for path, content in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def read(self, *, signed: bool = False) -> str:
        """Reads everything as a resumed run and an evaluation would, and says what is insane in it, or "".

        Args:
            signed: Whether tensors and metadata may be others than those that were written.

        Raises:
            FastleError: Something was refused.
        """
        rows, damaged = check_metrics(self.run / "metrics.jsonl")
        if damaged:
            raise FastleError(f"{len(damaged)} lines of metrics.jsonl are damaged")
        config = read_run_config(self.run)
        model, checkpoint, _ = model_of_run(self.run, "cpu")
        whole, _ = newest_good_checkpoint(self.run, self.trainer.check)
        if differences := [text for text in self.config.differences(config) if not text.startswith("data.root ")]:
            return f"the configuration is another: {differences}"
        if not signed and (whole.metadata != self.saved.metadata or not _equal(whole.tensors, self.saved.tensors)):
            return "the checkpoint is another than the one that was written"
        return (
            insane_rows(rows)
            or insane_config(config)
            or self._insane_state(whole.tensors, whole.metadata)
            or self._insane_state({f"model.{n}": t for n, t in model.state_dict().items()}, checkpoint.metadata)
        )

    def _insane_state(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
        for name, tensor in tensors.items():
            saved = self.saved.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                return f"{name} is not the model's"
            if not tensor.isfinite().all():
                return f"{name} is not finite"
            if name.endswith(".exp_avg_sq") and tensor.min() < 0:
                return f"{name} is negative"
            if name.endswith(".step") and not 0 <= tensor <= metadata["step"]:
                return f"{name} is {tensor}"
        if type(metadata["step"]) is not int or metadata["step"] != STEP:
            return f"step is {metadata['step']}"
        images = metadata.get("train_images", 1)
        return "" if type(images) is int and 0 <= images < 2**53 else f"train_images is {images}"


def fuzz(folder: Path, *, cases: int, seed: int) -> dict[str, Any]:
    """Reads so many mutated run directories. `folder` is empty and for this alone."""
    bench, outcome = Bench(folder), Outcome()
    assert bench.read() == ""
    for case in range(cases):
        random = Random(f"{seed}-{case}")
        path = random.choice(
            [bench.checkpoint, bench.checkpoint, bench.run / "config.json", bench.run / "metrics.jsonl"]
        )
        name, mutate = random.choice(MUTATIONS[path.suffix])
        content = mutate(bench.files[path], random)
        path.write_bytes(content)
        _read_once(bench, outcome, case, f"{name} of {path.name}", len(content))
        path.write_bytes(bench.files[path])
        if case % 1000 == 999:
            print(f"{case + 1:,} of {cases:,} mutations: {dict(outcome.counts)}")
    return {
        "cases": cases,
        "seed": seed,
        **{kind: outcome.counts[kind] for kind in ("found", "harmless", "traceback", "accepted nonsense", "memory")},
        "most_memory_over_twice_the_file": round(outcome.most_memory),
        "faults": outcome.faults,
    }


def flip_bits(folder: Path, *, cases: int, seed: int) -> dict[str, Any]:
    """Flips one bit of a checkpoint at a time, anywhere in it, and counts those that are found."""
    bench, missed = Bench(folder), []
    data = bench.files[bench.checkpoint]
    for bit in Random(seed).sample(range(8 * len(data)), min(cases, 8 * len(data))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        bench.checkpoint.write_bytes(changed)
        try:
            load_checkpoint(bench.checkpoint)
            missed.append(bit)
        except FastleError:
            continue
    return {"flipped": cases, "found": cases - len(missed), "missed": missed}


def _read_once(bench: Bench, outcome: Outcome, case: int, mutation: str, size: int) -> None:
    before = resident_memory(reset=True)
    try:
        insane = bench.read(signed=SIGNED in mutation)
        kind, detail = ("accepted nonsense", insane) if insane else ("harmless", "")
    except FastleError as error:
        text = str(error)
        tidy = "\n" not in text and len(text) <= LONGEST and text.isprintable()
        kind, detail = ("found", "") if tidy else ("traceback", text)
    except Exception as error:  # noqa: BLE001 (what fastle did not foresee is what is looked for)
        kind, detail = "traceback", repr(error)
    outcome.add(kind, case, mutation, detail)
    used = resident_memory(peak=True) - before - 2 * size
    outcome.most_memory = max(outcome.most_memory, used)
    if used > SLACK:
        outcome.add("memory", case, mutation, f"{used:,} bytes more than twice the file's {size:,}")


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
