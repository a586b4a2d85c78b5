"""The Triton kernels' registers, spills and instructions, as compiled for GPUs that this machine need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton has no wheels for this machine")
# what a compiler is known to spill: (triton, architecture, kernel) → (bytes of stack, instructions)
KNOWN = {("3.6.0", "sm_90", "mask_fill, channels-last"): (8, 2)}
SCRIPT = Path(__file__).parents[2] / "scripts" / "kernel_resources.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # in a separate process, because Triton may run its interpreter in this one
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path_factory.mktemp("resources") / "report.json"
    # one architecture stands for all that the script compiles for by default
    command = [sys.executable, str(SCRIPT), "--architectures", "sm_90", "--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report_rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    return report_rows


def test_kernels_spill_nothing(rows: list[dict[str, Any]]) -> None:
    for operator in ("sigreg", "products", "views", "halving_conv"):
        architectures = {row["architecture"] for row in rows if row["operator"] == operator}
        assert architectures == {"sm_90"}
    for row in rows:
        # each counts values in slow memory that should be in registers
        stack, spills = KNOWN.get((triton.__version__, row["architecture"], row["kernel"]), (0, 0))
        assert (row["stack"], row["local"], row["spill_instructions"]) == (stack, 0, spills), row
        assert 0 < row["registers"] <= 255


def test_sigreg_computes_one_sine_and_cosine_for_each_sample_and_slice(rows: list[dict[str, Any]]) -> None:
    loops = [row["loop_per_angle_and_knot"] for row in rows if "loop_per_angle_and_knot" in row]
    # one pair takes about 30 instructions, so a pair for each knot would exceed this
    assert loops and max(loops) < 12


def test_sigreg_leaves_fp64_and_barriers_alone(rows: list[dict[str, Any]]) -> None:
    # fp64 has 1/64 of the speed on consumer GPUs, and a thread that has a slice to itself waits for no other
    ours = [row for row in rows if row["operator"] == "sigreg"]
    assert ours and not any(row["fp64_instructions"] for row in ours)
    assert not any(row["barriers"] for row in ours if "many splits" not in row["kernel"])


def test_what_sigreg_executes(rows: list[dict[str, Any]]) -> None:
    # 58.8 million for 256 tests of 128 samples and 256 slices (60.2 by Triton 3.6), of which 50 are for the angles; it
    # was 207
    assert 50e6 < sum(row.get("executed", 0) for row in rows) < 62e6


def test_nothing_is_added_atomically(rows: list[dict[str, Any]]) -> None:
    counts = [row["atomics"] for row in rows]
    assert counts and not any(counts)
