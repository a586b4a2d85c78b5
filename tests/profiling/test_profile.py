"""--profile: what it prints, what it writes, and that its figures are those of the step."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import fastle.commands.train
import fastle.profiling.measure
import fastle.profiling.profile
import fastle.training.loop
from fastle.config import RunConfig
from fastle.phases import PHASES, phase
from fastle.presets import make_config
from fastle.profiling.measure import count_flop
from fastle.profiling.profile import profile
from fastle.profiling.trace import phase_times

CPU = torch.device("cpu")
STEPS = 2
TINY = ("--masked", "--latent", "16", "--batch-size", "4", "--slices", "8", "--device", "cpu", "--step", "eager")
NAMED = {"data wait", "draws", "encode", "decode", "views", "judge", "SIGReg", "backward", "optimizer"}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """fastle-train with arguments: exit status, stdout and the error, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)
    monkeypatch.setitem(fastle.profiling.measure.MATRIX_SIDE, "cpu", 64)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            fastle.commands.train.main(arguments)
        except SystemExit as left:
            return 1, capsys.readouterr().out, str(left.code)
        return 0, capsys.readouterr().out, ""

    return call


def tiny(**flags: Any) -> RunConfig:
    slices = {} if flags.get("objective") == "pixel" else {"slices": 8}
    whole = make_config("shapes", **{"steps": 2, "batch_size": 4} | slices | flags)
    model = replace(whole.model, size=16, hidden=8, map_channels=8, latent=None)
    return replace(whole, model=model, data=replace(whole.data, size=16))


