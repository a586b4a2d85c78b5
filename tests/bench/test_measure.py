"""How the benchmarks measure: sides take turns, graphs are checked, memory and errors are what their names say."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import measure
from bench.common.measure import Case, Effort, Side, interleave, relative_error
from bench.common.table import Row
from fastle.machine import peak_memory
from fastle.profiling import measure as instruments
from fastle.profiling.measure import percentiles

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TWICE = Effort(seconds=0, rounds=2)


def test_a_benchmark_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    # isolated: only the script's own path leads to fastle
    command = [sys.executable, "-I", str(ROOT / "bench" / "sigreg_bench.py"), "--from", "none.json"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--from none.json cannot be read" in done.stderr


def test_memory_is_the_most_that_a_call_holds_at_once() -> None:
    def call() -> Tensor:
        first, _second = torch.empty(1000), torch.empty(500)
        del first
        return torch.empty(250)

    assert peak_memory(call, CPU) == 4 * 1500


def test_sides_take_turns() -> None:
    called: list[tuple[str, int]] = []
    ticks = iter([1.0, 1.0, 2.0, 2.0, 9.0, 9.0])

    def call(name: str, turn: int) -> float:
        called.append((name, turn))
        return next(ticks)

    times = interleave({name: partial(call, name) for name in "ab"}, Effort(seconds=0, rounds=3))
    assert [turn for _, turn in called] == [0, 0, 1, 1, 2, 2]
    assert all({name for name, _ in called[i : i + 2]} == {"a", "b"} for i in (0, 2, 4))
    wanted = {"p20": pytest.approx(1.4), "p50": 2.0, "p80": pytest.approx(6.2), "repeats": 3}
    assert percentiles(times["a"]) == wanted


def test_inputs_rotate_and_a_warm_call_comes_before_the_times() -> None:
    seen: list[int] = []
    case = Case(
        labels={},
        inputs=[1, 2, 3],
        sides=[Side(name="fastle", make=lambda: seen.append, ours=True, gates={})],
        errors=lambda _: {},
    )
    measure.measure(case, CPU, Effort(seconds=0, rounds=4))
    assert seen == [1, 1, 1, 2, 3, 1]


def test_another_shape_is_never_right() -> None:
    one = torch.ones(1)
    assert torch.tensor(relative_error([one], [one.expand(2)])).isnan()
    assert relative_error([one, 2 * one], [one.double(), one.double()]) == 1


def test_copy_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments.Stopwatch, "time", lambda *_, **__: 0.5)
    assert instruments.copy_bandwidth(CPU) == pytest.approx(2 * 2**16 / 0.5e-3)


def test_matmul_peak_counts_a_multiply_add_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments.Stopwatch, "time", lambda *_, **__: 0.5)
    assert instruments.matmul_peak("fp32", CPU) == pytest.approx(2 * 64**3 / 0.5e-3)


class Graph:
    """A captured graph, without a GPU."""

    def replay(self) -> None:
        pass


@pytest.mark.parametrize("ours_is_right", [True, False])
def test_graphs_are_checked_and_what_has_none_says_why(ours_is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.ones(3)
    results = {"fastle": right if ours_is_right else 2 * right, "wrong": 2 * right, "nan": right * torch.nan}

    def side(name: str) -> Side:
        return Side(name=name, make=lambda: name, ours=name == "fastle", gates={"value": 1e-6})

    def capture(call: str, x: Any) -> tuple[Graph, Tensor]:
        if call == "broken":
            raise RuntimeError("not while capturing\nsecond line")
        return Graph(), results[call]

    names = ("fastle", "wrong", "nan", "broken", "large")
    case = Case(
        labels={},
        inputs=[0],
        sides=[side(name) for name in names],
        errors=lambda result: {"value": relative_error([result], [right.double()])},
    )
    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "free_memory", lambda device: 2000)
    sides: dict[str, Row] = {name: {"peak_bytes": 3000 if name == "large" else 1000} for name in names}
    refused = measure.time_graphs(case, {name: name for name in names}, sides, CPU, TWICE)
    if not ours_is_right:
        assert refused == "fastle, in a CUDA graph: value error 1.0e+00 is over 1e-06"
        assert not any("graph_ms" in figures for figures in sides.values())
        return
    assert refused is None
    # a peer need not pass the gates
    assert sides["fastle"]["graph_ms"]["repeats"] == sides["wrong"]["graph_ms"]["repeats"] == 2
    notes = {name: figures.get("graph_note", "") for name, figures in sides.items()}
    assert "not finite" in notes["nan"] and "does not fit" in notes["large"]
    assert notes["broken"] == "no graph: RuntimeError: not while capturing"
