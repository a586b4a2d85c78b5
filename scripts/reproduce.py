"""Trains and measures every row of the method, and writes the tables of results.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --data cifar10-jpeg --scale small                    # two CPU cores
    python scripts/reproduce.py --data cifar10-jpeg --scale full                     # one GPU, three seeds
    python scripts/reproduce.py --data cifar10-jpeg --scale small --rows crop-0.3 --overwrite    # one row again

--data holds train/ and test/, each with one folder of CIFAR-10's photographs for each class. The same command run again
continues where it stopped, and skips rows whose results are stored with the same settings. After a change that should
change the figures, give --overwrite. The script writes

    OUT/SCALE.json, OUT/SCALE.md      settings, figures, seconds, machine and command of each row; the tables
    OUT/SCALE.png                     shapes and their reconstructions
    OUT/SCALE-samples-ROW.png         what a decoder makes of noise
    RUNS/SCALE/ROW/                   the runs
    RUNS/SCALE/*.png                  all pictures, also those of photographs, which are not ours to publish

--seeds and --steps become part of these names, so that their results stay apart. Rows from other machines or other days
stay in the tables, and each row names its own environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

# this checkout comes first, so that the results name the commit of what they measure
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.reproduce.measure import Record, RowRunner, summarize, trained
from bench.reproduce.report import markdown, save_reconstructions, save_samples
from bench.reproduce.rows import PROBED, ROWS, Group, Plan, Row, ScaleName, make_plan, pick_rows, same_settings
from fastle.commands.cli import Parser
from fastle.config import ConfigError, DataConfig
from fastle.data import open_images
from fastle.errors import FastleError
from fastle.files import write_atomic
from fastle.folders import Split
from fastle.machine import environment, find_device
from fastle.method.model import Autoencoder
from fastle.training.signals import Interrupted

PROGRAM = "reproduce.py"
SPLITS: tuple[Split, ...] = get_args(Split)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the photographs; the rows on shapes need none")
    parser.add_argument("--scale", choices=get_args(ScaleName), default="small", help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="another length, for a trial, whose results are kept apart"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1; their results are kept apart")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="discard the results and runs of these rows, and start anew"
    )
    parser.add_argument("--list", action="store_true", help="print the rows with their settings and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 1 if a row failed."""
    flags = make_parser().parse_args(argv)
    try:
        rows = pick_rows(flags.rows)
        if flags.list:
            print(listing(rows, flags.scale, flags.steps, flags.seeds))
            return 0
        return Table(flags).fill(rows)
    except FastleError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{PROGRAM}: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130