def cells(out: str, label: str) -> list[str]:
    """What the tables hold beside a label."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    (row,) = [row[1:] for row in rows if row[0] == label]
    return row


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flop(config: RunConfig, images: int = 2) -> float:
    side = fastle.profiling.profile._fastle(config, CPU, "eager")
    zeros = torch.zeros(images, 1, *config.model.sides, dtype=torch.uint8)
    return count_flop(lambda batch: side.loss(batch).backward(), zeros)


def test_both_sides_beside_a_run_that_is_left_alone(command: Command, tmp_path: Path) -> None:
    assert command("shapes", *TINY, "--steps", "2", "--run", "run")[0] == 0
    before = contents(tmp_path / "run")
    status, out, err = command(
        "shapes", *TINY, "--precision", "bf16", "--run", "run", "--profile", str(STEPS), "--against", "eager"
    )
    assert (status, err) == (0, "")
    after = contents(tmp_path / "run")
    assert after.keys() - before.keys() == {"profile/fastle.json", "profile/eager.json"}
    assert {name: after[name] for name in before} == before

    for side, trace in (("fastle", after["profile/fastle.json"]), ("eager", after["profile/eager.json"])):
        names = [event["name"] for event in json.loads(trace)["traceEvents"] if event.get("cat") == "user_annotation"]
        assert names.count("step") == STEPS, side
        assert set(names) >= NAMED, side
        phases, total = phase_times(json.loads(trace), STEPS)
        assert phases.keys() == NAMED | {"step"} and all(times.host > 0 for times in phases.values())
        # between two steps there is next to nothing
        assert sum(times.host for times in phases.values()) == pytest.approx(total.host, rel=0.01)

    for column in range(2):
        shown = [float(cells(out, label)[column].replace(",", "")) for label in (*NAMED, "other", "total")]
        assert sum(shown[:-1]) == pytest.approx(shown[-1], rel=0.01, abs=0.1)
    assert "loss (one graph)" not in out and "device" not in out.split("nothing is trained")[1]
    fastle_flop, plain_flop = map(float, cells(out, "GFLOP for each image"))
    assert 1.1 < plain_flop / fastle_flop < 1.6
    for label in ("images/s", "TFLOP/s", "peak memory, MB"):
        assert all(float(cell.replace(",", "")) > 0 for cell in cells(out, label))
    # the plain step is fp32, whatever the run is
    assert [cell.split()[1] for cell in cells(out, "measured peak, TFLOP/s")] == ["(bf16)", "(fp32)"]
    assert "open in https://ui.perfetto.dev" in out


def test_nothing_is_made_but_the_trace(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("shapes", *TINY, "--profile", "1")
    assert status == 0
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "runs/shapes-masked-16/profile/fastle.json"
    ]
    assert "(fp32)" in cells(out, "measured peak, TFLOP/s")[0] and len(cells(out, "total")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--profile", "0"), "--profile must be at least 1, not 0"),
        (("--against", "eager"), "--against eager has no effect without --profile N"),
        (("--profile", "2", "--overwrite"), "--overwrite has no effect with --profile"),
        (("--profile", "2", "--dry-run"), "--dry-run has no effect with --profile"),
        (("--profile", "2", "--against", "eager", "--judge", "ema"), "not --judge ema --transform crop-resize"),
        (("--profile", "2", "--against", "eager", "--objective", "pixel"), "not --objective pixel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_in_one_line(
    command: Command, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    status, _, err = command("shapes", "--batch-size", "4", "--device", "cpu", *flags)
    assert status == 1 and err.startswith("fastle-train: error: ") and message in err and "\n" not in err
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in command("shapes", *TINY, "--profile", "1")[2]


def test_what_is_not_finite_has_no_profile(command: Command, tmp_path: Path) -> None:
    status, out, err = command("shapes", *TINY, "--profile", "1", "--lr", "1e30", "--run", "run")
    assert status == 1 and "not finite" in err and "try a lower --lr" in err and "total" not in out
    assert contents(tmp_path / "run") == {}


def test_a_directory_that_cannot_be_written_is_found_first(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    status, out, err = command("shapes", *TINY, "--profile", "1", "--run", "run")
    assert status == 1 and "run/profile: Not a directory" in err and "profile: 1 steps" not in out


def test_operations_are_those_of_a_count_by_hand() -> None:
    def conv(channels_in: int, channels_out: int, taps: int, pixels: int) -> int:
        return 2 * channels_in * channels_out * taps * pixels

    # maps of 16² to 2² pixels; an upsampled convolution reads 4x4 taps for each pixel of its small map
    # the stem reads 2x2 blocks of 4 channels, filled up to 8, and the head writes such blocks, one more each way
    stem = conv(8, 8, 4, 8**2)
    rest = (
        conv(8, 16, 9, 4**2) + conv(16, 16, 9, 4**2) + conv(16, 8, 9, 2**2) + conv(8, 8, 9, 2**2)  # down
        + conv(8, 16, 16, 2**2) + conv(16, 16, 9, 4**2) + conv(8, 16, 1, 2**2)  # up
        + conv(16, 8, 16, 4**2) + conv(8, 8, 9, 8**2) + conv(16, 8, 1, 4**2)
        + conv(8, 8, 4, 9**2)  # head
    )  # fmt: skip
    # backward is a product for the weights and one for the input, which the images do not ask for
    assert flop(tiny(objective="pixel")) == 3 * rest + 2 * stem


def test_operations_of_an_image_do_not_depend_on_how_many_there_are() -> None:
    assert flop(tiny(masked=True), 2) == flop(tiny(masked=True), 5) > 2 * flop(tiny(objective="pixel"))


def test_device_time_goes_to_the_phase_that_launched_it() -> None:
    def event(cat: str, name: str, ts: float, dur: float, thread: int = 1, **args: int) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": thread, "args": args}

    trace = {
        "traceEvents": [
            event("user_annotation", "step", 0, 1000),
            event("user_annotation", "loss", 100, 400),
            event("user_annotation", "encode", 200, 100),
            event("user_annotation", "backward", 600, 300),
            event("user_annotation", "somebody's", 0, 5000),
            event("gpu_user_annotation", "encode", 300, 900),
            event("user_annotation", "device wait", 1000, 500),
            event("cuda_runtime", "cudaLaunchKernel", 250, 5, correlation=1),
            # autograd launches from a thread of its own, Triton through the driver
            event("cuda_driver", "cuLaunchKernel", 700, 5, thread=2, correlation=2),
            event("cuda_runtime", "cudaMemcpyAsync", 450, 5, correlation=3),
            event("kernel", "conv", 400, 150, correlation=1),
            event("kernel", "triton", 1000, 250, correlation=2),
            event("gpu_memcpy", "Memcpy", 900, 50, correlation=3),
            {"ph": "i", "cat": "x", "name": "step", "ts": 0},
        ]
    }
    phases, total = phase_times(trace, 1)
    # the step has what of the loss has no other name
    assert {name: (round(times.host, 9), round(times.device, 9)) for name, times in phases.items()} == {
        "encode": (0.1, 0.15),
        "backward": (0.3, 0.25),
        "step": (0.6, 0.05),
        "device wait": (0.5, 0.0),
    }
    assert (total.host, round(total.device, 9)) == (1.5, 0.45)
    halves, _ = phase_times(trace, 2)
    assert halves["encode"].host == 0.05


def test_phases_are_named_under_a_profiler_only() -> None:
    assert isinstance(phase("encode"), nullcontext)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, phase("encode"):
        torch.ones(1)
    assert "encode" in [event.name for event in profiler.events()]


def test_one_graph_has_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastle.profiling.measure.MATRIX_SIDE, "cpu", 64)
    # a graph all the same, without the minute of Inductor
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled(module, backend="aot_eager"))
    output = io.StringIO()
    console = Console(file=output, width=200)
    profile(tiny(objective="pixel"), tmp_path, steps=1, device=CPU, console=console, mode="compiled")
    out = output.getvalue()
    assert "compilation included" in out and "whose phases cannot be told apart" in out
    assert float(cells(out, "loss (one graph)")[0]) > 0 and float(cells(out, "backward")[0]) > 0
    assert not any(name in line for line in out.splitlines() for name in ("│ encode", "│ decode"))
    # counted operator by operator all the same
    assert float(cells(out, "GFLOP for each image")[0]) == pytest.approx(flop(tiny(objective="pixel")) / 1e9, rel=0.01)


def test_names_of_phases_are_known() -> None:
    assert NAMED | {"loss", "replay", "step", "device wait"} == set(PHASES)
