"""What the Triton kernels take of GPUs that need not be there, as compiled for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheels for this machine")
SCRIPT = Path(__file__).parents[1] / "scripts" / "kernel_resources.py"


# 17 is what everybody takes; with 41 a program holds only half of the blocks
@pytest.mark.parametrize("knots", [17, 41])
def test_kernels_spill_nothing(knots: int, tmp_path: Path) -> None:
    # a process of its own: in this one Triton may interpret
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--knots", str(knots), "--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    for row in rows:
        # stack, local memory and spills are what lies in slow memory though it should be in registers
        assert row["stack"] == row["local"] == row["spill_instructions"] == 0, row
        assert 0 < row["registers"] <= 255
    loops = [row["loop_per_angle_and_knot"] for row in rows if "loop_per_angle_and_knot" in row]
    # one sine and one cosine for each (n, m): those alone take some 30 instructions, so 16 times 30 would show
    assert loops and max(loops) < 12
