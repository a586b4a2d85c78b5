"""Trains and measures one row for `scripts/reproduce.py`: chooses the learning rate, trains, evaluates and probes.

The folder of a row holds one run for each learning rate and seed. Its progress.json holds what is measured already, so
that an interrupted row continues. With a constant rate, the short run that chooses one becomes the beginning of the
whole run, so that nothing is trained twice. A rate that falls belongs to the length of its run: its short runs stay
apart.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import mse_loss

from bench.reproduce.rows import Plan, same_settings
from fastle.checkpoint import has_checkpoint
from fastle.choices import StepMode
from fastle.config import ConfigError, RunConfig
from fastle.data import Images, open_images
from fastle.files import write_atomic
from fastle.folders import split_paths
from fastle.method.model import Autoencoder, unit_range
from fastle.training.evaluate import Metrics, evaluate, evenly_spaced, validation_psnr
from fastle.training.loop import Execution, train
from fastle.training.probe import linear_accuracy, nearest_accuracy
from fastle.training.window import NonFiniteLoss

Record = dict[str, Any]
BATCH = 500
FADED, FADED_IMAGES = 0.2, 1000


class RowRunner:
    """Trains and measures one row, and continues where it was interrupted.

    Args:
        plan: The trainings of the row.
        folder: Holds the row's runs.
        device: Where everything is computed.
        redo: Discard the runs that exist.
        say: Receives a line for each thing that begins.

    Raises:
        ConfigError: The folder holds something other than runs of this script.
    """

    def __init__(
        self, plan: Plan, folder: Path, *, device: torch.device, redo: bool, say: Callable[[str], None]
    ) -> None:
        self.plan, self.folder, self._device, self._say = plan, folder, device, say
        self._file = folder / "progress.json"
        self._record = self._open(redo)
        self._resumed = time.perf_counter()

    def _open(self, redo: bool) -> Record:
        settings = self.plan.settings()
        if self._file.exists():
            record = _read(self._file)
            if not redo and same_settings(settings, record.get("settings", {})):
                return record
            shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} holds something other than runs of this script: give another --runs")
        return {"settings": settings, "seconds": 0.0, "search": {}, "runs": []}

    def finish(self) -> Record:
        """Trains and measures what is missing.

        Returns:
            The row's record: settings, search (learning rate → dB on the held-out images, or why there is none), lr,
            runs (seed and figures), representation (of a probed row), and seconds (of work, without what an
            interruption lost). If a loss was not finite, "failed" holds the reason, and the rest is missing.

        Raises:
            FastleError: The images or a checkpoint cannot be used.
            Interrupted: See `fastle.training.signals`.
        """
        self._record.pop("failed", None)
        self._save()
        try:
            rate = self._choose_rate()
            self._record["lr"] = rate
            for seed in self.plan.seeds[len(self._record["runs"]) :]:
                config = self.plan.run(rate, seed)
                model = self._train(config, self.run_folder(rate, seed))
                figures = self._evaluate(model, config, "test")
                self._record["runs"].append({"seed": seed, "figures": figures})
                self._save()
            if self.plan.row.probed and "representation" not in self._record:
                self._say("probing its latents")
                model = Autoencoder.from_pretrained(self.run_folder(rate, self.plan.seeds[0]), self._device)
                self._record["representation"] = probe(model, self.plan)
        except NonFiniteLoss as error:
            # what follows the semicolon names a folder of this machine
            self._record["failed"] = str(error).split(";")[0]
        self._save()
        return self._record

    def run_folder(self, rate: float, seed: int) -> Path:
        """The folder of one training."""
        return self.folder / f"lr-{rate:g}-seed-{seed}"

    def _search_folder(self, rate: float) -> Path:
        """The folder of the short run that tries a rate."""
        folder = self.run_folder(rate, self.plan.seeds[0])
        constant = self.plan.config.train.schedule == "constant"
        return folder if constant else folder.with_name(f"search-{folder.name}")

    def _choose_rate(self) -> float:
        """The learning rate with the highest PSNR on the held-out images, after a part of the steps."""
        rates, search = self.plan.rates, self._record["search"]
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            if f"{rate:g}" not in search:
                config = self.plan.run(rate, self.plan.seeds[0], self.plan.search_steps)
                self._say(f"learning rate {rate:g}, {self.plan.search_steps} steps")
                try:
                    search[f"{rate:g}"] = self._held_out_psnr(self._train(config, self._search_folder(rate)), config)
                except NonFiniteLoss as error:
                    search[f"{rate:g}"] = str(error).split(";")[0]
                self._save()
        psnrs = {rate: search[f"{rate:g}"] for rate in rates if isinstance(search[f"{rate:g}"], float)}
        if not psnrs:
            raise NonFiniteLoss(f"every learning rate fails: {search[f'{rates[-1]:g}']}")
        return max(psnrs, key=lambda rate: psnrs[rate])

    def _held_out_psnr(self, model: Autoencoder, config: RunConfig) -> float:
        """Mean PSNR over the held-out images, dB; over images with a hole if the row has one."""
        if config.objective.masked:
            return self._evaluate(model, config, "valid")["masked"]["psnr"]
        images = open_images(config.data, "valid")
        return validation_psnr(model, images, limit=len(images), device=self._device)

    def _train(self, config: RunConfig, path: Path) -> Autoencoder:
        # on a CPU compiled steps pay in long runs, and the compiler would run for each of a table's many short ones
        mode: StepMode = "compiled" if self._device.type == "cuda" else "eager"
        if mode != "eager":
            # each run compiles its own model, and torch counts all of them towards one limit
            torch.compiler.reset()
        train(config, path, Execution(device=self._device, mode=mode), console=Console(quiet=True))
        return Autoencoder.from_pretrained(path, self._device)

    def _evaluate(self, model: Autoencoder, config: RunConfig, split: Any) -> dict[str, Metrics]:
        images = open_images(config.data, split)
        return evaluate(model, images, hole_ratio=config.objective.hole_ratio, device=self._device)

    def _save(self) -> None:
        now = time.perf_counter()
        self._record["seconds"] = round(self._record["seconds"] + now - self._resumed, 1)
        self._resumed = now
        write_atomic(self._file, json.dumps(self._record, indent=1).encode() + b"\n")


def trained(folder: Path, record: Record) -> Path | None:
    """The folder of a finished row's first run, or None if it has no checkpoint any more."""
    path = folder / f"lr-{record['lr']:g}-seed-{record['settings']['seeds'][0]}" if "lr" in record else None
    return path if path is not None and has_checkpoint(path) else None


