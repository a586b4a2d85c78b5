"""Trains 20 steps of every row of the method and prints a digest of each row's weights and losses.

Two checkouts that print the same digests compute the same numbers, bit for bit. Run it before and after a change that
must not change them, on one machine:

    python scripts/row_digests.py --json before.json            # in the one checkout
    python scripts/row_digests.py --against before.json         # in the other
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors

STEPS = 20
# what a row's metrics say of time, not of numbers
RATES = ("images_per_second", "data_wait")
ROWS: dict[str, list[str]] = {
    "pixel": ["--objective", "pixel"],
    "untransformed, live": ["--judge", "live", "--transform", "identity"],
    "untransformed": ["--transform", "identity"],
    "crop, live": ["--judge", "live"],
    "crop": [],
    "crop, ema": ["--judge", "ema"],
    "crop, target statistics": ["--judge-statistics", "target"],
    "two crops": ["--crops", "2"],
    "crops of drawn sides": ["--crop-ratio-max", "0.8"],
    "pixel mask": ["--transform", "pixel-mask"],
    "patch mask": ["--transform", "patch-mask"],
    "channel mask": ["--transform", "channel-mask"],
    "noise": ["--transform", "noise"],
    "detail": ["--transform", "detail"],
    "pooled": ["--latent", "32"],
    "masked": ["--masked"],
    "masked, live": ["--masked", "--judge", "live"],
    "masked, ema, detail": ["--masked", "--judge", "ema", "--transform", "detail"],
    "masked, own statistics": ["--masked", "--judge-statistics", "own"],
    "masked pixel": ["--masked", "--objective", "pixel"],
    "crop, bf16": ["--precision", "bf16"],
    "crop, compiled": ["--step", "compiled"],
}


def digest(arguments: list[str]) -> dict[str, str]:
    """Weights, optimizer state and metrics of a row after its steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("fastle-train")), "shapes", "--recipe", "post", "--steps", str(STEPS),
            "--batch-size", "16", "--device", "cpu", "--run", folder, *arguments,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        weights = hashlib.sha256()
        (path,) = (Path(folder) / "checkpoints").glob(f"step-*{STEPS}.safetensors")
        with safetensors.safe_open(str(path), framework="pt") as file:
            for name in sorted(file.keys()):
                weights.update(name.encode() + file.get_tensor(name).contiguous().numpy().tobytes())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in row.items() if name not in RATES} for row in rows]
    return {"weights": weights.hexdigest()[:16], "metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the digests go")
    parser.add_argument("--against", type=Path, help="digests to compare with; any difference ends with status 1")
    flags = parser.parse_args()
    digests = {}
    for name, arguments in ROWS.items():
        digests[name] = digest(arguments)
        print(f"{name:<24} weights {digests[name]['weights']}  metrics {digests[name]['metrics']}", flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(digests, indent=2) + "\n")
    if flags.against:
        before = json.loads(flags.against.read_text())
        changed = [name for name in digests if digests[name] != before.get(name)]
        sys.exit(f"different: {', '.join(changed)}" if changed else 0)


if __name__ == "__main__":
    main()
