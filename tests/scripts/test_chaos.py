"""A cheap sample of scripts/chaos.py: events, mutated files, flipped bits, and what the fuzzing itself must notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastle.checkpoint
from bench.chaos.fuzz import flip_bits, fuzz

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/chaos.py", "--minutes", "0.1", "--seed", "0", "--json", str(tmp_path / "json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "json").read_bytes())["chaos"]
    assert report["total"] > 0 and report["faults"] == []


def test_mutated_files_are_refused_in_one_line_or_harmless(tmp_path: Path) -> None:
    report = fuzz(tmp_path, cases=80, seed=0)
    assert report["faults"] == []
    assert report["found"] + report["harmless"] == 80 and report["found"] > 50


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    assert flip_bits(tmp_path, cases=50, seed=0)["missed"] == []


def test_a_reader_without_checksums_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as if every section had the checksum that is asked for
    class Any(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    monkeypatch.setattr(fastle.checkpoint, "_checksum", lambda tensors: Any())
    assert flip_bits(tmp_path, cases=20, seed=0)["missed"]
