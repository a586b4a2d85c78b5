"""What the tests of the benchmarks share: running a command, and reading its report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Report = dict[str, Any]
Main = Callable[[list[str]], int]
FIGURES = {"ms", "graph_ms", "peak_bytes"}


def run_tiny(main: Main, tmp_path: Path, *arguments: str, device: str = "cpu", status: int = 0) -> Report:
    """The report of a quick run; the exit status must be the one expected."""
    path = tmp_path / "report.json"
    assert main(["--device", device, "--quick", "--json", str(path), *arguments]) == status
    report: Report = json.loads(path.read_text())
    return report


def check_report(report: Report, name: str, sides: list[str]) -> None:
    """What every report has: facts, no refusal, and of each side a figure with its spread."""
    assert report["benchmark"] == name and report["command"][0] == f"{name}_bench.py"
    facts = {"device", "driver", "torch", "triton", "python", "commit", "threads", "date", "fp32_products"}
    assert facts <= report["environment"].keys() and report["environment"]["fp32_products"] == "highest"
    for row in report["rows"]:
        assert row["refused"] is None
    row = report["rows"][-1]
    assert list(row["sides"]) == sides
    for side in row["sides"].values():
        assert side["status"] == "measured"
        assert 0 < side["ms"]["p20"] <= side["ms"]["p50"] <= side["ms"]["p80"] and side["ms"]["repeats"] == 2


def check_refused(report: Report, reason: str, shown: str) -> None:
    """A refused row has its reason and no figures, and nothing about it reads as a speed-up."""
    row = report["rows"][-1]
    assert reason in row["refused"] and f"REFUSED, {row['refused']}: no times" in shown
    assert not FIGURES & {key for side in row["sides"].values() for key in side}
    # what follows is the legend, without a table
    assert not re.search(r"\d×", shown[shown.rindex("REFUSED") :])


def check_shown(main: Main, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """Shows and plots a report; its tables fit into 120 columns."""
    path, picture = tmp_path / "shown.json", tmp_path / "shown.png"
    path.write_text(json.dumps(report))
    capsys.readouterr()
    assert main(["--from", str(path), "--plot", str(picture)]) == status
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if "–" in line) <= 120 and "…" not in shown
    return shown


def check_bad_input(main: Main, arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input ends with status 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"\w+\.py: error: {re.escape(expected)}", line)
