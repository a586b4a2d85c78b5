"""Computes how long a training step would take on GPUs that need not be there: a forecast, not a measurement.

    python scripts/gpu_forecast.py                                  # CelebA masked 512, five GPUs
    python scripts/gpu_forecast.py --settings celeba-spatial --gpus H100 H200 --json FILE
    python scripts/gpu_forecast.py --from FILE                      # what was computed before

torch.compile generates a step's CUDA code from tensors without data, for a mocked H100; its launches, bytes and FLOP
are counted, and each GPU's data sheet makes times of them (bench/forecast/roofline.py says how). fastle's step and the
plain compiled one, which is fastle/training/plain_step.py, take a few minutes each and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.forecast.generate import SETTINGS, StepVariant, count
from bench.forecast.report import SIDES, forecast_report, markdown
from bench.forecast.roofline import GPUS
from fastle.errors import FastleError

# the plain step supports only the rows that are measured
WITHOUT_PLAIN = ("celeba-pixel",)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["celeba-masked-512"])
    parser.add_argument("--gpus", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--batch", type=int, default=128, metavar="B")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="print the figures of --json again")
    options = parser.parse_args(argv)
    if options.batch < 2:
        parser.error(f"--batch {options.batch}: a BatchNorm needs two images")
    if options.source:
        print(markdown(json.loads(options.source.read_text(encoding="utf-8"))), end="")
        return 0
    precisions = sorted({GPUS[name].precision for name in options.gpus})
    variants = [
        StepVariant(setting=setting, side=side, precision=precision, batch=options.batch)
        for setting in options.settings
        for precision in precisions
        for side in SIDES
        if side == "fastle" or setting not in WITHOUT_PLAIN
    ]
    try:
        steps = {variant: count(variant) for variant in variants}
    except FastleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {"command": ["scripts/gpu_forecast.py", *(argv or sys.argv[1:])], **forecast_report(steps, options.gpus)}
    print(markdown(report), end="")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
