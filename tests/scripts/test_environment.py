"""The environment of the scripts: what is refused before anything is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ENVIRONMENT = Path(__file__).parents[2] / "scripts" / "environment.sh"


def test_a_full_disk_is_refused_before_the_first_write(tmp_path: Path) -> None:
    checkout, commands = tmp_path / "checkout", tmp_path / "bin"
    for path in (checkout / "scripts", checkout / "constraints", commands):
        path.mkdir(parents=True)
    (checkout / "scripts" / "environment.sh").write_text(ENVIRONMENT.read_text())
    (checkout / "setup.py").touch()
    (checkout / "constraints" / "tested.txt").touch()
    disk = commands / "df"
    disk.write_text("#!/bin/sh\necho a line of names\necho /dev/a 9 8 1100000 99% /\n")
    disk.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh; use_environment dev"],
        cwd=checkout, env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: .venv takes 7 GB") and done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()
