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
import fastle.training.run
from fastle.commands.train import main
from fastle.training.trainer import Trainer
fastle.training.loop.VALIDATION_IMAGES = 16
fastle.training.run.RunDirectory.save_pictures = lambda *_: None
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
    flags = ["shapes", "--batch-size", "8", "--hidden", "8", "--map-channels", "8", "--slices", "8", "--device", "cpu"]
    flags += ["--run", str(out / "run"), *arguments]
    return subprocess.Popen(
        [*command, *flags], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_ranks_train_one_model_stop_on_sigterm_and_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(tmp_path, "--steps", "100000")
    while not (run / "metrics.jsonl").exists() or not read_metrics(run / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    stopped = load_checkpoint(latest_checkpoint(run)).metadata["step"]
    assert f"stopped and saved at step {stopped}" in output
    # ranks agree to stop when a row of metrics is due
    assert stopped % 20 == 0

    steps = stopped + 3
    process = torchrun(tmp_path, "--steps", str(steps))
    resumed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, resumed
    # rank 0 alone speaks
    assert output.count("12,000 training images") == resumed.count("12,000 training images") == 1
    assert resumed.count("resumed from") == 1
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
    checkpoint = load_checkpoint(latest_checkpoint(run))
    assert checkpoint.metadata["step"] == steps
    assert any(torch.equal(ranks[0][0], value) for value in checkpoint.section("model").values())
    rows = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert rows[0] == 20 and rows == sorted(set(rows)) and rows[-1] == steps
