"""The table of results: every row is a valid run, and an interrupted table continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.reproduce import measure, rows
from bench.reproduce.report import markdown
from bench.reproduce.rows import ROWS, SCALES, ScaleName, make_plan, pick_rows, same_settings
from fastle.config import ConfigError, IdentityConfig, RunConfig
from fastle.presets import make_config
from fastle.training.loop import Execution, train
from fastle.training.window import NonFiniteLoss
from scripts import reproduce

IMAGES = {"train": 38, "valid": 2, "test": 24}
TINY = replace(SCALES["small"], hidden=8, batch_size=8, rates=(1e-3, 2e-3), hole_rates=(1e-3, 2e-3), probe_images=30)
SCALE_NAMES: tuple[ScaleName, ...] = ("small", "full")
Command = Callable[..., int]


@pytest.fixture
def command(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the script at a tiny scale, as a trial of four steps."""
    monkeypatch.setitem(SCALES, "small", TINY)

    def run(*arguments: object) -> int:
        folders = ("--data", photographs, "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--device", "cpu")
        return reproduce.main([str(word) for word in (*folders, "--steps", 4, "--rows", *arguments)])

    return run


def result(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out" / "small-trial-4.json").read_text())
    return report


@pytest.mark.parametrize("scale", SCALE_NAMES)
def test_every_row_is_a_valid_run(scale: ScaleName) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    plans = {row.name: make_plan(row, scale, data=Path("photographs"), images=IMAGES) for row in ROWS}
    for plan in plans.values():
        for rate in plan.rates:
            config = plan.run(rate, 1, 7)
            assert (config.train.lr, config.train.seed, config.train.steps) == (rate, 1, 7)
        assert same_settings(plan.settings(), json.loads(json.dumps(plan.settings())))
    spatial = [plan for plan in plans.values() if plan.row.group == "photographs"]
    # they differ in the objective and the optimizer, and in nothing else
    trained = [(plan.config, replace(plan.config.train, optimizer="adamw"), plan.rates) for plan in spatial]
    assert len({(config.model, train, config.data, rates) for config, train, rates in trained}) == 1
    assert len({(config.objective, config.train.optimizer) for config, *_ in trained}) == len(spatial)
    assert {plan.config.model.latent_shape for plan in spatial} == {(32, 4, 4)}
    masked, baseline = plans["masked"].config, plans["masked-pixel"].config
    assert masked.model == baseline.model and masked.model.latent == 128
    assert masked.objective.hole_ratio == baseline.objective.hole_ratio == 0.35
    assert {plan.row.name for plan in plans.values() if plan.probe_images != 0} == set(rows.PROBED)


@pytest.mark.parametrize(("name", "scale"), [("small", "small"), ("small-seeds-3", "small"), ("falling", "falling")])
def test_committed_tables_are_what_the_script_writes(name: str, scale: ScaleName) -> None:
    # their settings are those of an earlier version of fastle, which had fewer fields
    folder = Path(__file__).resolve().parents[2] / "docs" / "results"
    report = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.md").read_text() == markdown(report)
    for row in pick_rows(list(report["rows"])):
        kept = report["rows"][row.name]["settings"]
        plan = make_plan(row, scale, data=None, images=kept["images"], seeds=len(kept["seeds"]))
        assert same_settings(plan.settings(), kept), row.name


@pytest.mark.parametrize(("name", "masked"), [("tuned", False), ("masked-tuned", True)])
def test_the_tuned_rows_are_what_the_recipe_trains(name: str, masked: bool) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    plan = make_plan(row, "falling", data=Path("photographs"), images=IMAGES)
    trained = make_config("folder", data=Path("photographs"), size=32, masked=masked)
    assert plan.config.objective == trained.objective and plan.config.train.optimizer == trained.train.optimizer


def test_settings_do_not_depend_on_where_the_images_are_but_on_all_else() -> None:
    row = pick_rows(["crop-0.3"])[0]
    here, there = (make_plan(row, "small", data=Path(name), images=IMAGES).settings() for name in ("a", "b"))
    assert same_settings(here, there)
    for other in (
        make_plan(row, "small", data=None, images=IMAGES, steps=9),
        make_plan(row, "small", data=None, images=IMAGES | {"train": 39}),
        make_plan(row, "full", data=None, images=IMAGES),
        make_plan(pick_rows(["crop-0.5"])[0], "small", data=None, images=IMAGES),
    ):
        assert not same_settings(other.settings(), here)
    assert not same_settings(here, {}) and not same_settings(here, here | {"config": {"model": 1}})


def test_two_rows_from_end_to_end(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("masked", "pixel") == 0
    out = capsys.readouterr().out
    assert "pixel: begins, 4 steps" in out and "pixel: lr 0.00" in out and "linear" in out
    report = result(tmp_path)
    # in the order of the table, not of the flags
    assert list(report["rows"]) == ["pixel", "masked"] and report["trial"] == 4
    row = report["rows"]["masked"]
    assert row["command"].endswith("--data cifar10-jpeg --scale small --steps 4 --rows masked --overwrite")
    assert row["settings"]["images"] == IMAGES and row["settings"]["config"]["data"]["root"] is None
    assert row["search"].keys() == {"0.001", "0.002"} and row["lr"] == float(max(row["search"], key=row["search"].get))
    assert row["mean"].keys() == {"clean", "masked"} and "psnr_inside" in row["mean"]["masked"]
    assert row["representation"]["training_images"] == 30
    assert row["representation"].keys() == {"training_images", "linear", "knn", "faded_own", "faded_target"}
    # images that do not fade would be at 0
    assert row["representation"]["faded_target"] > 0.3 and row["representation"]["faded_own"] > 1e-3
    # the mean alone separates bright from dark
    assert report["rows"]["pixel"]["representation"]["linear"] == 1 and row["seconds"] > 0
    written = (tmp_path / "out" / "small-trial-4.md").read_text()
    assert "A trial of 4 steps" in written and "`pixel`" in written and "`masked`" in written
    assert f"{row['mean']['masked']['psnr_inside']:.2f}" in written
    # pictures of photographs stay out of the results
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"small-trial-4-samples-pixel.png", "small-trial-4-samples-masked.png"}
    assert {"photographs.png", "hole.png"} <= {path.name for path in (tmp_path / "runs" / "small-trial-4").iterdir()}

    # run again, the command trains nothing, even if only the runs are left
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(measure, "train", refuse)
    assert command("masked", "pixel") == 0
    assert capsys.readouterr().out.count("done before") == 2 and result(tmp_path) == report
    (tmp_path / "out" / "small-trial-4.json").unlink()
    assert command("pixel") == 0
    assert result(tmp_path)["rows"]["pixel"]["mean"] == report["rows"]["pixel"]["mean"]


def test_an_interrupted_row_continues_and_keeps_its_search(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "small", replace(TINY, options={"schedule": "trapezoid", "warmup": 0.5}))
    done: list[tuple[float, int | None]] = []
    limit = 2

    def counted(config: RunConfig, path: Path, execution: Execution, **more: Any) -> None:
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append((config.train.lr, config.train.steps))
        train(config, path, execution, **more)

    monkeypatch.setattr(measure, "train", counted)
    assert command("identity") == 130 and done == [(1e-3, 1), (2e-3, 1)]
    assert not (tmp_path / "out").exists()
    limit = 3
    assert command("identity") == 0 and done[2:] == [(result(tmp_path)["rows"]["identity"]["lr"], 4)]
    # the search leaves no trace: a rate that falls over the short run would be another one
    whole = tmp_path / "whole"
    config = make_plan(pick_rows(["identity"])[0], "small", data=None, images=IMAGES, steps=4).run(done[2][0], 0)
    run = tmp_path / "runs" / "small-trial-4" / "identity" / f"lr-{done[2][0]:g}-seed-0"
    data = RunConfig.from_dict(json.loads((run / "config.json").read_text())).data
    train(replace(config, data=data), whole, Execution(device=torch.device("cpu")), console=Console(quiet=True))
    name = "checkpoints/step-00000004.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_changed_settings_and_overwrite_start_a_row_anew(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastle.data.shapes.SIZES", dict.fromkeys(("train", "valid", "test"), 500))
    assert command("shapes-pixel-mask") == 0 and command("identity") == 0
    before = result(tmp_path)["rows"]
    # the picture of shapes may be published
    assert (tmp_path / "out" / "small-trial-4.png").exists()
    monkeypatch.setitem(SCALES, "small", replace(TINY, rates=(4e-3,)))
    assert command("identity", "shapes-pixel-mask") == 0
    after = result(tmp_path)["rows"]
    assert after["identity"]["lr"] == 4e-3 and after["identity"]["mean"] != before["identity"]["mean"]
    assert not after["identity"]["search"] and after["shapes-pixel-mask"] == before["shapes-pixel-mask"]
    assert capsys.readouterr().out.count("done before") == 1
    trained: list[Path] = []

    def counted(config: RunConfig, path: Path, execution: Execution, **more: Any) -> None:
        trained.append(path)
        train(config, path, execution, **more)

    monkeypatch.setattr(measure, "train", counted)
    assert command("identity", "--overwrite") == 0
    assert len(trained) == 1 and result(tmp_path)["rows"]["identity"]["mean"] == after["identity"]["mean"]
    # the runs at the other rates are gone
    assert [path.name for path in (tmp_path / "runs" / "small-trial-4" / "identity").glob("lr-*")] == [
        "lr-0.004-seed-0"
    ]


