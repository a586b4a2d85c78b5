"""What the Triton kernels take of GPUs that need not be there, as compiled for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has no wheels for this machine")
SCRIPT = Path(__file__).parents[2] / "scripts" / "kernel_resources.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # a process of its own: in this one Triton may interpret
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path_factory.mktemp("resources") / "report.json"
    # 17 is what everybody takes; with 41 a program holds only half of the blocks
    command = [sys.executable, str(SCRIPT), "--knots", "17", "41", "--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    return found


def test_kernels_spill_nothing(rows: list[dict[str, Any]]) -> None:
    for operator in ("sigreg", "views"):
        architectures = {row["architecture"] for row in rows if row["operator"] == operator}
        assert architectures == {"sm_80", "sm_90", "gfx942"}
    for row in rows:
        # stack, local memory and spills are what lies in slow memory though it should be in registers
        assert row["stack"] == row["local"] == row["spill_instructions"] == 0, row
        assert 0 < row["registers"] <= 255


def test_sigreg_takes_one_sine_and_cosine_for_each_sample_and_slice(rows: list[dict[str, Any]]) -> None:
    loops = [row["loop_per_angle_and_knot"] for row in rows if "loop_per_angle_and_knot" in row]
    # those alone take some 30 instructions, so 16 times 30 would show
    assert loops and max(loops) < 12


def test_nothing_is_added_atomically(rows: list[dict[str, Any]]) -> None:
    counts = [row["atomics"] for row in rows if row["architecture"] != "gfx942"]
    assert counts and not any(counts)
