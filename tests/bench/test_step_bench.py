"""The bench of the step: the plain step computes what fastle computes, a wrong step has no times, a figure is right."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bench import harness, step_bench, step_measure, step_sides
from bench.measure import Effort
from bench.step_bench import Shape, make_batch, pick_shapes
from bench.step_measure import adamw, distance
from bench.step_sides import CHUNK, Result, Start, count_flops, exact, first_result, make_sides
from fastle.config import RunConfig
from fastle.method.model import Autoencoder
from fastle.method.objective import Losses, SelfTeaching
from fastle.presets import make_config
from fastle.training.plain_step import PlainAutoencoder, PlainObjective, PlainStep
from fastle.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--quick", "--shapes", "tiny:16")
SIDES = ["plain", "plain bf16", "plain compiled", "fastle eager", "fastle eager bf16"]


def tiny(masked: bool = True, latent: int | None = 6, size: int = 16, batch_size: int = 4, **flags: Any) -> RunConfig:
    flags = {"judge_statistics": "own"} | flags  # as CelebA's
    config = make_config(
        "cifar10", masked=masked, latent=latent, size=size, slices=8, crop_ratio=0.4, batch_size=batch_size, **flags
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=8, map_channels=8))


CONFIGS = {
    "celeba-masked": tiny(),
    "celeba-spatial": tiny(masked=False, latent=None, size=24),
    "cifar10": tiny(masked=False, latent=None),
    "pooled": tiny(masked=False),
    "target-statistics": tiny(judge_statistics="target"),
}


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Two rounds a row, no compiler, a tiny setting, a small matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "QUICK", Effort(seconds=0, rounds=2))
        patch.setattr(nn.Module, "compile", lambda self, **flags: None)
        patch.setitem(step_bench.SETTINGS, "tiny", tiny)
        # eight channels average away less of the rounding than a real width
        patch.setitem(step_bench.GATES, "bf16", (5e-2, 0.5, 3e-3))
        patch.setattr(step_sides, "MATRIX", {"cpu": 64, "cuda": 64})
        yield
    step_sides.measured_peak.cache_clear()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert step_bench.main([*TINY, "--json", str(path), "--sides", *SIDES]) == 0
    return path


def a_start(config: RunConfig) -> tuple[Start, Tensor]:
    return Start(config, CPU), make_batch(config, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_objective_is_fastles(name: str) -> None:
    config = CONFIGS[name]
    start, images = a_start(config)
    draws = start.draw(images, 3)
    assert draws.slices is not None
    draws, x = dataclasses.replace(draws, slices=draws.slices.double()), images.double() / 255
    ours, plain = Autoencoder(config.model), PlainAutoencoder(config.model)
    for model in (ours, plain):
        model.load_state_dict(start.weights)
        model.double().train()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    wanted = SelfTeaching(ours, config.objective)(x, draws).total
    got = PlainObjective(plain, config.objective)(x, draws)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(wanted, list(ours.parameters()))
    gradients = torch.autograd.grad(got, list(plain.parameters()))
    largest = max(float(g.norm()) for g in expected)
    for (parameter, _), mine, theirs in zip(plain.named_parameters(), gradients, expected, strict=True):
        assert float((mine - theirs).norm()) < 1e-11 * max(float(theirs.norm()), 1e-3 * largest), parameter
    # running statistics too
    torch.testing.assert_close(dict(plain.named_buffers()), dict(ours.named_buffers()), rtol=1e-12, atol=0)


def test_plain_steps_go_the_way_of_fastles() -> None:
    start, images = a_start(CONFIGS["celeba-masked"])
    plain = PlainStep(start.config, CPU, weights=start.weights, draw=start.draw)
    ours = Trainer(start.config, CPU)
    for _ in range(3):
        torch.testing.assert_close(plain(images), ours(images).total.detach(), rtol=1e-5, atol=0)
    encoder, judge = plain.model.encoder.state_dict(), plain.objective.judge.state_dict()
    for name, weight in judge.items():
        assert torch.equal(weight, encoder[name])
    # a copy, not an alias
    assert judge["stem.weight"].data_ptr() != encoder["stem.weight"].data_ptr()
    assert not any(weight.requires_grad for weight in plain.objective.judge.parameters())
    assert all(torch.isfinite(weight).all() for weight in start.weights.values())


def test_plain_step_knows_its_rows_only() -> None:
    config = make_config("cifar10", judge="ema")
    with pytest.raises(ValueError, match="step-frozen judge and crop-resize"):
        PlainObjective(PlainAutoencoder(config.model), config.objective)


def test_oracle_does_not_depend_on_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    start, images = a_start(tiny(batch_size=CHUNK // 2 + 1))
    whole = exact(start, images[: CHUNK // 4])
    monkeypatch.setattr(step_sides, "CHUNK", 3)
    parts = exact(start, images[: CHUNK // 4])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)


def test_report(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["benchmark"] == "step" and report["command"][0] == "step_bench.py"
    (row,) = report["rows"]
    assert (row["shape"], row["setting"], row["batch"], row["baseline"]) == ("tiny:16", "tiny", 16, "plain")
    assert row["refused"] is None and row["gates"].keys() == {"fp32", "bf16"} and row["convolutions"] == "fp32"
    assert list(row["sides"]) == SIDES and row["fastest"] in SIDES[3:]
    assert row["speedups"].keys() == set(SIDES[1:])
    for name, side in row["sides"].items():
        milliseconds = side["ms"]["p50"]
        assert side["status"] == "measured" and side["first_call_s"] > 0 and side["peak_bytes"] > 0
        assert side["precision"] == ("bf16" if "bf16" in name or "compiled" in name else "fp32")
        assert side["images_per_s"] == pytest.approx(16e3 / milliseconds)
        flops = row["flops_per_image"][name.split()[0]] * side["images_per_s"]
        assert side["mfu"] == pytest.approx(flops / row["peak_flops"][side["precision"]])
        assert 0 <= side["value_error"] < 5e-2 and side["gradient_error"] < 0.5 and side["update_error"] < 3e-3
        assert side["precision"] == "bf16" or side["gradient_error"] < 1e-3
        if name != "plain":
            assert row["speedups"][name] == pytest.approx(row["sides"]["plain"]["ms"]["p50"] / milliseconds)


def test_table_and_plot_are_made_from_the_report(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = report_file.with_name("plot.png")
    assert step_bench.main(["--from", str(report_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("tiny:16: a training step; GFLOP per image counted: fastle 0.00") for line in lines)
    assert all(sum(line.startswith(f"{name} ") and "–" in line for line in lines) >= 1 for name in SIDES)
    assert any(line.startswith("MFU: ") and "bf16" in line for line in lines)


def test_widest_table_and_gaps(report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU's figures, sides that did not run, a refused row, and none of the baseline."""
    report = json.loads(report_file.read_text())
    (row,) = report["rows"]
    wide = row["sides"]["plain"] | {"ms": {"p20": 1234.5, "p50": 2345.6, "p80": 3456.7, "repeats": 9}}
    wide |= {"images_per_s": 12345.6, "peak_bytes": 123_456e6, "first_call_s": 123.4}
    sides = dict.fromkeys(step_sides.NAMES, wide)
    sides["plain"] = {"status": "does not fit", "note": "does not fit (CUDA out of memory)"}
    sides["plain bf16"] = sides["plain bf16"] | {"gradient_error": None}
    sides["fastle captured"] = {"status": "failed", "note": "failed: ValueError: no such mode"}
    report["rows"] = [row | {"sides": sides, "speedups": {}}, row | {"refused": "fastle eager: value is not finite"}]
    path, picture = report_file.with_name("gpu.json"), report_file.with_name("gpu.png")
    path.write_text(json.dumps(report))
    assert step_bench.main(["--from", str(path), "--plot", str(picture)]) == 1
    shown = capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert "plain does not fit (CUDA out of memory)" in shown
    assert "fastle captured failed: ValueError: no such mode" in shown
    assert "plain bf16's own gradient error is nan" in shown
    assert "REFUSED, fastle eager: value is not finite: no times" in shown
    table = [line for line in shown.splitlines() if line.strip().startswith(step_sides.NAMES) and "–" in line]
    assert table and max(map(len, table)) <= 120


