"""The commands as a user meets them: what they print, write and refuse."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

import fastle.commands.eval
import fastle.commands.main
import fastle.commands.train
import fastle.training.loop
from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.commands.cli import one_line_errors
from fastle.config import OPTIONS
from fastle.options import Group
from fastle.training.run import RunDirectory

Command = Callable[..., tuple[int, str, str]]
TINY = ("--steps", "2", "--batch-size", "4", "--slices", "8", "--device", "cpu")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command("train" or "main", argument…): exit status, stdout and stderr, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 16)
    monkeypatch.setenv("COLUMNS", "200")

    def call(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            entry = fastle.commands.train if name == "train" else fastle.commands.main
            entry.main([str(argument) for argument in arguments])
        except SystemExit as left:
            # sys.exit with a text prints it on stderr and leaves with 1
            status = left.code if isinstance(left.code, int) else 1
            if isinstance(left.code, str):
                printed = capsys.readouterr()
                return status, printed.out, printed.err + left.code + "\n"
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twenty small pictures in two folders, of several sizes, none with a side below 32."""
    root = tmp_path / "photographs"
    for i in range(20):
        path = root / ("red" if i % 2 else "blue") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32 + i, 40), ((200, 10 * i, 9) if i % 2 else (9, 10 * i, 200))).save(path)
    return root


