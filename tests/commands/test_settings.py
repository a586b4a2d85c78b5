"""--config and --print-config: settings in a TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastle.commands.settings import read_settings, settings_text
from fastle.commands.train import FLAGS, IN_FILE, main
from fastle.presets import make_config

KNOWN = {name: FLAGS[name] for name in IN_FILE}


@pytest.mark.parametrize(
    ("dataset", "overrides"),
    [
        ("shapes", {}),
        ("shapes", {"objective": "pixel", "steps": 7, "clip": 0.0}),
        ("celeba", {"data": "/ce\"le\\ba é", "latent": 512, "masked": True, "hole_ratio": 0.2}),
        ("cifar10", {"data": "/d", "masked": True}),
        ("cifar10", {"data": "/d", "masked": True, "crop_ratio": 0.3}),
        ("folder", {"data": "/d", "size": 32, "channels": 1, "recipe": "post", "averages": (0.05, 0.1)}),
        ("cifar10", {"data": "/d", "blur_views": (1, 5)}),
        ("cifar10", {"data": "/d", "blur_views": ()}),
        ("cifar10", {"data": "/d", "transform": "noise", "noise_std": 0.5, "schedule": "cosine", "lr": 1e-05}),
    ],
)  # fmt: skip
def test_what_is_printed_is_the_same_configuration(tmp_path: Path, dataset: str, overrides: dict[str, object]) -> None:
    config = make_config(dataset, **overrides)  # type: ignore[arg-type]
    (tmp_path / "run.toml").write_text(settings_text(config), encoding="utf-8")
    settings = read_settings(tmp_path / "run.toml", KNOWN)
    assert make_config(settings.pop("dataset"), **settings) == config


def test_flags_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('dataset = "shapes"\nrun = "there"\n[training]\nbatch-size = 4\nlr = 1\nsteps = 3\n')
    main(["--config", str(file), "--batch-size", "8", "--dry-run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "batch-size 8" in shown and "lr 1.0" in shown and "run there" in shown

    main(["--config", str(file), "--print-config", "--seed", "7"])
    printed = capsys.readouterr().out
    assert "\nseed = 7\n" in printed and "\nbatch-size = 4\n" in printed and "\n# clip = " in printed


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lrr = 1", "there is no setting lrr: did you mean lr?"),
        ("[training]\nlrr = 1", "there is no setting lrr: did you mean lr?"),
        ("[other]\nlr = 1", "there is no setting other"),
        ("overwrite = true", "there is no setting overwrite"),
        ('lr = "high"', "--lr must be a number, not high"),
        ("step = 3", "--step must be one of auto, eager, compiled, captured, not 3"),
        ("crop-ratio = 0.2\n[objective]\ncrop_ratio = 0.3", "crop_ratio stands there twice"),
        ("lr = ", "run.toml is no TOML: "),
        (None, "run.toml cannot be read: No such file or directory"),
    ],
)
def test_what_a_file_of_settings_may_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("run.toml").write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["shapes", "--config", "run.toml", "--dry-run"])
    assert isinstance(left.value.code, str)
    assert "run.toml" in left.value.code and fault in left.value.code and "\n" not in left.value.code


def test_a_dataset_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run"])
    assert "the following arguments are required: dataset" in capsys.readouterr().err