class Table:
    """The stored results of a scale, and what adds the missing ones.

    Args:
        flags: The parsed command line.

    Raises:
        FastleError: A flag is out of range, the device cannot be had, or an earlier report cannot be read.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        for flag, value in (("--steps", flags.steps), ("--seeds", flags.seeds)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} must be at least 1, not {value}")
        self._flags = flags
        self._device = find_device(flags.device)
        self._label = flags.scale
        if flags.seeds is not None:
            self._label += f"-seeds-{flags.seeds}"
        if flags.steps is not None:
            self._label += f"-trial-{flags.steps}"
        self._runs: Path = flags.runs / self._label
        self._file: Path = flags.out / f"{self._label}.json"
        self._report = self._read()

    def _read(self) -> Record:
        given = {"scale": self._flags.scale, "seeds": self._flags.seeds, "steps": self._flags.steps}
        words = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        report = {"flags": words, "trial": self._flags.steps, "rows": {}}
        if self._file.exists():
            try:
                report["rows"] = json.loads(self._file.read_bytes())["rows"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self._file} is damaged: move it away, or give another --out") from None
        return report

    def fill(self, rows: Sequence[Row]) -> int:
        """Trains the missing rows, and writes everything after each; returns the exit status."""
        plans = self._plans(rows)
        for plan in plans:
            name = plan.row.name
            kept = self._report["rows"].get(name)
            if kept and not self._flags.overwrite and same_settings(plan.settings(), kept["settings"]):
                print(f"{name}: done before", flush=True)
                continue
            print(f"{name}: begins, {plan.config.train.steps} steps, seeds {list(plan.seeds)}", flush=True)
            record = self._do(plan)
            self._report["rows"][name] = record
            self._write()
            print(f"{name}: {summary(record)}", flush=True)
        self._write()
        self._save_pictures(plans)
        print(f"written to {self._file.with_suffix('.md')}; pictures of photographs are in {self._runs}")
        return int(any("failed" in self._report["rows"][plan.row.name] for plan in plans))

    def _plans(self, rows: Sequence[Row]) -> list[Plan]:
        counts: dict[str, dict[str, int]] = {}
        plans = []
        for row in rows:
            if row.group != "shapes" and self._flags.data is None:
                raise ConfigError(f"--data is missing: row {row.name} is trained on photographs")
            flags = self._flags
            bare = make_plan(row, flags.scale, data=flags.data, images={}, steps=flags.steps, seeds=flags.seeds)
            data = bare.config.data
            if data.dataset not in counts:
                counts[data.dataset] = {split: len(open_images(data, split)) for split in SPLITS}
            plans.append(replace(bare, images=counts[data.dataset]))
        return plans

    def _do(self, plan: Plan) -> Record:
        name = plan.row.name
        runner = RowRunner(
            plan,
            self._runs / name,
            device=self._device,
            redo=self._flags.overwrite,
            say=lambda line: print(f"{name}: {line}", flush=True),
        )
        record = runner.finish()
        data = "" if plan.row.group == "shapes" else "--data cifar10-jpeg "
        command = f"python scripts/reproduce.py {data}{self._report['flags']} --rows {name} --overwrite"
        about = {"about": plan.row.about, "command": command}
        return {**about, **record, **summarize(record), "environment": environment(self._device)}

    def _write(self) -> None:
        # in the order of the table, whichever was done first
        order = [row.name for row in ROWS]
        rows = {name: self._report["rows"][name] for name in order if name in self._report["rows"]}
        self._report["rows"] = rows
        write_atomic(self._file, json.dumps(self._report, indent=1).encode() + b"\n")
        write_atomic(self._file.with_suffix(".md"), markdown(self._report).encode())

    def _save_pictures(self, plans: Sequence[Plan]) -> None:
        folders = {name: trained(self._runs / name, record) for name, record in self._report["rows"].items()}
        runs = {name: folder for name, folder in folders.items() if folder is not None}
        sources: dict[Group, DataConfig] = {plan.row.group: plan.config.data for plan in plans}
        for group, data in sources.items():
            # photographs are not ours to publish, so their pictures stay beside the runs
            path = self._file.with_suffix(".png") if group == "shapes" else self._runs / f"{group}.png"
            save_reconstructions(path, group, runs, data, self._device)
        for name in PROBED:
            if name in runs and name in {plan.row.name for plan in plans}:
                model = Autoencoder.from_pretrained(runs[name], self._device)
                for folder, start in ((self._runs, ""), (self._flags.out, f"{self._label}-")):
                    save_samples(folder / f"{start}samples-{name}.png", model, self._device)


def summary(record: Record) -> str:
    """The result of a row, in one line."""
    if "failed" in record:
        return f"FAILED, {record['failed']} ({record['seconds']:.0f} s)"
    figures = (
        f"{kind} {name} {value:.2f}" if "psnr" in name else f"{kind} {name} {value:.3f}"
        for kind, values in record["mean"].items()
        for name, value in values.items()
        if name != "psnr_of_mean_mse"
    )
    probes = record.get("representation", {})
    accuracies = [f"{name} {probes[name]:.3f}" for name in ("linear", "knn") if name in probes]
    return f"lr {record['lr']:g}, {', '.join([*figures, *accuracies])} ({record['seconds']:.0f} s)"


def listing(rows: Sequence[Row], scale: ScaleName, steps: int | None, seeds: int | None) -> str:
    """The rows and their settings, two lines each."""
    lines = []
    for row in rows:
        plan = make_plan(row, scale, data=None, images={}, steps=steps, seeds=seeds)
        config = plan.config
        used = config.settings()["objective"]
        model = {"hidden": config.model.hidden, "latent": "x".join(map(str, config.model.latent_shape))}
        length = {"steps": config.train.steps, "batch": config.train.batch_size}
        rates = {"lr": " or ".join(f"{rate:g}" for rate in plan.rates), "seeds": " ".join(map(str, plan.seeds))}
        lines.append(f"{row.name}: {row.group}, {row.about}")
        lines.append("    " + ", ".join(f"{name} {value}" for name, value in (model | length | rates | used).items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
