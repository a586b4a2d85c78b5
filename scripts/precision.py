"""Trains the same autoencoder in fp32 and in bf16, from several seeds, and compares the PSNR of unseen images.

    python scripts/precision.py --data DIR --json FILE       # DIR holds train/ and test/, of CIFAR-10 as JPEG files

It computes on the CPU, which may emulate bf16 and be slow. The default recipe at 32 px; every image is seen once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastle.config import Precision
from fastle.data.images import ArrayImages
from fastle.data.open import decode_files
from fastle.machine import environment
from fastle.presets import make_config
from fastle.training.evaluate import evenly_spaced, validation_psnr
from fastle.training.trainer import Trainer

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=150, metavar="N")
    parser.add_argument("--hidden", type=int, default=8, metavar="N")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="images of test/ to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(argv)
    train = read(options.data / "train", options.steps * options.batch_size)
    test = read(options.data / "test", options.images)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for precision in PRECISIONS:
            psnr = measure(options, train, test, precision, seed)
            rows.append({"seed": seed, "precision": precision, "psnr": round(psnr, 3)})
            print(f"seed {seed}, {precision}: {psnr:.2f} dB", flush=True)
    for precision in PRECISIONS:
        mean = sum(row["psnr"] for row in rows if row["precision"] == precision) / options.seeds
        print(f"{precision}: {mean:.2f} dB, the mean of {options.seeds} seeds")
    if options.json:
        command = ["scripts/precision.py", *(argv or sys.argv[1:])]
        report = {"command": command, "environment": environment(CPU), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def read(folder: Path, count: int) -> Tensor:
    """`count` images below a folder, of all its parts alike: uint8 (count, 3, 32, 32)."""
    paths = sorted(folder.rglob("*.jpg"))
    if len(paths) < count:
        raise SystemExit(f"error: {folder} holds {len(paths)} JPEG files, and {count} are needed")
    config = make_config("folder", data=folder, size=32).data
    return decode_files(config, [paths[index] for index in evenly_spaced(len(paths), count)])


def measure(options: argparse.Namespace, train: Tensor, test: Tensor, precision: Precision, seed: int) -> float:
    """The PSNR in dB, of the images of `test`, that one training on those of `train` reaches."""
    config = make_config(
        "folder", data=options.data, size=32, hidden=options.hidden, batch_size=options.batch_size,
        steps=options.steps, optimizer=options.optimizer, seed=seed, precision=precision,
    )  # fmt: skip
    trainer = Trainer(config, CPU)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    for batch in train[order].split(options.batch_size):
        trainer(batch.contiguous(memory_format=torch.channels_last))
    return validation_psnr(trainer.model, ArrayImages(test), limit=len(test), device=CPU)


if __name__ == "__main__":
    sys.exit(main())
