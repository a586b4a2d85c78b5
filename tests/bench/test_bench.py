"""The benchmarks: what is wrong or did not run is never shown as fast, and a figure is what its name says."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.measure import Effort, Row, interleave, peak_memory
from torch import Tensor

from bench import harness, measure, sigreg_bench
from bench.sigreg_bench import KNOTS, Shape, exact, floors, naive
from fastle.kernels.reference import sigreg as reference_sigreg

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--quick", "--shapes")


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Two rounds a row, and no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "QUICK", Effort(seconds=0, rounds=2))
        patch.setattr(sigreg_bench, "_compiled_naive", lambda: naive)
        yield


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two shapes."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert sigreg_bench.main([*TINY, "16x4x8", "2x64x4x8", "--json", str(path)]) == 0
    return path


def test_report(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["benchmark"] == "sigreg"
    assert report["command"][:2] == ["sigreg_bench.py", "--device"]
    keys = {"device", "driver", "torch", "triton", "python", "commit", "threads", "date", "fp32_products"}
    assert keys <= report["environment"].keys()
    assert report["environment"]["fp32_products"] == "highest"
    assert [row["shape"] for row in report["rows"]] == ["16x4x8", "2x64x4x8"]
    row = report["rows"][1]
    sizes = {"tests": 2, "samples": 64, "features": 4, "slices": 8, "knots": KNOTS, "t_max": 3.0, "dtype": "fp32"}
    assert sizes.items() <= row.items()
    assert row["refused"] is None and row["gates"] == [2e-6, 1e-5]
    assert list(row["sides"]) == ["fastle", "eager", "compiled", "chunked"]
    for side in row["sides"].values():
        assert side["status"] == "measured" and side["first_call_s"] > 0
        assert 0 <= side["value_error"] < 1e-5 and 0 < side["gradient_error"] < 1e-4
        assert 0 < side["ms"]["p20"] <= side["ms"]["p50"] <= side["ms"]["p80"] and side["ms"]["repeats"] == 2
    peer, ours = row["sides"]["eager"], row["sides"]["fastle"]
    assert row["ratios"]["eager"] == pytest.approx(peer["ms"]["p50"] / ours["ms"]["p50"])
    assert row["memory_ratios"]["eager"] == pytest.approx(peer["peak_bytes"] / ours["peak_bytes"])
    assert row["floors_ms"] == {} == row["graph_ratios"]


def test_table_and_plot_are_made_from_the_report(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = report_file.with_name("plot.png")
    assert sigreg_bench.main(["--from", str(report_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip().startswith("2x64x4x8") and "×" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_plot_of_a_gpu_report_with_gaps(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(report_file.read_text())
    report["environment"] |= {"device_type": "cuda", "peaks_known": True, "commit": None}
    first, second = report["rows"]
    second |= {"floors_ms": {"fp32": 0.01}, "floor_fractions": {"fp32": 0.5}, "graph_ratios": {"chunked": 3.0}}
    second["sides"]["fastle"]["graph_ms"] = second["sides"]["fastle"]["ms"]
    second["sides"]["eager"] = {"status": "does not fit", "note": "does not fit (needs 27.0 GB)", "needs_bytes": 27e9}
    second["ratios"].pop("eager")
    first["refused"] = "value is not finite"
    for side in first["sides"].values():
        del side["ms"], side["peak_bytes"]
    path, picture = report_file.with_name("gpu.json"), report_file.with_name("gpu.png")
    path.write_text(json.dumps(report))
    assert sigreg_bench.main(["--from", str(path), "--plot", str(picture)]) == 1
    assert picture.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "2x64x4x8: eager does not fit (needs 27.0 GB)" in shown
    assert "16x4x8: REFUSED, value is not finite: no times" in shown
    assert "in CUDA graphs" in shown and "50%" in shown


def wrong_value(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    # and a right gradient
    value = naive(z, slices)
    return value + 1e-4 * value.detach()


def wrong_gradient(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    # of a right value
    value = naive(z, slices)
    return value + 1e-3 * (value - value.detach())


def not_finite(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    return naive(z, slices) * torch.nan


def broken(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    raise ValueError("no kernel for this\nsecond line")


REASONS: dict[Callable[..., Tensor], str] = {
    wrong_value: "value error 1.0e-04 is over 2e-06",
    wrong_gradient: "gradient error 1.0e-03 is over 1e-05",
    not_finite: "value is not finite, gradient is not finite",
    broken: "failed: ValueError: no kernel for this",
}


@pytest.mark.parametrize("operator", REASONS)
def test_a_wrong_operator_has_no_times(
    operator: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sigreg_bench, "sigreg", operator)
    path = tmp_path / "report.json"
    assert sigreg_bench.main([*TINY, "16x4x8", "--json", str(path)]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["refused"] == REASONS[operator]
    assert row["sides"]["eager"]["gradient_error"] > 0
    assert not {"ms", "peak_bytes"} & {key for side in row["sides"].values() for key in side}
    assert not {"ratios", "memory_ratios"} & row.keys()
    shown = capsys.readouterr().out
    assert "REFUSED" in shown and REASONS[operator] in shown
    assert not any("×" in line for line in shown.splitlines() if "16x4x8" in line)


def test_peers_that_do_not_fit_or_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(z: Tensor, slices: Tensor) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(sigreg_bench, "_compiled_naive", lambda: no_compiler)
    # room for (16, 8, 17) floats five times, and eager needs six
    monkeypatch.setattr(measure, "memory_limit", lambda device: 5 * 16 * 8 * KNOTS * 4)
    monkeypatch.setattr(sigreg_bench, "CHUNK", 4)
    path = tmp_path / "report.json"
    assert sigreg_bench.main([*TINY, "16x4x8", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    statuses = {name: side["status"] for name, side in row["sides"].items()}
    expected = {"fastle": "measured", "eager": "does not fit", "compiled": "failed", "chunked": "measured"}
    assert statuses == expected
    assert row["ratios"].keys() == {"chunked"}
    shown = capsys.readouterr().out
    assert "16x4x8: eager does not fit (needs 0.0 GB" in shown
    assert "16x4x8: compiled failed: RuntimeError: no C++ compiler" in shown


def test_what_is_done_outlives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sigreg_bench.make_case

    def stopped(shape: Shape, flags: argparse.Namespace, device: torch.device) -> measure.Case:
        if shape.samples == 17:
            raise KeyboardInterrupt
        return made(shape, flags, device)

    monkeypatch.setattr(sigreg_bench, "make_case", stopped)
    path = tmp_path / "report.json"
    assert sigreg_bench.main([*TINY, "16x4x8", "17x4x8", "--json", str(path)]) == 130
    assert [row["shape"] for row in json.loads(path.read_text())["rows"]] == ["16x4x8"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes 16x4", "argument --shapes: '16x4' is no shape: give NxDxM or BxNxDxM"),
        ("--shapes 16x0x4", "argument --shapes: '16x0x4' is no shape"),
        ("--shapes 16x4x8 --grid", "argument --grid: not allowed with argument --shapes"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--device cuda", "--device cuda: PyTorch finds no GPU here; --device cpu is accepted"),
        ("--dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("--json {tmp}", "--json {tmp} is a folder: give the name of a file"),
        ("--json {tmp}/none/x.json", "--json {tmp}/none/x.json cannot be written: No such file or directory"),
        ("--plot {tmp}/x.pdf", "--plot {tmp}/x.pdf: the name has to end in .png"),
        ("--from {tmp}/none.json", "--from {tmp}/none.json cannot be read: No such file"),
        ("--from {tmp}/other.json", "--from {tmp}/other.json is no report of the sigreg benchmark"),
        ("--from {tmp}/other.json --quick", "--quick is for measuring, and --from {tmp}/other.json measures nothing"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "other.json").write_text('{"benchmark": "views"}')
    with pytest.raises(SystemExit) as stop:
        sigreg_bench.main(arguments.format(tmp=tmp_path).split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sigreg_bench.py: error: {expected.format(tmp=tmp_path)}")


def test_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    # isolated: no environment, no folder of one's own, so that only the script's own path leads to fastle
    command = [sys.executable, "-I", str(ROOT / "bench" / "sigreg_bench.py"), "--from", "none.json"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--from none.json cannot be read" in done.stderr


def test_memory_of_known_allocations() -> None:
    def call() -> Tensor:
        first, _second = torch.empty(1000), torch.empty(500)
        del first
        return torch.empty(250)

    assert peak_memory(call, CPU) == 4 * 1500


def test_memory_sees_what_compiled_code_allocates() -> None:
    def products(x: Tensor) -> Tensor:
        return ((x @ x) @ x) @ x

    x = torch.randn(256, 256)
    compiled = torch.compile(products, dynamic=False)
    compiled(x)
    assert peak_memory(partial(compiled, x), CPU) == 2 * x.nbytes


def test_memory_of_the_naive_form_is_what_the_limit_expects() -> None:
    shape = Shape(2, 64, 4, 32)
    case = sigreg_bench.make_case(shape, argparse.Namespace(dtype="fp32"), CPU)
    eager = case.sides[1]
    assert peak_memory(partial(eager.step, case.inputs[0]), CPU) == pytest.approx(eager.needs, rel=0.02)


def test_sides_take_turns() -> None:
    called: list[tuple[str, int]] = []
    calls = {name: partial(lambda name, turn: called.append((name, turn)), name) for name in "ab"}
    times = iter([1.0, 1.0, 2.0, 2.0, 9.0, 9.0])

    def clock(call: Callable[[], object]) -> float:
        call()
        return next(times)

    figures = interleave(calls, clock, Effort(seconds=0, rounds=3))
    assert [turn for _, turn in called] == [0, 0, 1, 1, 2, 2]
    assert all({name for name, _ in called[i : i + 2]} == {"a", "b"} for i in (0, 2, 4))
    assert figures["a"] == {"p20": pytest.approx(1.4), "p50": 2.0, "p80": pytest.approx(6.2), "repeats": 3}


def test_oracle_does_not_depend_on_its_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    z, slices = torch.randn(3, 20, 5, generator=generator), torch.randn(5, 7, generator=generator)
    whole, parts = exact(z, slices, room=10**9), exact(z, slices, room=1)
    samples = z.double().requires_grad_()
    loss = reference_sigreg(samples, slices.double()).mean()
    for got in (whole, parts):
        torch.testing.assert_close(got, (loss.detach(), torch.autograd.grad(loss, samples, retain_graph=True)[0]))


def test_floor_by_hand() -> None:
    found = floors(Shape(1, 2048, 512, 1024), 4, measure.PEAKS["NVIDIA H200"])
    products, operations = 2 * 2048 * 512 * 1024, 110 * 2048 * 1024
    assert found["fp32"] == pytest.approx(1e3 * (products + operations) / 33.5e12)
    assert found["tensor"] == pytest.approx(1e3 * 2 * products / 494e12)
    assert floors(Shape(1, 8, 8, 8), 4, None) == {}


class Graph:
    """What a capture gives, without a GPU."""

    def replay(self) -> None:
        pass


@pytest.mark.parametrize("ours_is_right", [True, False])
def test_graphs_are_checked_and_what_has_none_says_why(ours_is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sigreg_bench.make_case(Shape(1, 16, 4, 8), argparse.Namespace(dtype="fp32"), CPU)
    ours, _, compiled, _ = case.sides
    exact_result = case.exact
    assert not callable(exact_result)
    late = measure.Side(name="late", step=lambda z: exact_result)
    sides: dict[str, Row] = {side.name: {"peak_bytes": 1000} for side in (*case.sides, late)}
    sides["eager"]["peak_bytes"] = 3000

    def capture(step: Callable[[Tensor], measure.Result], x: Tensor) -> tuple[Graph, measure.Result]:
        if step is compiled.step:
            raise RuntimeError("not while capturing\nsecond line")
        # a peer has no gates to pass
        filler = torch.nan if step is late.step else 0.0
        wrong = (torch.full((), filler), torch.full((16, 4), filler))
        return Graph(), exact_result if step is ours.step and ours_is_right else wrong

    monkeypatch.setattr(measure, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2000, 4000))
    effort = Effort(seconds=0, rounds=2)
    refused = measure._time_graphs(case, [*case.sides, late], sides, measure.Stopwatch(CPU), effort)
    if not ours_is_right:
        assert refused == "in a CUDA graph, value error 1.0e+00 is over 2e-06, gradient error 1.0e+00 is over 1e-05"
        assert not any("graph_ms" in side for side in sides.values())
        return
    assert refused is None
    assert sides["fastle"]["graph_ms"]["repeats"] == sides["chunked"]["graph_ms"]["repeats"] == 2
    assert sides["eager"]["graph_note"] == "no graph: does not fit beside the others' graphs"
    assert sides["compiled"]["graph_note"] == "no graph: RuntimeError: not while capturing"
    assert sides["late"]["graph_note"] == "no graph: its result there is not finite"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["--device", "cuda", "--quick", "--shapes", "128x64x32", "2x64x16x32", "--json", str(path)]
    assert sigreg_bench.main(arguments) == 0
    rows: list[Row] = json.loads(path.read_text())["rows"]
    for row in rows:
        for name in ("fastle", "eager", "chunked"):
            side = row["sides"][name]
            assert "graph_note" not in side and 0 < side["graph_ms"]["p50"]
            # autograd's peak for the naive form; ours and the chunked one need less
            assert 0 < side["peak_bytes"] <= row["sides"]["eager"]["peak_bytes"]