def test_dry_run_reads_nothing_and_makes_nothing(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("train", "celeba", "--latent", "512", "--masked", "--data", "/nowhere", "--dry-run")
    assert status == 0
    assert "parameters 36.32 M  compression 96x  latent 512" in out
    assert "63,550 (50 epochs of 1,271)" in out
    for setting in ("hole-ratio 0.35", "judge step-frozen", "crop-ratio 0.15", "lr 0.001", "batch-size 128"):
        assert setting in out
    assert "data /nowhere" in out and all(len(line) <= 80 for line in out.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_crops(command: Command) -> None:
    _, out, _ = command("train", "celeba", "--crop-ratio", "0.1", "--crop-ratio-max", "1", "--crops", "2", "--dry-run")
    assert "crop-ratio 0.1 crop-ratio-max 1.0 crops 2" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [("folder",), ("folder", "--data", "/nowhere"), ("cifar10",)])
def test_dry_run_needs_no_images(command: Command, arguments: tuple[str, ...]) -> None:
    status, out, _ = command("train", *arguments, "--dry-run")
    assert status == 0 and "50 epochs" in out


def test_dry_run_of_a_folder_counts_its_steps(command: Command, photographs: Path) -> None:
    status, out, _ = command("train", "folder", "--data", photographs, "--size", "32", "--batch-size", "4", "--dry-run")
    assert status == 0 and "200 (50 epochs of 4)" in out


def test_the_device_is_always_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device: cpu, " in command("train", "shapes", *TINY)[1]
    automatic = command("train", "shapes", *TINY[:-1], "auto")[1]
    assert re.search(r"device: cpu, \d+ threads\nno GPU: .+\na CPU is many times slower", automatic)
    status, _, err = command("train", "shapes", *TINY[:-1], "cuda")
    assert status == 1 and re.fullmatch(
        r"fastle-train: error: --device cuda is not available: .+; use --device cpu\n", err
    )


def test_train_eval_and_reconstruct_one_s_own_photographs(
    command: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = command(
        "train", "folder", "--data", photographs, "--size", "32", "--masked", "--run", "mine", *TINY
    )
    assert (status, err) == (0, "")
    assert "18 training images, 1 to validate, 2 steps" in out and "`fastle eval mine`" in out

    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command("main", "eval", "mine", "--device", "cpu")
    assert (status, err) == (0, "")
    figures = json.loads((tmp_path / "mine" / "eval-test.json").read_text())
    assert figures["images"] == 1 and figures["step"] == 2 and figures["data"] == "test split"
    assert figures["clean"].keys() == {
        "psnr", "psnr_of_mean_mse", "ssim", "contrast", "sharpness", "psnr_luma", "psnr_chroma",
        "spectral_peak",
    }  # fmt: skip
    assert figures["masked"].keys() >= {"psnr_inside", "psnr_outside", "ssim_inside", "ssim_outside"}
    assert f"{figures['clean']['psnr']:.2f} dB" in out and "eval-test.json" in out
    # in a terminal of 80 columns nothing is cut off
    assert f"{figures['masked']['ssim_outside']:.4f}" in out and "…" not in out

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    status, _, err = command("main", "eval", "mine", "--perceptual", "--device", "cpu")
    assert status == 1 and err.endswith('not installed: pip install "fastle[perceptual]"\n')
    assert command("main", "eval", "mine", "--data", photographs / "red", "--device", "cpu")[0] == 0
    (of_red,) = (tmp_path / "mine").glob("eval-data-red-*.json")
    assert json.loads(of_red.read_text())["images"] == 10

    files = sorted((photographs / "red").iterdir())[:3]
    assert command("main", "reconstruct", "mine", *files, "-o", "out/picture.png", "--device", "cpu")[0] == 0
    # a model that ships, too, shows how it fills holes if it was trained with them
    assert command("main", "reconstruct", "cifar10-masked", *files, "-o", "out/shipped.png", "--device", "cpu")[0] == 0
    for name in ("picture", "shipped"):
        picture = Image.open(tmp_path / "out" / f"{name}.png")
        # four rows of three tiles, 32 px thrice enlarged
        assert picture.height == 4 + 4 * (96 + 4) and picture.width > 3 * 96


def test_figures_of_folders_with_one_name_lie_side_by_side(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("train", "shapes", "--run", "run", *TINY)
    monkeypatch.setattr(fastle.commands.eval, "evaluate", lambda *_, **__: {"clean": {"psnr": 20.0}})
    for name in ("A", "B"):
        (tmp_path / name / "test").mkdir(parents=True)
        Image.new("L", (32, 32)).save(tmp_path / name / "test" / "1.png")
        assert command("main", "eval", "run", "--data", f"{name}/test", "--device", "cpu")[0] == 0
    monkeypatch.chdir(tmp_path / "A")
    assert command("main", "eval", "../run", "--data", "test", "--device", "cpu")[0] == 0
    figures = [json.loads(path.read_bytes()) for path in (tmp_path / "run").glob("eval-data-test-*.json")]
    assert sorted(figure["data"] for figure in figures) == [str(tmp_path / name / "test") for name in ("A", "B")]


def test_eval_beside_a_live_training_names_the_checkpoint_that_it_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("train", "shapes", "--run", "run", *TINY)
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / "step-00000002.safetensors"
    original, read = load_checkpoint, []

    def load(path: Path, *sections: object) -> object:
        read.append(path.name)
        if len(read) == 1:
            # the training deletes it at this moment
            path.rename(path.with_name("step-00000007.safetensors"))
        return original(path, *sections)  # type: ignore[arg-type]

    def evaluate(*_: object, **__: object) -> object:
        (checkpoints / read[-1]).with_name("step-00000009.safetensors").write_bytes(b"newer still")
        return {"clean": {"psnr": 20.0}}

    monkeypatch.setattr(fastle.checkpoint, "load_checkpoint", load)
    monkeypatch.setattr(fastle.commands.eval, "evaluate", evaluate)
    assert command("main", "eval", "run", "--device", "cpu")[0] == 0
    assert read == [newest.name, "step-00000001.safetensors"]
    assert json.loads((tmp_path / "run" / "eval-test.json").read_bytes())["checkpoint"] == read[-1]


def test_figures_are_shown_though_they_cannot_be_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("train", "shapes", "--run", "run", *TINY)
    monkeypatch.setattr(fastle.commands.eval, "evaluate", lambda *_, **__: {"clean": {"psnr": 20.0}})
    (tmp_path / "run" / "eval-test.json").mkdir()
    status, out, err = command("main", "eval", "run", "--device", "cpu")
    assert status == 1 and "20.00 dB" in out and "eval-test.json" in err


def test_reconstruct_does_not_overwrite_what_it_should_not(command: Command, tmp_path: Path, photographs: Path) -> None:
    photograph = next(photographs.rglob("*.png"))
    (tmp_path / "link.png").symlink_to(photograph)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    before = photograph.read_bytes()
    for output, words in (
        (photograph, "is one of the images, which it would overwrite"),
        ("link.png", "is one of the images, which it would overwrite"),
        (photograph.parent / ".." / photograph.parent.name / photograph.name, "is one of the images"),
        ("run/config.json", "give it a name that ends in .png"),
        ("folder.png", "folder.png is a folder"),
        ("file/out.png", "no file can be written to"),
    ):
        # before the run is looked at
        status, _, err = command("main", "reconstruct", "missing", photograph, "-o", output, "--device", "cpu")
        assert status == 1 and words in err and err.count("\n") == 1 and "--run" not in err
    assert photograph.read_bytes() == before


def test_help_shows_every_option_in_its_group(command: Command) -> None:
    status, out, _ = command("train", "--help")
    groups = re.findall(r"^(data|model|objective|training|speed|output):\n((?:  .*\n)+)", out, re.MULTILINE)
    assert status == 0 and [name for name, _ in groups] == list(get_args(Group))
    flags = {name: re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE) for name, text in groups}
    for option in (*OPTIONS.values(), *fastle.commands.train.FLAGS.values()):
        assert option.name == "dataset" or flags[option.group].count(option.flag) == 1
    assert sum(map(len, flags.values())) == len(OPTIONS) - 1 + len(fastle.commands.train.FLAGS)
    for own in ("--size", "--channels", "--download"):
        assert own in flags["data"]
    assert "--hidden" in flags["model"] and "--step" in flags["speed"] and "--run" in flags["output"]
    text = " ".join(out.split())
    assert "share of the input that the hole covers, with --masked, above 0 and below 1 (default: 0.35)" in text


def test_a_folder_read_in_grey(command: Command, photographs: Path, tmp_path: Path) -> None:
    grey = ("--data", photographs, "--size", "32", "--channels", "1")
    status, out, err = command("train", "folder", *grey, "--run", "grey", *TINY)
    assert (status, err) == (0, "")
    assert out.count("decoder: torchvision, because DALI decodes colour images only") == 1
    assert command("main", "eval", "grey", "--device", "cpu")[0] == 0
    figures = json.loads((tmp_path / "grey" / "eval-test.json").read_text())
    assert "psnr_chroma" not in figures["clean"]
    refused = command("train", "folder", *grey, "--run", "other", "--decoder", "dali", *TINY)
    assert refused[0] == 1 and "decodes colour images only" in refused[2]


def test_warnings_of_fastle_are_lines_and_others_stay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = str(Path(fastle.commands.train.__file__).parents[1] / "kernels" / "any.py")
    logger = logging.getLogger("torch.utils.cpp_extension")
    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *place: others.append(str(message)))
    with one_line_errors("fastle-train"):
        warnings.showwarning("fastle compiles " + "for long " * 12, UserWarning, ours, 7)
        warnings.showwarning("outside", UserWarning, "/elsewhere/numpy.py", 8)
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    assert others == ["outside"]
    err = capsys.readouterr().err
    assert "any.py" not in err and not caplog.records
    lines = [line for line in err.splitlines() if "long" in line]
    assert lines[0].startswith("fastle compiles for long") and max(map(len, lines)) <= 80


def test_memory_that_ran_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors("fastle"):
        raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the docs.")
    assert str(ended.value).startswith("fastle: error: memory ran out: CUDA error: out of memory; free ")
    assert "--device cpu" in str(ended.value) and "\n" not in str(ended.value)
    with pytest.raises(SystemExit) as ended, one_line_errors("fastle"):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert str(ended.value).endswith("9 bytes; free what other programs hold")
    with pytest.raises(RuntimeError, match="a fault of ours"), one_line_errors("fastle"):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_first_lines_fit_into_a_terminal_and_none_is_blank(
    command: Command, monkeypatch: pytest.MonkeyPatch, columns: int, photographs: Path
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = command(
        "train", "folder", "--data", photographs, "--size", "32", "--decoder", "torchvision", "--run", "r", *TINY
    )
    first = out[: out.index("step 1/2")].splitlines()
    # a line that holds a path is not broken
    assert all(len(line) <= 80 or "/" in line for line in first)
    assert all(first), "a blank line"
    assert all(command("main", "eval", "r", "--device", "cpu")[1].splitlines())


def test_a_default_run_directory_for_each_setting(command: Command, tmp_path: Path) -> None:
    for flags, name in [
        ((), "shapes"),
        (("--latent", "16"), "shapes-16"),
        (("--masked",), "shapes-masked-128"),
        (("--masked", "--objective", "pixel"), "shapes-masked-128-pixel"),
    ]:
        _, out, _ = command("train", "shapes", *flags, "--dry-run")
        assert f"run        runs/{name}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shapes", "--latent", "0"), "--latent must be at least 1, not 0"),
        (("shapes", "--hole-ratio", "0.3"), "--hole-ratio has no effect without --masked"),
        (("shapes", "--channels", "3"), "--channels has no effect with shapes, whose images have 1"),
        (("folder", "--channels", "2"), "invalid choice: 2"),
        (("shapes", "--noise-std", "0.2"), "--noise-std has no effect with --transform crop-resize"),
        (("shapes", "--crop-ratio-max", "0.2"), "--crop-ratio-max must be above --crop-ratio 0.3"),
        (("shapes", "--transform", "noise", "--crops", "2"), "--crops has no effect with --transform noise"),
        (("shapes", "--profile", "1", "--against", "eager", "--accumulate", "2"), "a plain update, not --accumulate 2"),
        (("shapes", "--transform", "crop"), "invalid choice: 'crop'"),
        (("shapes", "--size", "30"), "--size must be divisible by 8"),
        (("shapes", "--size", "32x40"), "shapes are drawn on squares; give one number"),
        (("shapes", "--size", "big"), "--size must be a whole number, or HEIGHTxWIDTH such as 96x128, not big"),
        (("shapes", "--objective", "pixel", "--judge", "ema"), "--judge has no effect with --objective pixel"),
        (("shapes", "--steps", "5", "--epochs", "5"), "give either --steps or --epochs, not both"),
        (("shapes", "--data", "here"), "--data has no effect with shapes"),
        (("folder", "--data", "a.tar", "b.tar", "c.tar"), "b.tar c.tar; put a pattern of shards in quotes"),
        (("shapes", "--download"), "--download fetches CIFAR-10 and CelebA only"),
        (("shapes", "--batch-size", "20000"), "use --batch-size 12000 or less"),
        (("mnist",), "invalid choice: 'mnist'"),
        (("folder",), "folder needs --data"),
        (("folder", "--data", "missing"), "no such folder"),
        (("folder", "--data", "empty"), "no images"),
        (("celeba", "--data", "empty"), "empty"),
        (("cifar10", "--data", "empty"), "--download"),
        (("shapes", "--lr", "1e30", "--batch-size", "4", "--steps", "3"), "is not finite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line_and_no_traceback(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = command("train", *arguments, "--device", "cpu", "--run", "run")
    assert status in (1, 2)
    assert err.startswith("fastle-train: error: ") and err.count("\n") == 1
    assert message in err


def test_bad_images_are_all_listed_below_the_error(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 40)).save(tmp_path / "bad" / f"{i}.png")
        (tmp_path / "bad" / f"{i}-text.jpg").write_text("not a picture")
    small = tmp_path / "small" / "img_align_celeba"
    small.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 9)]
    for name in names:
        Image.new("RGB", (20, 24)).save(small / name)
    (tmp_path / "small" / "list_eval_partition.txt").write_text("".join(f"{n} {i // 4}\n" for i, n in enumerate(names)))
    for arguments, fault in (
        (("folder", "--data", "bad", "--size", "32"), "text.jpg is not an image that fastle decodes"),
        (
            ("folder", "--data", "small", "--size", "32"),
            "20x24, smaller than the 32x32 asked for; a run with --upscale enlarges such images",
        ),
        (("celeba", "--data", "small"), "20x24, smaller than the 128x128 asked for"),
    ):
        status, _, err = command("train", *arguments, "--batch-size", "2", "--device", "cpu", "--run", "run")
        first, *listed, last = err.splitlines()
        assert status == 1 and first == f"fastle-train: error: {len(listed)} images cannot be used:"
        assert len(listed) >= 7 and all(line.endswith(fault) for line in listed)
        assert last.endswith("--bad-images skip")