def loss_off(step: Trainer, losses: Losses) -> Losses:
    return dataclasses.replace(losses, total=losses.total + 1e-3)


def gradient_off(step: Trainer, losses: Losses) -> Losses:
    for state in step.optimizer.state.values():
        state["exp_avg"] *= 1.01
    return losses


def not_moved(step: Trainer, losses: Losses) -> Losses:
    with torch.no_grad():
        step.model.decoder.head.bias.add_(1e-5)
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
    path = tmp_path / "report.json"
    assert step_bench.main([*TINY, "--json", str(path), "--sides", "plain", "fastle eager"]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["refused"].startswith("fastle eager: ") and WRONG[change] in row["refused"]
    assert not {"ms", "peak_bytes", "images_per_s"} & {key for side in row["sides"].values() for key in side}
    assert "speedups" not in row
    assert "REFUSED, fastle eager: " in capsys.readouterr().out


def test_what_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(self: nn.Module, **flags: Any) -> None:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    path = tmp_path / "report.json"
    sides = ("plain", "plain compiled", "fastle eager", "fastle compiled")
    assert step_bench.main([*TINY, "--json", str(path), "--sides", *sides]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert {name: side["status"] for name, side in row["sides"].items()} == dict(
        zip(sides, ("measured", "failed", "measured", "failed"), strict=True)
    )
    assert row["speedups"].keys() == {"fastle eager"} and row["fastest"] == "fastle eager"
    assert "plain compiled failed: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_a_mode_that_is_not_there_is_no_other_mode() -> None:
    start, images = a_start(tiny())
    with pytest.raises(ValueError, match="no mode 'folded'"):
        step_sides._make_ours(start.config, CPU, "folded")

    class Fallen:
        mode = "captured"

        def __call__(self, images: Tensor) -> None:
            self.mode = "compiled"

    with pytest.raises(RuntimeError, match="went on as compiled"):
        first_result(cast(Trainer, Fallen()), images)


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
    stem = 64 * 16 * 3 * h
    trunk = 16 * 9 * h * 2 * h + 16 * 9 * 4 * h * h + 4 * 9 * 2 * h * c + 4 * 9 * c * c
    wide = {"plain": 9, "fastle": 4}  # taps a pixel of what follows nearest x2
    for name, taps in wide.items():
        skips = (16 * c * 2 * h + 64 * 2 * h * h) // (1 if name == "plain" else 4)
        ups = 16 * taps * c * 2 * h + 16 * 9 * 4 * h * h + 64 * taps * 2 * h * h + 64 * 9 * h * h + skips
        head = 256 * taps * h * 3
        encode, judged, seen = 3 * trunk + 2 * stem, stem + trunk, 2 * (stem + trunk)
        wanted = 2 * (encode + 3 * (ups + head) + judged + seen)
        # the rest is SIGReg's, of which fastle's operator shows a part
        assert 0 <= counts[name] - wanted < 1e-3 * wanted, (name, counts[name], wanted)


def test_shapes_and_what_is_measured_by_default() -> None:
    assert str(Shape.parse("celeba-spatial:16")) == "celeba-spatial:16"

    def picked(device: str, **flags: Any) -> list[str]:
        flags = {"shapes": None, "quick": False, "sides": None} | flags
        return list(map(str, pick_shapes(argparse.Namespace(**flags), torch.device(device))))

    assert picked("cpu", quick=True) == ["celeba-masked-128:4"]
    assert {"celeba-masked-128:4", "celeba-masked-512:4", "celeba-spatial:4", "cifar10:32"} <= set(picked("cpu"))
    cuda = [shape for shape in picked("cuda") if not shape.startswith("tiny")]
    assert len(cuda) == len(set(cuda)) == 12 and cuda[:2] == ["celeba-masked-512:128", "cifar10:128"]
    assert step_sides.names(torch.device("cuda")) == list(step_sides.NAMES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--shapes celeba",
            "argument --shapes: 'celeba' is no shape: give SETTING:BATCH, a setting of celeba-masked-128",
        ),
        ("--shapes cifar10:1", "argument --shapes: 'cifar10:1' is no shape"),
        ("--device cpu --sides fastle", "argument --sides: invalid choice: 'fastle'"),
    ],
)
def test_bad_input_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step_bench.main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"step_bench.py: error: {expected}")


def test_a_side_of_another_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_bench.main(["--device", "cpu", "--sides", "fastle captured"])
    assert "--sides fastle captured: not on cpu; give some of plain, " in capsys.readouterr().err


def test_result_is_what_the_optimizer_saw() -> None:
    start, images = a_start(tiny())
    (side,) = make_sides(start, ["fastle eager"])
    step = side.make()
    result: Result = first_result(step, images)
    seen = [p.grad for p in step.model.parameters()]
    assert all(g is not None for g in seen)
    torch.testing.assert_close([g.float() for g in result.gradients], seen, rtol=1e-6, atol=0)
    assert step_measure.distance(result.weights, [w.double() for w in start.parameters()]) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    monkeypatch.setitem(step_sides.MATRIX, "cuda", 1024)
    sides = ("plain", "plain bf16", "fastle eager", "fastle eager bf16")
    arguments = ["--device", "cuda", "--quick", "--shapes", "cifar10:16", "--json", str(path), "--sides", *sides]
    assert step_bench.main(arguments) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert all(side["ms"]["p50"] > 0 and side["peak_bytes"] > 0 for side in row["sides"].values())