def test_a_failing_row_is_recorded_and_the_table_continues(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(config: RunConfig, path: Path, execution: Execution, **more: Any) -> None:
        if isinstance(config.objective.transform, IdentityConfig) or config.train.lr == 2e-3:
            raise NonFiniteLoss("the loss of step 1 is not finite (total nan); there is no earlier checkpoint; try …")
        train(config, path, execution, **more)

    monkeypatch.setattr(measure, "train", diverge)
    assert command("identity", "noise") == 1
    rows = result(tmp_path)["rows"]
    assert rows["identity"]["failed"] == "every learning rate fails: the loss of step 1 is not finite (total nan)"
    # if one rate diverges, the other is chosen
    assert rows["noise"]["lr"] == 1e-3 and "failed" not in rows["noise"]
    written = (tmp_path / "out" / "small-trial-4.md").read_text()
    assert "| `identity` | untransformed | failed |" in written and "## Failed" in written
    assert "0.002: not finite" in written
    assert "identity: FAILED" in capsys.readouterr().out


def test_several_seeds_have_a_mean_and_a_spread(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "small", replace(TINY, rates=(1e-3,)))
    assert command("identity") == 0 and command("identity", "--seeds", 2) == 0
    # the table of one seed does not change
    alone = result(tmp_path)["rows"]["identity"]
    row = json.loads((tmp_path / "out" / "small-seeds-2-trial-4.json").read_text())["rows"]["identity"]
    assert len(alone["runs"]) == 1 and alone["runs"][0]["figures"] == row["runs"][0]["figures"]
    assert row["command"].endswith("--scale small --seeds 2 --steps 4 --rows identity --overwrite")
    values = [run["figures"]["clean"]["psnr"] for run in row["runs"]]
    assert [run["seed"] for run in row["runs"]] == [0, 1] and values[0] != values[1]
    assert row["mean"]["clean"]["psnr"] == pytest.approx(sum(values) / 2)
    assert row["spread"]["clean"]["psnr"] == [min(values), max(values)]
    written = (tmp_path / "out" / "small-seeds-2-trial-4.md").read_text()
    assert f"({min(values):.2f}–{max(values):.2f})" in written and "the mean of 2 seeds" in written


def test_listing_and_errors(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list", "--scale", "full"]) == 0
    out = capsys.readouterr().out
    assert all(f"{row.name}: " in out for row in ROWS) and "lr 0.0003 or 0.001" in out and "seeds 0 1 2" in out

    def refused(*arguments: str) -> str:
        assert reproduce.main(["--out", str(tmp_path), "--runs", str(tmp_path), "--device", "cpu", *arguments]) == 1
        return capsys.readouterr().err

    assert "--seeds must be at least 1" in refused("--seeds", "0")
    assert "--rows nothing: there is no such row; there are pixel, " in refused("--rows", "nothing")
    assert "--data is missing: row pixel" in refused("--rows", "pixel")
    assert "--steps must be at least 1" in refused("--steps", "0")
    # the script does not touch the files of others
    (tmp_path / "runs" / "small-trial-4" / "noise").mkdir(parents=True)
    (tmp_path / "runs" / "small-trial-4" / "noise" / "mine").touch()
    assert command("noise", "--overwrite") == 1
    assert "holds something other" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        pick_rows(["crop"])
