"""Two processes under torchrun on the CPU: one run, written once, with the gradients of the whole batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.training.report import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

# each rank saves what it ends with; a test compares them
RANK = """
import os, sys, torch
from pathlib import Path
import fastle.training.loop
from fastle.commands.train import main
from fastle.training.trainer import Trainer
fastle.training.loop.VALIDATION_IMAGES = 16
trainers = []
original = Trainer.__init__
def init(self, *arguments, **more):
    original(self, *arguments, **more)
    trainers.append(self)
Trainer.__init__ = init
out = Path(sys.argv.pop(1))
main()
torch.save([p.detach() for p in trainers[0].model.parameters()], out / f"rank{os.environ['RANK']}.pt")
"""


def torchrun(out: Path, *arguments: str) -> subprocess.Popen[str]:
    script = out / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        # or torchrun takes --run for an abbreviation of its own --run-path
        "--",
        str(script),
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ["shapes", "--batch-size", "8", "--slices", "8", "--device", "cpu", "--run", str(out / "run"), *arguments]
    return subprocess.Popen(
        [*command, *flags], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_ranks_train_one_model_and_resume(tmp_path: Path) -> None:
    for steps in ("3", "6"):
        process = torchrun(tmp_path, "--steps", steps)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        # rank 0 alone speaks
        assert output.count("12,000 training images") == 1
    assert "resumed from" in output
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert checkpoint.metadata["step"] == 6
    assert any(torch.equal(ranks[0][0], value) for value in checkpoint.section("model").values())
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_sigterm_ends_both_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "--steps", "100000")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped and saved at step" in output
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).metadata["step"] % 20 == 0
