"""scripts/gpu_check.sh, with a stand-in for python3: order, limits and results of its parts. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
# writes what the real one would write, and fails where the test says
PYTHON = """#!/bin/sh
case "$*" in *"get_device_name"*) echo "RuntimeError: no driver"; exit 1;; *"import xdist"*) exit 1;; esac
echo "$*" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 3;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --json) echo "{}" > "$2";;
        --run) mkdir -p "$2"; echo "{}" > "$2/metrics.jsonl"; echo "{}" > "$2/eval-test.json";;
    esac
    shift
done
echo done
"""


def check(
    tmp_path: Path, *arguments: str, fails: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end, and the commands that it ran."""
    stand_in, calls = tmp_path / "bin" / "python3", tmp_path / "calls"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    calls.write_text("")
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    return done, calls.read_text().splitlines()


def test_a_rehearsal_runs_every_part_and_ends_with_the_summary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, calls = check(tmp_path, "--rehearse", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines()[-8:]]
    parts = ["step_bench", "sigreg_bench", "tests", "train", "eval", "kernels", "views_bench", "loader_bench"]
    assert rows == [[part, "passed"] for part in parts]
    # the step's figures come before everything else
    assert "step_bench.py" in calls[0] and len(calls) == len(parts)
    assert (out / "summary.txt").read_text().splitlines()[1:] == done.stdout.splitlines()[-8:]
    assert (out / "step_bench-fastle-eager.json").exists() and (out / "eval-test.json").exists()


def test_parts_can_be_chosen(tmp_path: Path) -> None:
    done, calls = check(tmp_path, "--rehearse", str(tmp_path / "out"), "sigreg", "step")
    assert done.returncode == 0
    assert ["step_bench" in calls[0], "sigreg_bench" in calls[1], len(calls)] == [True, True, 2]
    done, calls = check(tmp_path, "--rehearse", str(tmp_path / "out"), "sigreg", "speed")
    assert done.returncode == 2 and not calls and "usage: scripts/gpu_check.sh" in done.stderr


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done, calls = check(tmp_path, "--rehearse", str(tmp_path / "out"), fails="sigreg_bench")
    assert done.returncode == 1 and len(calls) == 8
    assert [line for line in done.stdout.splitlines() if "failed (3)" in line and "sigreg_bench" in line]
    # an earlier check's results are gone
    assert not (tmp_path / "out" / "sigreg_bench.json").exists()


@pytest.mark.parametrize("arguments", [[], ["--rehearse"], ["--fast", "out"]], ids=str)
def test_what_it_does_not_know_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    done, calls = check(tmp_path, *arguments)
    assert done.returncode == 2 and not calls and "usage" in done.stderr


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    done, calls = check(tmp_path, str(tmp_path / "out"))
    assert done.returncode == 2 and not calls
    assert done.stderr.strip() == (
        "error: no CUDA GPU that python3's torch can use: RuntimeError: no driver; --rehearse needs none"
    )
