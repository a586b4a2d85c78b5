"""The benchmark of the step: the plain step computes what fastle computes, a wrong step has no times."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bench import step_bench
from bench.step_bench import (
    CHUNK,
    StepShape,
    adamw,
    count_flops,
    distance,
    exact,
    first_step,
    main,
    make_batch,
    make_side,
    pick_shapes,
)
from fastle.config import RunConfig
from fastle.method.objective import Losses
from fastle.presets import make_config
from fastle.training.plain_step import StartingPoint
from fastle.training.trainer import Trainer
from tests.bench.bench_cases import check_bad_input, check_refused, check_report, check_shown, run_tiny

CPU = torch.device("cpu")
SIDES = ["plain", "plain bf16", "plain compiled", "fastle eager", "fastle eager bf16"]


def tiny(masked: bool = True, latent: int | None = 6, size: int = 16, batch_size: int = 4, **flags: Any) -> RunConfig:
    flags = {"recipe": "post", "judge_statistics": "own"} | flags  # as CelebA's
    config = make_config(
        "cifar10", masked=masked, latent=latent, size=size, slices=8, crop_ratio=0.4, batch_size=batch_size, **flags
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=8, map_channels=8))


@pytest.fixture(autouse=True)
def tiny_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_bench.SETTINGS, "tiny", tiny)
    # eight channels average away less of the rounding than a real width does
    monkeypatch.setitem(step_bench.GATES, "bf16", {"value": 5e-2, "gradient": 0.5, "update": 3e-3})


def a_start(config: RunConfig) -> tuple[StartingPoint, Tensor]:
    return StartingPoint(config, CPU), make_batch(config, torch.Generator().manual_seed(5))


def test_oracle_does_not_depend_on_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    start, images = a_start(tiny(batch_size=CHUNK // 2 + 1))
    whole = exact(start, images[: CHUNK // 4])
    monkeypatch.setattr(step_bench, "CHUNK", 3)
    parts = exact(start, images[: CHUNK // 4])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)


def test_report_and_what_is_shown_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_tiny(main, tmp_path, "--shapes", "tiny:16", "--sides", *SIDES)
    check_report(report, "step", SIDES)
    (row,) = report["rows"]
    assert (row["shape"], row["setting"], row["batch"]) == ("tiny:16", "tiny", 16)
    for name, side in row["sides"].items():
        assert side["peak_bytes"] > 0 and side["value_error"] < 5e-2 and side["update_error"] < 3e-3
        assert side["precision"] == ("bf16" if "bf16" in name else "fp32")
        assert side["gradient_error"] < (0.5 if side["precision"] == "bf16" else 1e-3)
    # the figures of the table, by hand
    row |= {"flops_per_image": {"fastle": 1e9, "plain": 2e9}, "peak_flops": {"fp32": 1e12, "bf16": 4e12}}
    for name, side in row["sides"].items():
        ms = 40.0 if name == "fastle eager" else 50.0
        side["ms"] = {"p20": ms, "p50": ms, "p80": ms, "repeats": 2}
    row["sides"]["plain bf16"]["gradient_error"] = None
    row["sides"]["plain compiled"] = {"status": "failed", "note": "failed: RuntimeError: no compiler"}
    lines = check_shown(main, report, tmp_path, capsys).splitlines()
    cells = {line.split("  ")[0].strip(): line.split() for line in lines if "–" in line}
    assert cells["fastle eager"][2:7] == ["40", "40–40", "400", "1.25×", "40%"]
    assert cells["plain"][1:6] == ["50", "50–50", "320", "1×", "64%"]
    assert "plain compiled failed: RuntimeError: no compiler" in lines
    assert any(line.startswith("plain bf16's own gradient error is nan") for line in lines)


def loss_off(step: Trainer, losses: Losses) -> Losses:
    return dataclasses.replace(losses, total=losses.total + 1e-3)


def gradient_off(step: Trainer, losses: Losses) -> Losses:
    for state in step.optimizer.state.values():
        state["exp_avg"] *= 1.01
    return losses


def not_moved(step: Trainer, losses: Losses) -> Losses:
    bias = step.model.decoder.head.bias
    assert bias is not None
    with torch.no_grad():
        bias.add_(1e-5)
    return losses


WRONG: dict[Callable[[Trainer, Losses], Losses], str] = {
    loss_off: "value error",
    gradient_off: "gradient error 1.0e-02 is over 1e-03",
    not_moved: "update error",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_step_has_no_times(
    change: Callable[[Trainer, Losses], Losses],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = Trainer.__call__
    monkeypatch.setattr(Trainer, "__call__", lambda self, images: change(self, right(self, images)))
    report = run_tiny(main, tmp_path, "--shapes", "tiny:16", "--sides", "plain", "fastle eager", status=1)
    check_refused(report, f"fastle eager: {WRONG[change]}", capsys.readouterr().out)


def test_a_side_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(self: nn.Module, **flags: Any) -> None:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    names = ("plain", "plain compiled", "fastle eager", "fastle compiled")
    sides = run_tiny(main, tmp_path, "--shapes", "tiny:16", "--sides", *names)["rows"][0]["sides"]
    assert [side["status"] for side in sides.values()] == ["measured", "failed", "measured", "failed"]
    assert sides["plain compiled"]["note"] == "failed: RuntimeError: no C++ compiler"


def test_a_step_in_another_mode_than_asked_for_fails() -> None:
    class Fallen:
        mode = "captured"

        def __call__(self, images: Tensor) -> None:
            self.mode = "compiled"

    with pytest.raises(RuntimeError, match="went on as compiled"):
        first_step(cast(Trainer, Fallen()), torch.zeros(1))


def test_adamw_by_hand() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 3), torch.zeros(4)]
    gradients = [torch.randn(5, 3), torch.tensor([0.0, 1e-8, -1e-3, 3.0])]
    parameters = [nn.Parameter(w.double()) for w in weights]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.double()
    optimizer.step()
    moved = [(p.detach() - w).detach() for p, w in zip(parameters, weights, strict=True)]
    torch.testing.assert_close(moved, adamw(weights, gradients, 0.01), rtol=1e-9, atol=1e-12)


def test_distance_by_hand() -> None:
    wanted = [torch.tensor([3.0, 4.0]).double(), torch.tensor([1e-4]).double()]
    assert distance([torch.tensor([3.0, 5.0]), wanted[1]], wanted) == pytest.approx(0.2)
    # the second is measured by a tenth of the first
    assert distance([wanted[0], torch.tensor([1e-4 + 0.05])], wanted) == pytest.approx(0.1)
    assert distance([wanted[0], torch.tensor([torch.nan])], wanted) != pytest.approx(0, abs=1e9)


def test_operations_by_hand() -> None:
    config = tiny(masked=False, latent=None)
    counts = count_flops(config, CPU)
    h = c = 8
    # multiply-adds of 16 px images: the stem, two down blocks; two up blocks, the head
    # fastle's stem reads 2x2 blocks of 12 channels, filled up to 16, and its head writes such blocks, one more each way
    stems, heads = (
        {"plain": 64 * 16 * 3 * h, "fastle": 64 * 4 * 16 * h},
        {"plain": 256 * 9 * h * 3, "fastle": 81 * 4 * h * 16},
    )
    trunk = 16 * 9 * h * 2 * h + 16 * 9 * 4 * h * h + 4 * 9 * 2 * h * c + 4 * 9 * c * c
    wide = {"plain": 9, "fastle": 4}  # taps a pixel of what follows nearest x2
    for name, taps in wide.items():
        skips = (16 * c * 2 * h + 64 * 2 * h * h) // (1 if name == "plain" else 4)
        ups = 16 * taps * c * 2 * h + 16 * 9 * 4 * h * h + 64 * taps * 2 * h * h + 64 * 9 * h * h + skips
        stem, head = stems[name], heads[name]
        encode, judged, seen = 3 * trunk + 2 * stem, stem + trunk, 2 * (stem + trunk)
        wanted = 2 * (encode + 3 * (ups + head) + judged + seen)
        # the rest is SIGReg's, of which fastle's operator shows a part
        assert 0 <= counts[name] - wanted < 1e-3 * wanted, (name, counts[name], wanted)


def test_what_is_measured_by_default() -> None:
    def picked(device: str, **flags: Any) -> list[str]:
        flags = {"shapes": None, "quick": False} | flags
        return list(map(str, pick_shapes(argparse.Namespace(**flags), torch.device(device))))

    assert str(StepShape.parse("celeba-spatial:16")) == "celeba-spatial:16"
    assert picked("cpu", quick=True) == ["cifar10:32"]
    assert {"celeba-masked-128:4", "celeba-masked-512:4", "celeba-spatial:4", "cifar10:32"} <= set(picked("cpu"))
    cuda = [shape for shape in picked("cuda") if not shape.startswith("tiny")]
    assert len(cuda) == len(set(cuda)) == 15 and cuda[:2] == ["celeba-masked-512:128", "cifar10:128"]


@pytest.mark.parametrize(("capability", "sides"), [("AVX2", 4), ("AVX512", 8)])
def test_a_cpu_that_emulates_bf16_leaves_it_out(
    capability: str, sides: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    flags = argparse.Namespace(shapes=None, quick=True, sides=None)
    (case,) = step_bench.pick_cases(flags, CPU)
    assert isinstance(case, partial) and len(case.args[1]) == sides
    # nor is its peak measured
    assert set(case(CPU).labels["peak_flops"]) == ({"fp32"} if capability == "AVX2" else {"fp32", "bf16"})
    assert ("left out" in capsys.readouterr().err) == (capability == "AVX2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes celeba", "argument --shapes: 'celeba' is no shape: give SETTING:BATCH, a setting of celeba-"),
        ("--shapes cifar10:1", "argument --shapes: 'cifar10:1' is no shape"),
        ("--device cpu --sides fastle", "argument --sides: invalid choice: 'fastle'"),
    ],
)
def test_bad_input_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bad_input(main, arguments, expected, capsys)


def test_a_side_of_another_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--sides", "fastle captured"])
    assert "--sides fastle captured: not on cpu; give some of plain, " in capsys.readouterr().err


def test_result_is_what_the_optimizer_saw() -> None:
    start, images = a_start(tiny())
    step = make_side(start, "fastle eager").make()
    result = first_step(step, images)
    seen = [p.grad for p in step.model.parameters()]
    assert all(g is not None for g in seen)
    torch.testing.assert_close([g.float() for g in result.gradients], seen, rtol=1e-6, atol=0)
    assert distance(result.weights, [w.double() for w in start.parameters()]) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    sides = ("plain", "plain bf16", "fastle eager", "fastle eager bf16")
    report = run_tiny(main, tmp_path, "--shapes", "cifar10:16", "--sides", *sides, device="cuda")
    assert all(side["ms"]["p50"] > 0 and side["peak_bytes"] > 0 for side in report["rows"][0]["sides"].values())
