"""Whole runs on the CPU: what they leave, that a killed run resumes to the same weights, and how they end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import fastle.commands.train
import fastle.training.loop
from fastle.checkpoint import has_checkpoint, latest_checkpoint, load_checkpoint
from fastle.config import ConfigError, RunConfig
from fastle.data import Feed
from fastle.errors import DataError
from fastle.method.model import Autoencoder
from fastle.method.objective import Losses
from fastle.presets import make_config
from fastle.training.loop import Execution, train
from fastle.training.report import read_metrics
from fastle.training.run import RunDirectory
from fastle.training.signals import STOP, Interrupted
from fastle.training.trainer import Trainer
from fastle.training.window import NonFiniteLoss
from tests.training.killing import Killed, kill_after
from tests.training.runs import CPU, STEPS, assert_same, config, go, small_folder, weights

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time would go into its plots and its validation."""
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)


def after_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Trainer, Losses], Losses | None]) -> None:
    """Calls `act` after every step. Losses that it returns take the place of the step's."""
    original = Trainer.__call__

    def call(self: Trainer, images: Tensor) -> Losses:
        losses = original(self, images)
        return act(self, losses) or losses

    monkeypatch.setattr(Trainer, "__call__", call)


def test_what_a_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with its pictures
    output = go(tmp_path / "run", config(steps=45))
    run = tmp_path / "run"
    assert RunConfig.from_dict(json.loads((run / "config.json").read_text())) == config(steps=45)
    rows = read_metrics(run / "metrics.jsonl")
    # every twentieth step, every tenth of the run, and the last
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert rows[-1].keys() >= {
        "total",
        "agreement",
        "sigreg",
        "latent_spread",
        "effective_rank",
        "data_wait",
        "valid_psnr",
    }
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000040.safetensors",
        "step-00000045.safetensors",
    ]
    assert len(list((run / "grids").iterdir())) == 9
    assert Image.open(run / "grids" / "step-00000045.png").height > 2 * 96
    assert (run / "curves.png").exists()
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "starts.jsonl",
        "checkpoints",
        "grids",
        "curves.png",
    }
    assert "12,000 training images" in output and "step 45/45" in output


def test_the_loss_falls(tmp_path: Path) -> None:
    go(tmp_path, config(steps=60, batch_size=16, lr=3e-3))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["total"] < 0.6 * rows[0]["total"]
    assert rows[-1]["valid_psnr"] > rows[0]["valid_psnr"] + 1


@pytest.mark.parametrize(
    "flags",
    [
        {"judge": "ema"},
        {"masked": True, "latent": 8},
        {"objective": "pixel"},
        {"transform": "noise", "precision": "bf16"},
    ],
    ids=["ema", "masked", "pixel", "noise-bf16"],
)
def test_every_objective_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    go(tmp_path / "whole", config(**flags))
    kill_after(7, monkeypatch)
    with pytest.raises(Killed):
        go(tmp_path / "killed", config(**flags))
    go(tmp_path / "killed", config(**flags))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_run_killed_again_and_again_is_as_if_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # more rows than checkpoints, so that some rows have to be dropped
    monkeypatch.setattr(fastle.training.loop, "LOG_EVERY", 1)
    go(tmp_path / "whole")
    # dies in steps 1, 3, 7, 8 and 10: before the first checkpoint, right after one, and between two
    for steps in (1, 3, 5, 2, 4):
        kill_after(steps, monkeypatch)
        with pytest.raises(Killed):
            go(tmp_path / "killed")
    go(tmp_path / "killed")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    whole, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [row["step"] for row in whole] == [row["step"] for row in killed]
    assert [row["total"] for row in whole] == [row["total"] for row in killed]


