"""fastle check: what is damaged is named, what can be saved is said, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastle.checkpoint import CheckpointError, read_run_config
from fastle.commands.main import main
from fastle.config import ConfigError
from fastle.data import Loading, open_images
from fastle.data.cache import cache_folder
from fastle.training.check import Verdict, check_run, restore_config
from fastle.training.report import append_metrics, save_grid
from fastle.training.trainer import Trainer
from tests.data.caches import config as folder_config
from tests.data.caches import write_splits
from tests.training.runs import config, go
from tests.training.saved import CONFIG, save, train_two_steps


@pytest.fixture(scope="module")
def trained() -> Trainer:
    return train_two_steps()


@pytest.fixture
def run(tmp_path: Path, trained: Trainer) -> Path:
    path = tmp_path / "run"
    for step in (2, 3):
        save(path, trained, step=step)
        append_metrics(path / "metrics.jsonl", {"step": step, "total": 1.0})
    save_grid(path / "grids" / "step-00000003.png", [("input", torch.zeros(2, 1, 16, 16))])
    (path / "eval-test.json").write_text("{}")
    return path


def faults(verdict: Verdict, run: Path) -> dict[str, str]:
    return {str(found.file.relative_to(run)): found.says for found in verdict.findings if not found.good}


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    main(["check", str(run)])
    said = capsys.readouterr().out
    assert "DAMAGED" not in said and said.endswith("the run can go on from step 3: run the same command again\n")
    assert "good     metrics.jsonl: 2 rows to step 3" in said and "checkpoints/step-00000002.safetensors" in said
    assert contents(run) == before


def test_every_damaged_file_is_named_with_what_can_be_saved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, picture = run / "checkpoints" / "step-00000003.safetensors", run / "grids" / "step-00000003.png"
    # the optimizer comes last
    flip(newest, -1)
    flip(picture, picture.stat().st_size // 2)
    (run / "metrics.jsonl").write_bytes(b"?\n" + (run / "metrics.jsonl").read_bytes())
    (run / "eval-test.json").write_text("{")
    before = contents(run)
    found = faults(check_run(run, Loading()), run)
    assert found.keys() == {str(path.relative_to(run)) for path in (newest, picture)} | {
        "metrics.jsonl",
        "eval-test.json",
    }
    assert "the checksum of optimizer is wrong" in found[str(newest.relative_to(run))]
    assert "its model is good" in found[str(newest.relative_to(run))]
    assert found["metrics.jsonl"] == "2 rows to step 3, and 1 lines that cannot be read, the first of them line 1"
    with pytest.raises(SystemExit) as end:
        main(["check", str(run)])
    assert end.value.code == (
        f"fastle: error: {run}: damaged files: 4; the run can go on from step 2: run the same command again"
    )
    assert capsys.readouterr().out.count("DAMAGED") == 4 and contents(run) == before


def test_a_configuration_is_restored_from_a_checkpoint(run: Path) -> None:
    (run / "config.json").write_text('{"model": ')
    with pytest.raises(SystemExit, match=f"`fastle check {run} --restore-config` writes config.json anew") as end:
        main(["check", str(run)])
    assert "\n" not in str(end.value.code)
    main(["check", str(run), "--restore-config"])
    assert read_run_config(run) == CONFIG
    assert (run / "config.json.damaged").read_text() == '{"model": '
    with pytest.raises(CheckpointError, match="nothing to restore"):
        restore_config(run, check_run(run, Loading()))


def test_a_configuration_that_no_checkpoint_is_of_is_the_damaged_one(run: Path) -> None:
    damaged = (run / "config.json").read_text().replace('"slices": 8', '"slices": 9')
    (run / "config.json").write_text(damaged)
    with pytest.raises(ConfigError, match=rf"slices 9 → 8\): `fastle check {run} --restore-config` writes it anew"):
        go(run, CONFIG)
    with pytest.raises(SystemExit, match=f"`fastle check {run} --restore-config` writes config.json anew"):
        main(["check", str(run)])
    main(["check", str(run), "--restore-config"])
    assert read_run_config(run) == CONFIG and (run / "config.json.damaged").read_text() == damaged
    # another configuration than the run's is another thing
    with pytest.raises(ConfigError, match="give the former values to continue it, another --run"):
        go(run, config(slices=10))


def test_a_run_of_which_nothing_is_left(run: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="damaged files: 2; no checkpoint can be used"):
        main(["check", str(run)])
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"neither config\.json nor checkpoints"):
        main(["check", str(run)])


def test_the_cache_of_its_images_is_checked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = folder_config(write_splits(tmp_path / "images", 5))
    open_images(data, "train", Loading(decoder="torchvision", cache="disk"))
    values = json.loads((run / "config.json").read_text())
    values["data"] = {"dataset": "folder", "root": data.root, "size": 16, "channels": 3, "bad_images": "error"}
    values["model"]["channels"] = 3
    (run / "config.json").write_text(json.dumps(values))
    # they are of another run
    shutil.rmtree(run / "checkpoints")
    (cache,) = cache_folder().glob("*.safetensors")
    (found,) = (finding for finding in check_run(run, Loading()).findings if finding.file == cache)
    assert found.good and found.says == "5 images"
    flip(cache, 5000)
    (found,) = (finding for finding in check_run(run, Loading()).findings if finding.file == cache)
    assert not found.good and found.says == "block 0; the next run builds it anew"
