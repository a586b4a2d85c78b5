"""What a trainer refuses to go on from, and a model to be made of: one line that names file and tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastle.checkpoint import CheckpointError, load_checkpoint
from fastle.config import RunConfig
from fastle.method.model import Autoencoder
from fastle.training.memory import OutOfMemory
from fastle.training.trainer import Trainer
from tests.training.saved import CONFIG, CPU, Sections, save, train_two_steps


@pytest.fixture(scope="module")
def trained() -> Trainer:
    return train_two_steps()


def test_its_own_state_is_taken(tmp_path: Path, trained: Trainer) -> None:
    other = Trainer(CONFIG, CPU)
    other.load(load_checkpoint(save(tmp_path, trained)), 2)
    for section, tensors in trained.state().items():
        assert all(torch.equal(tensor, other.state()[section][name]) for name, tensor in tensors.items())


# the last weight, which Muon moves
LAST = len(list(Autoencoder(CONFIG.model).parameters())) - 1
CHANGES: dict[str, tuple[Callable[[Sections], object], str]] = {
    "no model": (lambda s: s.pop("model"), "holds no model.encoder"),
    "no optimizer": (lambda s: s.pop("optimizer"), "holds no optimizer.0.step"),
    "a weight less": (lambda s: s["model"].pop("decoder.head.bias"), "holds no model.decoder.head.bias"),
    "a weight more": (lambda s: s["model"].update(x=torch.ones(1)), "holds model.x, of which this run knows nothing"),
    "a section more": (lambda s: s.update(judge={"x": torch.ones(1)}), "holds judge.x, of which"),
    "another shape": (
        lambda s: s["model"].update({"decoder.head.bias": torch.ones(2)}),
        "holds model.decoder.head.bias of shape (2,), not (1,)",
    ),
    "another type": (
        lambda s: s["model"].update({"decoder.head.bias": torch.ones(1, dtype=torch.float64)}),
        "holds model.decoder.head.bias as torch.float64, not torch.float32",
    ),
    "odd key": (lambda s: s["optimizer"].update({"0.step.x": torch.ones(1)}), "holds optimizer.0.step.x, of which"),
    "odd index": (lambda s: s["optimizer"].update({"x.step": torch.ones(1)}), "holds optimizer.x.step, of which"),
    "far index": (lambda s: s["optimizer"].update({"99.step": torch.ones(1)}), "holds optimizer.99.step, of which"),
    "moment of another shape": (
        lambda s: s["optimizer"].update({"0.exp_avg": torch.ones(7)}),
        "holds optimizer.0.exp_avg of shape (7,), not (4,)",
    ),
    "moment of another rank": (
        # copy_ would repeat it
        lambda s: s["optimizer"].update({"0.exp_avg": torch.ones(())}),
        "holds optimizer.0.exp_avg of shape (), not (4,)",
    ),
    "momentum of another shape": (
        lambda s: s["optimizer"].update({f"{LAST}.exp_avg": torch.ones(7)}),
        f"holds optimizer.{LAST}.exp_avg of shape (7,), not (",
    ),
    "squares of what Muon moves": (
        lambda s: s["optimizer"].update({f"{LAST}.exp_avg_sq": torch.ones(7)}),
        f"holds optimizer.{LAST}.exp_avg_sq, of which",
    ),
    "negative steps": (lambda s: s["optimizer"].update({"0.step": torch.tensor(-1.0)}), "holds optimizer.0.step -1"),
    "steps to come": (lambda s: s["optimizer"].update({"0.step": torch.tensor(1e9)}), "holds optimizer.0.step 1e+09"),
    "negative squares": (
        lambda s: s["optimizer"].update({"0.exp_avg_sq": -torch.ones(4)}),
        "holds a negative square in optimizer.0.exp_avg_sq",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_state_is_refused_before_anything_is_restored(name: str, tmp_path: Path, trained: Trainer) -> None:
    change, message = CHANGES[name]
    path = save(tmp_path, trained, change)
    other = Trainer(CONFIG, CPU)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        other.load(load_checkpoint(path), 2)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert other.done == 0 and not other.optimizer.state


def config_of(**train: Any) -> RunConfig:
    return replace(CONFIG, train=replace(CONFIG.train, **train))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, trained: Trainer) -> None:
    checkpoint = load_checkpoint(save(tmp_path, trained))
    Trainer(config_of(steps=50), CPU).check(checkpoint)
    with pytest.raises(CheckpointError, match=r"saved by another run .*\(train\.seed 0 → 1\)"):
        Trainer(config_of(seed=1), CPU).check(checkpoint)
    with pytest.raises(CheckpointError, match=r"saved by another run .*\(train\.optimizer muon → adamw\)"):
        Trainer(config_of(optimizer="adamw"), CPU).check(checkpoint)
    # what is measured must be of the model and the images that config.json names
    values = CONFIG.to_dict()
    values["train"]["lr"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"train\.lr 0\.001 → 0\.5"):
        Autoencoder.from_pretrained(tmp_path)


def test_a_model_is_made_of_the_newest_good_checkpoint_with_a_warning(tmp_path: Path, trained: Trainer) -> None:
    old = save(tmp_path, trained, step=3)
    new = save(tmp_path, trained, lambda s: s["model"].pop("decoder.head.bias"), step=4)
    with pytest.warns(UserWarning, match=f"{new} holds no model.decoder.head.bias: {old.name} is used instead"):
        model = Autoencoder.from_pretrained(tmp_path)
    assert torch.equal(model.encoder.stem.weight, trained.model.encoder.stem.weight)
    new.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Autoencoder.from_pretrained(tmp_path)


def test_a_giant_model_of_a_file_is_not_allocated(tmp_path: Path, trained: Trainer) -> None:
    path = save(tmp_path, trained)
    values = CONFIG.to_dict()
    values["model"]["latent"] = 2**31
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"model\.latent 6 → 2147483648"):
        Autoencoder.from_pretrained(tmp_path)
    # a checkpoint of a version that did not say what it is of
    tensors = {f"model.{name}": value.contiguous() for name, value in trained.model.state_dict().items()}
    save_file(tensors, path, {"fastle": json.dumps({"step": 2, "train_images": 5})})
    with pytest.raises(CheckpointError, match=r"holds model\.\S+ of shape \S+ \S+ not \(2147483648"):
        Autoencoder.from_pretrained(tmp_path)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made() -> None:
    giant = replace(CONFIG, model=replace(CONFIG.model, latent=2**31))
    with pytest.raises(
        OutOfMemory, match=r"the model's [0-9,]+ weights, .* take 1202.6 GB, .* are free; give a smaller --latent"
    ):
        Trainer(giant, CPU)
