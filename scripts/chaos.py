"""Kills runs, damages their files, fills their disks, and checks that nothing is lost and nothing is quietly wrong.

    python scripts/chaos.py --minutes 60 --seed 1 --json chaos.json        # before a release
    python scripts/chaos.py --fuzz 10000 --json fuzz.json                  # mutated files, and 1,000 flipped bits

--minutes N trains one run again and again, and does something to it each time, drawn from the seed: see
bench/chaos/scenarios.py. Whatever was done, the same command must go on to the weights and metrics of a run that
nothing was done to, equal to the bit, and no error may be more than a line.

--fuzz N reads N mutated configurations, metrics and checkpoints: see bench/chaos/fuzz.py.

The exit status is 1 if anything was lost, wrong or untidy. The report names what was done, by seed and number.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# this checkout comes first, so that the results name the commit of what they test
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.chaos.fuzz import flip_bits, fuzz
from bench.chaos.scenarios import chaos
from fastle.commands.cli import Parser
from fastle.machine import environment

FLIPS = 1000


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--minutes", type=float, metavar="N", help="how long to do things to a run")
    what.add_argument("--fuzz", type=int, metavar="N", help="how many mutated files to read")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of everything that is drawn (default: drawn, and printed)"
    )
    parser.add_argument("--only", metavar="NAME", help="with --minutes: this kind of event alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    flags = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**31) if flags.seed is None else flags.seed
    print(f"seed {seed}")
    started = time.monotonic()
    report: dict[str, Any] = {"command": " ".join(["python", "scripts/chaos.py", *(argv or sys.argv[1:])])}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        if flags.fuzz is not None:
            report["flipped_bits"] = flip_bits(Path(other), cases=FLIPS, seed=seed)
            report["mutations"] = fuzz(Path(one), cases=flags.fuzz, seed=seed)
            bad = bool(report["mutations"]["faults"] or report["flipped_bits"]["missed"])
        else:
            report["chaos"] = chaos(Path(one), minutes=flags.minutes, seed=seed, only=flags.only)
            bad = bool(report["chaos"]["faults"])
    report |= {"seconds": round(time.monotonic() - started), "environment": environment(torch.device("cpu"))}
    print(json.dumps(report, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