def test_rows_of_a_gpu_are_seconds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastle.training.loop, "LOG_EVERY", 1)
    gpu, seconds = torch.device("cuda"), fastle.training.loop.seconds_of_window
    assert seconds(SimpleNamespace(device=gpu, world_size=1)) == fastle.training.loop.LOG_SECONDS  # type: ignore[arg-type]
    for device, processes in ((CPU, 1), (gpu, 2)):
        assert seconds(SimpleNamespace(device=device, world_size=processes)) == 0  # type: ignore[arg-type]
    monkeypatch.setattr(fastle.training.loop, "seconds_of_window", lambda trainer: 3600.0)
    monkeypatch.setattr(fastle.training.loop, "REPORTS", 2)
    go(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [STEPS // 2, STEPS]


def test_sigkill_of_the_process(tmp_path: Path) -> None:
    flags = ["shapes", "--batch-size", "4", "--hidden", "8", "--map-channels", "8", "--slices", "8", "--steps", "20"]
    flags += ["--device", "cpu", "--run", str(tmp_path)]
    script = (
        "import fastle.training.run\n"
        "from fastle.commands.train import main\n"
        "fastle.training.run.save_curves = lambda path, rows: None\n"
        "main()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *flags], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "checkpoints").glob("step-*4.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    # whatever it was writing, the newest checkpoint is whole, and the run goes on from it
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path))
    assert 4 <= checkpoint.metadata["step"] <= 20
    fastle.commands.train.main(flags)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(2, 21, 2))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_before_leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    def interrupt(trainer: Trainer, losses: Losses) -> None:
        if trainer.done == 5:
            signal.raise_signal(signum)

    handlers = [signal.getsignal(signum) for signum in (*STOP, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        after_each_step(patch, interrupt)
        with pytest.raises(Interrupted) as stopped:
            go(tmp_path / "run")
    assert stopped.value.signum == signum
    assert latest_checkpoint(tmp_path / "run").name == "step-00000005.safetensors"
    assert [signal.getsignal(signum) for signum in (*STOP, signal.SIGUSR1)] == handlers
    assert "resumed from" in go(tmp_path / "run")
    go(tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_sigusr1_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def look(trainer: Trainer, losses: Losses) -> None:
        if trainer.done == 5:
            signal.raise_signal(signal.SIGUSR1)
        if trainer.done == 6:
            saved.append(latest_checkpoint(tmp_path / "run").name)

    after_each_step(monkeypatch, look)
    output = go(tmp_path / "run")
    assert saved == ["step-00000005.safetensors"]
    assert "SIGUSR1: saving after this step" in output and output.count("saved at step 5") == 1
    assert "done: see" in output


def test_a_signal_while_the_step_is_compiled_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_step(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it goes on")

    monkeypatch.setattr(Trainer, "__call__", compile_step)
    output = io.StringIO()
    with pytest.raises(Interrupted):
        train(config(), tmp_path, Execution(device=CPU, mode="compiled"), console=Console(file=output, width=200))
    assert "SIGTERM: stopping; there is no earlier checkpoint" in output.getvalue()
    assert not has_checkpoint(tmp_path)


def test_a_signal_while_a_batch_is_awaited_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Feed.__iter__

    def batches(self: Feed) -> Iterator[Tensor]:
        for number, batch in enumerate(original(self), start=1):
            if number == 4:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Feed, "__iter__", batches)
    with pytest.raises(Interrupted, match="stopped and saved at step 4"):
        go(tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000004.safetensors"


def test_a_signal_while_the_images_are_opened_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_slowly(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(fastle.training.loop, "open_training", open_slowly)
    with pytest.raises(Interrupted):
        go(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_a_validation_and_the_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def validate_slowly(*_: Any, **__: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr(fastle.training.loop, "validation_psnr", validate_slowly)
        output = io.StringIO()
        console = Console(file=output, width=200)
        # the request is seen after the next step
        with pytest.raises(Interrupted, match="stopped and saved at step 3"):
            train(config(), tmp_path / "run", Execution(device=CPU), console=console)
    go(tmp_path / "run")
    go(tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(trainer: Trainer, losses: Losses) -> Losses:
        return replace(losses, total=losses.total * float("nan")) if trainer.done == 8 else losses

    after_each_step(monkeypatch, spoil)
    with pytest.raises(NonFiniteLoss) as error:
        go(tmp_path)
    message = str(error.value)
    assert "step 8 " in message and re.search(r"total nan, agreement [\d.]+, sigreg [\d.]+", message)
    # it names the last good checkpoint, and nothing later was saved
    assert str(latest_checkpoint(tmp_path)) in message
    assert load_checkpoint(latest_checkpoint(tmp_path)).metadata["step"] == 6


def test_a_diverging_run_says_so_before_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="no earlier checkpoint"):
        go(tmp_path, config(lr=1e30))


def test_an_image_that_goes_bad_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastle.data.images import ArrayImages

    original, calls = ArrayImages.batch, [0]

    def batch(self: ArrayImages, indices: Any) -> Tensor:
        if len(indices) == 4:  # a training batch, not a validation one
            calls[0] += 1
            if calls[0] == 6:
                raise DataError("photo.jpg: does not decode")
        return original(self, indices)

    monkeypatch.setattr(ArrayImages, "batch", batch)
    with pytest.raises(DataError, match=r"photo\.jpg"):
        go(tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run").name == "step-00000005.safetensors"
    go(tmp_path / "run")
    go(tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_validation_image_that_goes_bad_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*_: Any, **__: Any) -> float:
        raise DataError("photo.jpg: does not decode")

    with monkeypatch.context() as patch:
        patch.setattr(fastle.training.loop, "validation_psnr", bad)
        with pytest.raises(DataError, match=r"photo\.jpg"):
            go(tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000002.safetensors"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(trainer: Trainer, losses: Losses) -> None:
        if trainer.done == 8:
            torch.nn.init.constant_(trainer.model.decoder.head.weight, float("inf"))

    after_each_step(monkeypatch, spoil)
    with pytest.raises(NonFiniteLoss, match="after step 8 the weights are not finite") as error:
        go(tmp_path)
    assert str(latest_checkpoint(tmp_path)) in str(error.value)
    assert latest_checkpoint(tmp_path).name == "step-00000006.safetensors"


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    go(tmp_path)
    before = weights(tmp_path)
    assert "nothing left to do" in go(tmp_path)
    assert_same(before, weights(tmp_path))


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    go(tmp_path / "long", config(steps=20))
    go(tmp_path / "run", config(steps=12))
    go(tmp_path / "run", config(steps=20))
    assert_same(weights(tmp_path / "long"), weights(tmp_path / "run"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is at step 20 already, past the 12"):
        go(tmp_path / "run", config(steps=12))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    go(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        go(tmp_path, config(lr=0.5, seed=3))
    assert "train.lr 0.001 → 0.5" in str(refused.value) and "train.seed 0 → 3" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_starts_anew_and_deletes_only_the_runs_files(tmp_path: Path) -> None:
    go(tmp_path, config(steps=20))
    (tmp_path / "notes.txt").write_text("notes")
    go(tmp_path, config(seed=3), overwrite=True)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert (tmp_path / "notes.txt").read_text() == "notes"
    assert latest_checkpoint(tmp_path).name == f"step-{STEPS:08d}.safetensors"


def test_overwrite_with_images_that_are_not_there_loses_nothing(tmp_path: Path) -> None:
    go(tmp_path / "run")
    before = weights(tmp_path / "run")
    missing = make_config("folder", data=tmp_path / "missing", size=32, steps=3)
    with pytest.raises(DataError, match="no such folder"):
        go(tmp_path / "run", missing, overwrite=True)
    assert_same(before, weights(tmp_path / "run"))


def test_images_that_were_added_are_noticed(tmp_path: Path) -> None:
    small = small_folder(tmp_path / "photographs", 26)
    go(tmp_path / "run", small(steps=4))
    Image.new("RGB", (20, 24)).save(tmp_path / "photographs" / "train" / "new.png")
    with pytest.raises(ConfigError, match="were 26 when the run was saved and are 27 now"):
        go(tmp_path / "run", small(steps=4))


def test_a_model_is_loaded_from_a_run(tmp_path: Path) -> None:
    go(tmp_path, config(masked=True, latent=8))
    model = Autoencoder.from_pretrained(tmp_path)
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    z = model.encode(images)
    assert z.shape == (5, 8) and not model.training
    xhat = model.decode(z)
    assert xhat.shape == images.shape and 0 <= xhat.min() and xhat.max() <= 1
    # evaluation mode: an image's code does not depend on its neighbours
    torch.testing.assert_close(model.encode(images[:1]), z[:1])
    assert_same(
        {f"model.{k}": v for k, v in model.state_dict().items()},
        {k: v for k, v in weights(tmp_path).items() if k.startswith("model.")},
    )


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    torch.manual_seed(1)
    go(tmp_path / "a")
    torch.manual_seed(2)
    go(tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    go(tmp_path / "c", config(seed=1))
    assert any(
        not torch.equal(x, y)
        for x, y in zip(weights(tmp_path / "a").values(), weights(tmp_path / "c").values(), strict=True)
    )


def test_draws_differ_from_step_to_step_and_between_ranks() -> None:
    trainer, other = Trainer(config(), CPU), Trainer(config(), CPU, rank=1)
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    first, elsewhere = trainer.draw(images), other.draw(images)
    trainer.done = 1
    second = trainer.draw(images)
    assert torch.equal(first.slices, elsewhere.slices) and not torch.equal(first.slices, second.slices)  # type: ignore[arg-type]
    assert not torch.equal(first.view.top, elsewhere.view.top)
    assert not torch.equal(first.view.top, second.view.top)
