"""What a shell completes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastle.method.pretrained import shipped_models
from tests.commands.trained import Command, command

__all__ = ["command"]
# completes the last of the words, and prints what is found, sorted, in one line
COMPLETE = """
compopt() { :; }
complete_last() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    "_shtab_${1//-/_}"
    printf '%s\\n' "${COMPREPLY[@]}" | sort | paste -sd ' '
}
"""


def test_bash_completes_commands_flags_choices_models_and_files(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "photo.jpg").touch()
    wanted = {
        "fastle e": "encode eval export",
        "fastle eval --pe": "--perceptual",
        "fastle eval ": " ".join(sorted((*shipped_models(), "photo.jpg", "runs"))),
        "fastle export runs --part ": "decode encode reconstruct",
        "fastle compare runs/mine ": "runs",
        "fastle reconstruct cifar10-6x photo.jpg p": "photo.jpg",
        "fastle eval runs --weights ": "",
        "fastle-train cel": "celeba",
        "fastle-train folder --data p": "photo.jpg",
        "fastle-train folder --judge ": "ema live step-frozen",
    }
    status, script, err = command("completion", "bash")
    assert (status, err) == (0, "")
    calls = "\n".join("complete_last " + " ".join(f"'{word}'" for word in line.split(" ")) for line in wanted)
    done = subprocess.run(
        ["bash"], input=script + COMPLETE + calls, check=False, capture_output=True, text=True, env={"LC_ALL": "C"},
    )  # fmt: skip
    assert done.stderr == ""
    assert dict(zip(wanted, done.stdout.split("\n"), strict=False)) == wanted


def test_zsh_completes_all_of_several_images(command: Command) -> None:
    pytest.importorskip("shtab")
    script = command("completion", "zsh")[1]
    assert script.count("#compdef") == 2 and "compdef _shtab_fastle_train -N fastle-train" in script
    assert '"*:image files, cut to size as in training:_files"' in script
