"""Loggers beside metrics.jsonl: what they get, and that a training survives them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastle.training.loop
from fastle.extras import MissingExtra
from fastle.fitting import fit
from fastle.training.loggers import GuardedLogger
from fastle.training.report import read_metrics
from tests.training.runs import config

Calls = list[tuple[str, dict[str, Any]]]
# what fastle calls, with the parameters that it gives
TRACKIO = {"init": "project name config resume", "log": "metrics step", "finish": "", "Image": "value"}
WANDB = {"init": "project dir id name config resume", "Image": "data_or_path"}
WANDB_RUN = {"log": "data step", "finish": ""}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)


def stub(names: dict[str, str], calls: Calls) -> ModuleType:
    """A module whose functions take these parameters alone, and note their calls."""
    module = ModuleType("stub")
    for name, parameters in names.items():
        setattr(module, name, _noting(module, name, parameters.split(), calls))
    return module


def _noting(module: ModuleType, name: str, parameters: list[str], calls: Calls) -> Callable[..., ModuleType]:
    kinds = [inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters]
    signature = inspect.Signature(kinds)

    def function(*args: Any, **kwargs: Any) -> ModuleType:
        calls.append((name, dict(signature.bind(*args, **kwargs).arguments)))
        return module

    return function


def test_tensorboard_gets_the_rows_and_the_grids(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 3):
        # the second continues the first
        fit(config(steps=steps), run=tmp_path, device="cpu", log="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = {row["step"]: row["valid_psnr"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert {event.step: pytest.approx(event.value) for event in events.Scalars("valid_psnr")} == rows
    assert max(rows) == 3 and len(events.Images("grid")) == len(rows)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_services_get_the_rows_and_the_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: Calls = []
    monkeypatch.setitem(sys.modules, name, stub(TRACKIO if name == "trackio" else WANDB | WANDB_RUN, calls))
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for steps in (2, 3):
        fit(config(steps=steps), run=tmp_path / "mine", device="cpu", log=name)  # type: ignore[arg-type]
    data = "metrics" if name == "trackio" else "data"
    logged = {call["step"]: call[data]["valid_psnr"] for what, call in calls if what == "log" and "total" in call[data]}
    assert logged == {row["step"]: row["valid_psnr"] for row in read_metrics(tmp_path / "mine" / "metrics.jsonl")}
    assert sum(what == "log" and "grid" in call[data] for what, call in calls) == len(logged)
    assert [what for what, _ in calls].count("finish") == 2
    # the run that goes on is the same run to the service
    first, second = (call for what, call in calls if what == "init")
    assert first["name"] == second["name"] and first.get("id") == second.get("id")
    assert first["project"] == "fastle" and first["config"]["batch_size"] == 4


def test_the_variables_of_wandb_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub(WANDB | WANDB_RUN, calls))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_NAME", "first try")
    GuardedLogger("wandb", print).begin(tmp_path, {}, 0)
    ((_, began),) = calls
    assert (began["project"], began["name"]) == ("ours", "first try")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_logger_that_fails_says_so_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    module = stub(TRACKIO, [])

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    setattr(module, fails, fail)
    monkeypatch.setitem(sys.modules, "trackio", module)
    result = fit(config(steps=3), run=tmp_path, device="cpu", log="trackio")
    assert result.metrics[-1]["step"] == 3
    said = capsys.readouterr().err
    assert said.count("--log trackio has failed, and the run goes on without it (no route)") == 1


def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r'--log wandb needs wandb, .*: pip install "fastle\[wandb\]"'):
        fit(config(steps=2), run=tmp_path / "run", device="cpu", log="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("where", "names"), [("trackio", TRACKIO), ("wandb", WANDB), ("wandb.sdk.wandb_run.Run", WANDB_RUN)]
)
def test_the_stubs_take_what_the_packages_take(where: str, names: dict[str, str]) -> None:
    package, *inner = where.split(".sdk.")
    pytest.importorskip(package)
    holder: Any = importlib.import_module(where.removesuffix(".Run"))
    holder = holder.Run if inner else holder
    for name, parameters in names.items():
        taken = inspect.signature(getattr(holder, name)).parameters
        assert set(parameters.split()) <= set(taken), name
        needed = {p.name for p in taken.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        assert needed <= {"self", *parameters.split()}, name
