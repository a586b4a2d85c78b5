"""The benchmark of SIGReg: a wrong operator has no times, peers that did not run are named, the oracle is right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import loader_bench, sigreg_bench, step_bench, views_bench
from bench.common import measure
from bench.common.peers import KNOTS, naive_sigreg
from bench.sigreg_bench import SigregShape, exact, main, make_case
from fastle.kernels.reference import sigreg as reference_sigreg
from fastle.machine import peak_memory
from tests.bench.bench_cases import check_bad_input, check_refused, check_report, check_shown, run_tiny

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_report_and_what_is_shown_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_tiny(main, tmp_path, "--shapes", "16x4x8", "2x64x4x8")
    check_report(report, "sigreg", ["fastle", "eager", "compiled", "chunked"])
    row = report["rows"][1]
    sizes = {"shape": "2x64x4x8", "tests": 2, "samples": 64, "features": 4, "slices": 8, "knots": KNOTS, "t_max": 3.0}
    assert sizes.items() <= row.items()
    for side in row["sides"].values():
        assert side["first_call_s"] > 0 and side["peak_bytes"] > 0
        assert 0 <= side["value_error"] < 1e-5 and 0 < side["gradient_error"] < 1e-4
    # a GPU's figures, and sides and rows with none
    graph = {"p20": 0.0123, "p50": 0.0234, "p80": 0.0345, "repeats": 9}
    row["sides"]["fastle"]["graph_ms"] = row["sides"]["compiled"]["graph_ms"] = graph
    row["sides"]["eager"] = {"status": "does not fit", "note": "does not fit (needs 27.0 GB)"}
    row["sides"]["chunked"] |= {"graph_note": "no graph: it was not captured", "gradient_error": None}
    report["rows"][0]["refused"] = "fastle: value is not finite"
    for name, ms, size in (("fastle", 2.0, 4e6), ("compiled", 9.0, 6e6)):
        row["sides"][name] |= {"ms": {"p20": ms, "p50": ms, "p80": ms, "repeats": 2}, "peak_bytes": size}
    shown = check_shown(main, report, tmp_path, capsys, status=1)
    # ratios are a peer's figure over ours
    (line,) = (line.split() for line in shown.splitlines() if line.strip().startswith("compiled "))
    assert line[1:9] == ["9", "9–9", "4.5×", "0.0234", "0.0123–0.0345", "1×", "6", "1.5×"]
    assert "eager does not fit (needs 27.0 GB)" in shown and "chunked: no graph: it was not captured" in shown
    assert "chunked's own gradient error is nan" in shown and "REFUSED, fastle: value is not finite: no times" in shown


def test_committed_reports_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    mains = {"sigreg": main, "views": views_bench.main, "step": step_bench.main, "loader": loader_bench.main}
    paths = sorted((ROOT / "bench" / "results").glob("*-cpu*.json"))
    assert len(paths) >= 6
    for path in paths:
        report = json.loads(path.read_text())
        assert mains[report["benchmark"]](["--from", str(path)]) == 0
        assert report["rows"][-1]["shape"] in capsys.readouterr().out


def wrong_value(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    # its gradient is right
    value = naive_sigreg(z, slices)
    return value + 1e-4 * value.detach()


def wrong_gradient(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    # its value is right
    value = naive_sigreg(z, slices)
    return value + 1e-3 * (value - value.detach())


def not_finite(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    return naive_sigreg(z, slices) * torch.nan


def broken(z: Tensor, slices: Tensor, **_: Any) -> Tensor:
    raise ValueError("no kernel for this\nsecond line")


REASONS: dict[Callable[..., Tensor], str] = {
    wrong_value: "fastle: value error 1.0e-04 is over 2e-06",
    wrong_gradient: "fastle: gradient error 1.0e-03 is over 1e-05",
    not_finite: "fastle: value is not finite; fastle: gradient is not finite",
    broken: "fastle: failed: ValueError: no kernel for this",
}


@pytest.mark.parametrize("operator", REASONS, ids=lambda operator: operator.__name__)
def test_a_wrong_operator_has_no_times(
    operator: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sigreg_bench, "sigreg", operator)
    report = run_tiny(main, tmp_path, "--shapes", "16x4x8", status=1)
    check_refused(report, REASONS[operator], capsys.readouterr().out)
    assert report["rows"][0]["sides"]["eager"]["gradient_error"] > 0


def test_peers_that_do_not_fit_or_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(z: Tensor, slices: Tensor) -> Tensor:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(sigreg_bench, "compiled", lambda function: no_compiler)
    # room for (16, 8, 17) floats five times, and eager needs six
    monkeypatch.setattr(measure, "free_memory", lambda device: 5 * 16 * 8 * KNOTS * 4 / measure.CPU_MEMORY_SHARE)
    monkeypatch.setattr(sigreg_bench, "CHUNK", 4)
    sides = run_tiny(main, tmp_path, "--shapes", "16x4x8")["rows"][0]["sides"]
    assert [side["status"] for side in sides.values()] == ["measured", "does not fit", "failed", "measured"]
    assert "needs 0.0 GB" in sides["eager"]["note"] and "ms" not in sides["eager"]
    assert sides["compiled"]["note"] == "failed: RuntimeError: no C++ compiler"


def test_what_is_measured_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(shape: SigregShape, dtype: str, device: torch.device) -> measure.Case:
        if shape.samples == 17:
            raise KeyboardInterrupt
        return make_case(shape, dtype, device)

    monkeypatch.setattr(sigreg_bench, "make_case", stopped)
    report = run_tiny(main, tmp_path, "--shapes", "16x4x8", "17x4x8", status=130)
    assert [row["shape"] for row in report["rows"]] == ["16x4x8"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes 16x4", "argument --shapes: '16x4' is no shape: give NxDxM or BxNxDxM"),
        ("--shapes 16x0x4", "argument --shapes: '16x0x4' is no shape"),
        ("--device cuda", "--device cuda is not available: "),
        ("--json {tmp}", "--json {tmp} is a folder: give the name of a file"),
        ("--json {tmp}/other.json/x.json", "--json {tmp}/other.json/x.json: no file can be written to"),
        ("--plot {tmp}/x.pdf", "--plot {tmp}/x.pdf: give it a name that ends in .png"),
        ("--from {tmp}/none.json", "--from {tmp}/none.json cannot be read: No such file"),
        ("--from {tmp}/other.json", "--from {tmp}/other.json is no report of the sigreg benchmark"),
        ("--from {tmp}/other.json --quick", "--quick has no effect with --from {tmp}/other.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "other.json").write_text('{"benchmark": "views", "rows": [1]}')
    check_bad_input(main, arguments.format(tmp=tmp_path), expected.format(tmp=tmp_path), capsys)


def test_memory_of_the_naive_form_is_what_the_limit_expects() -> None:
    case = make_case(SigregShape(2, 64, 4, 32), "fp32", CPU)
    eager = case.sides[1]
    call = eager.make()
    assert peak_memory(lambda: call(case.inputs[0]), CPU) == pytest.approx(eager.needs, rel=0.02)


def test_oracle_does_not_depend_on_its_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    z, slices = torch.randn(3, 20, 5, generator=generator), torch.randn(5, 7, generator=generator)
    samples = z.double().requires_grad_()
    loss = reference_sigreg(samples, slices.double()).mean()
    expected = (loss.detach(), torch.autograd.grad(loss, samples)[0])
    for room in (10**9, 1):
        ((value,), (gradient,)) = exact(z, slices, room=room)
        torch.testing.assert_close((value, gradient), expected)


def test_what_is_measured_by_default() -> None:
    flags = argparse.Namespace(shapes=None, quick=True)
    assert sigreg_bench.pick_shapes(flags, CPU) == sigreg_bench.HEADLINE["cpu"]
    flags.quick = False
    shapes = sigreg_bench.pick_shapes(flags, CPU)
    assert shapes[:5] == sigreg_bench.HEADLINE["cpu"] and len(set(shapes)) == len(shapes) == 10
    assert all(SigregShape.parse(str(shape)) == shape for shape in shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    report = run_tiny(main, tmp_path, "--shapes", "128x64x32", "2x64x16x32", device="cuda")
    for row in report["rows"]:
        for name in ("fastle", "eager", "chunked"):
            side = row["sides"][name]
            assert "graph_note" not in side and side["graph_ms"]["p50"] > 0
            assert 0 < side["peak_bytes"] <= row["sides"]["eager"]["peak_bytes"]
