"""The run directory: what it refuses, and that no run is lost, mixed up with another or written by two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

import fastle.training.loop
from fastle.checkpoint import CheckpointError, has_checkpoint, latest_checkpoint
from fastle.config import ConfigError, RunConfig
from fastle.errors import FastleError
from fastle.method.objective import Losses
from fastle.presets import make_config
from fastle.training import lock
from fastle.training.lock import RunLock, RunLocked
from fastle.training.report import read_metrics
from fastle.training.run import MOVING, REPLACED, RunDirectory
from fastle.training.trainer import Trainer
from fastle.training.window import NonFiniteLoss
from tests.training.killing import Killed, kill_after
from tests.training.runs import STEPS, assert_same, config, go, small_folder, weights

RUN_OF_0_1 = Path(__file__).parents[1] / "data_files" / "run-of-0.1"
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "curves.png", "checkpoints/mine", "grids/mine", "eval-mine.json"]
)
def test_files_of_others_are_refused_and_stay(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"data": 1, "model": {}, "objective": [], "train": null}')
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"{Path(name).parts[0]}, which no run of fastle wrote"):
        go(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_config_that_is_not_json_is_a_stranger(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b"[" * 100_000, b'"fastle run"'):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match="no run of fastle"):
            go(tmp_path)


def test_files_beside_a_run_s_are_no_strangers(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("of the shell")
    go(tmp_path, config(steps=1))
    assert json.loads((tmp_path / "config.json").read_bytes())["format"] == "fastle run"
    assert (tmp_path / "log.txt").read_text() == "of the shell"


def test_a_run_of_an_earlier_version_is_known_as_one(tmp_path: Path) -> None:
    shutil.copytree(RUN_OF_0_1, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run with another configuration .*give the former values"):
        go(tmp_path / "run")
    go(tmp_path / "run", config(steps=1), overwrite=True)
    assert latest_checkpoint(tmp_path / "run").name == "step-00000001.safetensors"


def test_a_run_that_is_a_file_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run .*file is a file: give a directory"):
        go(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot write to .*Not a directory; give another --run"):
        go(tmp_path / "file" / "run")


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FastleError, match="no such folder"):
        go(tmp_path / "run", make_config("folder", data=tmp_path / "missing", size=32, steps=3))
    assert not (tmp_path / "run").exists()


def test_checks_come_before_overwriting(tmp_path: Path) -> None:
    go(tmp_path, config(steps=1))
    before = contents(tmp_path)
    with pytest.raises(FastleError, match="cannot be divided among 3 ranks"):
        go(tmp_path, config(batch_size=8), overwrite=True, world_size=3)
    with pytest.raises(FastleError, match="does not divide into --accumulate 4 equal parts on each of 2 processes"):
        go(tmp_path, config(batch_size=12, accumulate=4), overwrite=True, world_size=2)
    with pytest.raises(FastleError, match="leaves one image to some"):
        go(tmp_path, config(batch_size=4), overwrite=True, world_size=4)
    with pytest.raises(FastleError, match="do not fill a batch"):
        go(tmp_path, config(batch_size=20_000), overwrite=True)
    assert contents(tmp_path) == before


def test_a_second_process_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    go(tmp_path, config(steps=1))
    first = RunLock(tmp_path, print)
    first.acquire()
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(RunLocked, match=f"being written by process {os.getpid()} on "):
            go(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_run_is_locked_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def look(trainer: Trainer) -> None:
        with pytest.raises(RunLocked):
            RunLock(tmp_path, print).acquire()
        refused.append(trainer.done)

    at_each_step(monkeypatch, look)
    go(tmp_path, config(steps=2))
    assert refused == [1, 2] and not (tmp_path / lock.NAME).exists()


def at_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Trainer], object]) -> None:
    original = Trainer.__call__

    def call(self: Trainer, images: Tensor) -> Losses:
        losses = original(self, images)
        act(self)
        return losses

    monkeypatch.setattr(Trainer, "__call__", call)


def test_the_old_run_stays_until_the_new_one_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    go(run, config(steps=2))
    (run / "eval-test.json").write_text("{}")
    old = contents(run)
    held = []

    def look(trainer: Trainer) -> None:
        held.append(contents(run / REPLACED) == old if (run / REPLACED).exists() else None)

    at_each_step(monkeypatch, look)
    monkeypatch.setattr(fastle.training.loop, "REPORTS", 1)
    go(run, config(steps=3, seed=1), overwrite=True)
    assert held == [True, True, True]
    # figures of the old run do not lie beside the new one
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "starts.jsonl",
    ]
    assert RunConfig.from_dict(json.loads((run / "config.json").read_bytes())).train.seed == 1


def test_a_new_run_that_comes_to_nothing_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path, config(steps=2))
    old = contents(tmp_path)
    with pytest.raises(NonFiniteLoss):
        go(tmp_path, config(lr=1e30), overwrite=True)
    assert contents(tmp_path) == old
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        go(tmp_path, config(seed=1), overwrite=True)
    assert contents(tmp_path) == old
    # and one that is saved stays
    monkeypatch.setattr(fastle.training.loop, "REPORTS", 3)
    kill_after(6, monkeypatch)
    with pytest.raises(Killed):
        go(tmp_path, config(seed=1), overwrite=True)
    assert latest_checkpoint(tmp_path).name == "step-00000004.safetensors"


@pytest.mark.parametrize("moved", range(6))
def test_overwriting_that_was_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    run = tmp_path / "run"
    go(run, config(steps=2))
    old = contents(run)
    original, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] > moved:
            raise Killed
        return original(self, target)

    # nothing is cleaned up after SIGKILL
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "__exit__", lambda self, *_: self._lock.release())
        patch.setattr(Path, "rename", rename)
        kill_after(1, patch)
        with pytest.raises(Killed):
            go(run, config(seed=1), overwrite=True)
    assert (run / MOVING).exists() or (run / REPLACED).exists()
    output = go(run, config(steps=2))
    assert "nothing left to do" in output
    assert ("holds the run before again" in output) == (moved == 5)
    assert contents(run) == old


def test_what_is_left_of_the_old_run_goes_once_the_new_one_is_saved(tmp_path: Path) -> None:
    go(tmp_path, config(steps=2))
    (tmp_path / REPLACED / "checkpoints").mkdir(parents=True)
    go(tmp_path, config(steps=2))
    assert not (tmp_path / REPLACED).exists() and has_checkpoint(tmp_path)


def test_a_directory_that_is_deleted_in_mid_run_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path / "whole", config(steps=STEPS))
    run = tmp_path / "deep" / "run"

    def delete(trainer: Trainer) -> None:
        if trainer.done == 5:
            shutil.rmtree(run.parent)

    at_each_step(monkeypatch, delete)
    # step 6 has a row of metrics, and no report
    monkeypatch.setattr(fastle.training.loop, "REPORTS", 1)
    monkeypatch.setattr(fastle.training.loop, "LOG_EVERY", 2)
    saved = []
    at_each_step(monkeypatch, lambda trainer: saved.append(has_checkpoint(run)))
    output = go(run)
    assert output.count(f"{run} has been deleted in mid-run") == 1
    assert saved.index(True) == 6, "saved at once"
    assert_same(weights(tmp_path / "whole"), weights(run))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [6, 8, 10, 12]
    assert "nothing left to do" in go(run) and not (run / lock.NAME).exists()


def test_a_deleted_directory_that_is_another_s_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(trainer: Trainer) -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        RunLock(tmp_path, print).acquire()

    at_each_step(monkeypatch, take)
    with pytest.raises(RunLocked):
        go(tmp_path)


def test_other_images_are_noticed_and_may_be_accepted(tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    small = small_folder(photographs, 40)
    run = tmp_path / "run"
    go(run, small(steps=2))
    photographs.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(photographs)
    go(run, small(steps=3))
    # as many, and of the same sizes
    file = sorted((photographs / "train").iterdir())[3]
    file.rename(file.with_name("another.png"))
    before = contents(run)
    with pytest.raises(ConfigError, match=r"are as many as before, 40, but their names have changed: .*--accept-new-d"):
        go(run, small(steps=4))
    assert contents(run) == before
    assert "on other images: they are as many as before" in go(run, small(steps=4), accept_new_data=True)
    # from then on they are the run's
    go(run, small(steps=5))
    Image.effect_noise((20, 24), 90).convert("RGB").save(file.with_name("another.png"))
    with pytest.raises(ConfigError, match="sizes of the files have changed"):
        go(run, small(steps=6))


def test_a_checkpoint_of_an_earlier_version_knows_the_number_of_images(tmp_path: Path) -> None:
    from fastle.data import Identity
    from fastle.training.run import _change_of_images

    now = Identity(12, "names", "sizes")
    assert _change_of_images({"train_images": 12}, now) is None
    assert _change_of_images({"train_images": 13}, now) == "were 13 when the run was saved and are 12 now"