def test_errors_of_eval_and_reconstruct(command: Command, tmp_path: Path, photographs: Path) -> None:
    def refused(*arguments: str | Path) -> str:
        status, _, err = command("main", *arguments, "--device", "cpu")
        assert status == 1 and err.startswith("fastle: error: ") and err.count("\n") == 1
        return err

    assert "missing is not a run" in refused("eval", "missing")
    command("train", "shapes", "--run", "run", *TINY)
    assert "missing.png" in refused("reconstruct", "run", "missing.png", "-o", "out.png")
    assert "no such folder" in refused("eval", "run", "--data", "missing")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (20, 24)).save(tmp_path / "small" / "small.png")
    fault = "small.png is 20x24, smaller than the 32x32 asked for"
    assert fault in refused("reconstruct", "run", "small/small.png", "-o", "out.png")
    assert fault in refused("eval", "run", "--data", "small")
    assert "small is a folder: give image files" in refused("reconstruct", "run", "small", "-o", "out.png")
    (tmp_path / "small" / "small.png").write_text("no image")
    # eval has no flag to leave it out
    assert refused("eval", "run", "--data", "small").endswith("decodes; mend or remove them\n")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "`fastle check run` says what can be saved" in refused("eval", "run")


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(command: Command, tmp_path: Path) -> None:
    command("train", "shapes", "--run", "run", *TINY)
    checkpoint = latest_checkpoint(tmp_path / "run")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    remark = f"{checkpoint.relative_to(tmp_path)} cannot be read (its header is damaged, or it is truncated): "
    remark += "step-00000001.safetensors is used instead"
    for flags in (("main", "eval", "run"), ("train", "shapes", "--run", "run", *TINY)):
        status, out, _ = command(*flags)
        assert status == 0 and out.count(remark) == 1
    # it was written anew
    assert command("main", "check", "run")[0] == 0


