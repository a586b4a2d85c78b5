"""The race to a quality: who reached it when, by which settings, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import speedrun
from bench.speedrun import main
from tests.bench.bench_cases import check_bad_input, check_shown, run_tiny


def test_sides_take_turns_until_the_last_target(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # an untrained model is some 10 dB from noise, and none comes to 90
    monkeypatch.setattr(speedrun, "TARGETS", (1.0, 90.0))
    monkeypatch.setattr(speedrun, "EVERY", 2)
    monkeypatch.setitem(speedrun.SIZES, True, {"hidden": 8, "batch_size": 8})
    flags = ("--data", str(photographs), "--seeds", "2", "--steps", "3", "--limit", "4")
    report = run_tiny(main, tmp_path, *flags)
    assert [row["shape"] for row in report["rows"]] == [f"hidden 8, batch 8, seed {seed}" for seed in (0, 1)]
    row = report["rows"][1]
    assert {name: [at[0] for at in side["curve"]] for name, side in row["sides"].items()} == {
        "fastle": [2, 3], "pixel": [2, 3], "post": [2, 4],
    }  # fmt: skip
    for side in row["sides"].values():
        (_, early, before), (_, late, psnr) = side["curve"]
        # what has been trained is what is validated
        assert before != psnr
        assert side["reached"] == {"1": [2, early], "90": None} and 0 < early < late and psnr <= side["best"]
        # the first step has its own time
        assert side["ms"]["repeats"] == side["curve"][-1][0] - 1
    settings = row["settings"]
    assert settings["fastle"]["train"]["schedule"] == settings["pixel"]["train"]["schedule"] == "trapezoid"
    assert settings["post"]["train"]["schedule"] == "constant" and settings["pixel"]["objective"]["name"] == "pixel"
    assert str(photographs) not in str(settings)
    check_shown(main, report, tmp_path, capsys)


def test_a_side_ends_at_the_last_target(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedrun, "TARGETS", (1.0,))
    monkeypatch.setattr(speedrun, "EVERY", 2)
    monkeypatch.setitem(speedrun.SIZES, True, {"hidden": 8, "batch_size": 8})
    flags = ("--data", str(photographs), "--seeds", "1", "--limit", "9", "--sides", "post")
    (row,) = run_tiny(main, tmp_path, *flags)["rows"]
    assert len(row["sides"]["post"]["curve"]) == 1


def test_a_side_that_diverges_ends(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedrun, "EVERY", 2)
    monkeypatch.setattr(speedrun, "validation_psnr", lambda model, images, **flags: float("nan"))
    monkeypatch.setitem(speedrun.SIZES, True, {"hidden": 8, "batch_size": 8})
    flags = ("--data", str(photographs), "--seeds", "1", "--limit", "9", "--sides", "post")
    side = run_tiny(main, tmp_path, *flags)["rows"][0]["sides"]["post"]
    assert [at[0] for at in side["curve"]] == [2] and side["best"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", "--data is missing"), ("--data x --seeds 0", "--seeds must be at least 1, not 0")],
    ids=["no-data", "no-seeds"],
)
def test_bad_input_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bad_input(main, arguments, expected, capsys)