def summarize(record: Record) -> Record:
    """The mean over a record's runs, and the pair of least and greatest, of each figure that `evaluate` gives."""
    runs = [run["figures"] for run in record["runs"]]
    if not runs:
        return {"mean": {}, "spread": {}}
    values = {kind: {name: [run[kind][name] for run in runs] for name in runs[0][kind]} for kind in runs[0]}
    return {
        "mean": {kind: {name: sum(v) / len(v) for name, v in of.items()} for kind, of in values.items()},
        "spread": {kind: {name: [min(v), max(v)] for name, v in of.items()} for kind, of in values.items()},
    }


def probe(model: Autoencoder, plan: Plan) -> dict[str, float]:
    """Measures how well the latents separate the classes, and how much of contrast the judge sees.

    Returns:
        training_images: how many latents the classifiers were fitted to.
        linear, knn: test accuracies in [0, 1]; see `fastle.training.probe`.
        faded_own, faded_target: mse(J(x), J(x at a fifth of its contrast)) over 1,000 test images, with own and with
            target statistics; a constant image gets about 1.
    """
    count = plan.images["train"] if plan.probe_images is None else plan.probe_images
    latents, names = _latents(model, plan, "train", evenly_spaced(plan.images["train"], count))
    test_latents, test_names = _latents(model, plan, "test", range(plan.images["test"]))
    known = sorted({*names, *test_names})
    labels, test_labels = (torch.tensor([known.index(name) for name in of]) for of in (names, test_names))
    given = (latents, labels, test_latents, test_labels, len(known))
    return {
        "training_images": len(latents),
        "linear": linear_accuracy(*given),
        "knn": nearest_accuracy(*given),
        **_faded(model, plan),
    }


@torch.no_grad()
def _faded(model: Autoencoder, plan: Plan) -> dict[str, float]:
    """The distance that the judge sees between images and the same at a fifth of their contrast; see `probe`."""
    images, encoder = open_images(plan.config.data, "test"), model.encoder
    chosen = images.batch(evenly_spaced(len(images), FADED_IMAGES)).to(next(model.parameters()).device)
    x = unit_range(chosen)
    mean = x.mean((0, 2, 3), keepdim=True)
    (whole,), (faded,) = encoder.features((x, mean + FADED * (x - mean)))
    target = encoder.normalize(whole)
    own, shared = encoder.normalize(faded), encoder.normalize(faded, statistics_of=whole)
    return {"faded_own": float(mse_loss(own, target)), "faded_target": float(mse_loss(shared, target))}


def _latents(model: Autoencoder, plan: Plan, split: Any, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    """The latents (N, D) of a split's images, on the CPU, and their classes, which are the names of their folders."""
    data, device = plan.config.data, next(model.parameters()).device
    images: Images = open_images(data, split)
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(indices), BATCH):
            batch = images.batch(indices[start : start + BATCH]).to(device)
            parts.append(model.encode(batch).flatten(1).float().cpu())
    paths = split_paths(Path(str(data.root)), split)
    return torch.cat(parts), [paths[index].parent.name for index in indices]


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_bytes())
    except ValueError:
        raise ConfigError(f"{path} is damaged: remove its folder to start the row anew") from None
    return record
