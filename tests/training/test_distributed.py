"""Two processes under torchrun on the CPU: one run, written once, with the gradients of the whole batch."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastle.training.loop
from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.data.order import batch_indices
from fastle.presets import make_config
from fastle.training.loop import Execution, train
from fastle.training.report import read_metrics
from fastle.training.run import RunDirectory

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

# each rank saves what it ends with; a test compares them
RANK = """
import os, sys, torch
from pathlib import Path
import fastle.training.loop
import fastle.training.run
from fastle.commands.train import main
from fastle.data.images import ArrayImages
from fastle.training.trainer import Trainer
fastle.training.loop.VALIDATION_IMAGES = 16
fastle.training.run.RunDirectory.save_pictures = lambda *_: None
trainers = []
original = Trainer.__init__
def init(self, *arguments, **more):
    original(self, *arguments, **more)
    trainers.append(self)
Trainer.__init__ = init
batches = []
read = ArrayImages.batch
def batch(self, indices):
    if len(indices) == 4:
        batches.append(list(indices))
    return read(self, indices)
ArrayImages.batch = batch
out = Path(sys.argv.pop(1))
(out / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))
main()
weights = [p.detach() for p in trainers[0].model.parameters()]
torch.save({"weights": weights, "batches": batches}, out / f"rank{os.environ['RANK']}.pt")
"""


def torchrun(out: Path, *arguments: str, looks_every: float = 0.1) -> subprocess.Popen[str]:
    script = out / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--monitor-interval={looks_every}",
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


def await_first_row(process: subprocess.Popen[str], run: Path) -> None:
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or not read_metrics(run / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_two_ranks_go_on_where_one_has_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    config = make_config("shapes", steps=3, batch_size=8, slices=8, hidden=8, map_channels=8)
    train(config, tmp_path / "run", Execution(device=torch.device("cpu")), console=Console(file=io.StringIO()))
    process = torchrun(tmp_path, "--steps", "6")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    # rank 0 alone speaks
    assert output.count("12,000 training images") == 1 and output.count("resumed from") == 1
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*(rank["weights"] for rank in ranks), strict=True))
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert checkpoint.metadata["step"] == 6
    assert any(torch.equal(ranks[0]["weights"][0], value) for value in checkpoint.section("model").values())
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    # together the two had the batches that one would have had
    together = [left + right for left, right in zip(*(sorted_by_step(rank["batches"]) for rank in ranks), strict=True)]
    alone = [
        batch_indices(12_000, step=step, batch_size=8, seed=0, rank=0, world_size=1).tolist() for step in (3, 4, 5)
    ]
    assert together == alone


def sorted_by_step(batches: list[list[int]]) -> list[list[int]]:
    """The batches of a rank in the order of their steps, 3 to 5, whichever thread of the feed was first."""
    first_of = [
        batch_indices(12_000, step=step, batch_size=8, seed=0, rank=0, world_size=1).tolist() for step in (3, 4, 5)
    ]
    return sorted(batches, key=lambda batch: next(i for i, whole in enumerate(first_of) if batch[0] in whole))


def test_a_killed_rank_is_said_once(tmp_path: Path) -> None:
    # rank 0 shall miss the other before torchrun does, which would only stop it
    process = torchrun(tmp_path, "--steps", "100000", looks_every=2.0)
    await_first_row(process, tmp_path / "run")
    os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if "fastle-train" in line and "error:" in line]
    assert len(lines) == 1, output
    assert "another rank is gone; there is no earlier checkpoint: run the same command again" in lines[0]
    # torchrun has a traceback of its own
    assert output.count("Traceback") == 1 and "gloo" not in output
    assert "locked" not in output and not (tmp_path / "run" / "fastle.lock").exists()


def test_sigterm_ends_both_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "--steps", "100000")
    await_first_row(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "stopped and saved at step" in output
    # the steps that both had taken, and no more than they take in the second between two agreements
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).metadata["step"] >= 20


def test_a_rank_that_waits_for_one_that_never_comes_says_so(tmp_path: Path) -> None:
    code = "from fastle import fitting; from fastle.commands import train; fitting.MEETING_SECONDS = 1.0; "
    code += "train.main(['shapes', '--device', 'cpu'])"
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=os.environ | where,
        capture_output=True,
        text=True,
        timeout=600,
    )
    line = "fastle-train (rank 0): error: the 2 processes have not met within 1 s: start all of them again\n"
    assert (ended.returncode, ended.stderr) == (1, line)