def test_a_run_that_came_to_nothing_is_in_nobody_s_way(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(20):
        (tmp_path / "bad" / f"{i}.jpg").write_text("not a picture")
    assert command("train", "folder", "--data", "bad", "--size", "32", "--run", "run", *TINY)[0] == 1
    assert command("train", "shapes", "--run", "run", *TINY)[0] == 0


def test_another_configuration_is_one_line(command: Command) -> None:
    command("train", "shapes", "--run", "run", *TINY)
    status, _, err = command("train", "shapes", "--run", "run", *TINY, "--seed", "5")
    assert status == 1 and "train.seed 0 → 5" in err and "--overwrite" in err and err.count("\n") == 1
    assert command("train", "shapes", "--run", "run", *TINY, "--seed", "5", "--overwrite")[0] == 0


def test_a_disk_that_fills_up_while_logging(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunDirectory, row: object) -> None:
        raise OSError(28, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr(RunDirectory, "log", full)
    status, _, err = command("train", "shapes", "--run", "run", *TINY)
    assert (status, err) == (1, "fastle-train: error: run/metrics.jsonl: No space left on device\n")


def test_every_objective_row_trains_from_the_command_line(command: Command) -> None:
    rows: list[tuple[str, ...]] = [
        ("--transform", "identity", "--judge", "live"),
        ("--judge", "ema"),
        ("--transform", "detail"),
        ("--crop-ratio", "0.1", "--crop-ratio-max", "1", "--crops", "2"),
        ("--masked", "--transform", "patch-mask", "--mask-ratio", "0.4", "--hole-ratio", "0.2"),
        ("--hidden", "8", "--map-channels", "4", "--judge-statistics", "target"),
        ("--masked", "--objective", "pixel"),
        ("--transform", "channel-mask", "--mask-ratio", "0.9"),
        ("--transform", "noise", "--noise-std", "0.2"),
        ("--precision", "bf16"),
    ]
    for number, row in enumerate(rows):
        tiny = [flag for flag in TINY if "pixel" not in row or flag not in ("--slices", "8")]
        status, _, err = command("train", "shapes", "--run", f"run{number}", *row, *tiny)
        assert (status, err) == (0, ""), row
