"""fastle probe, export, compare and doctor, as a user meets them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastle.commands.doctor
import fastle.method.export
from fastle.method.model import Autoencoder
from fastle.method.pretrained import save_pretrained
from fastle.training.probe import linear_accuracy, nearest_accuracy
from fastle.training.report import append_metrics
from tests.commands.trained import Command, command, save_image, save_model
from tests.training.saved import CONFIG, save, train_two_steps

__all__ = ["command"]
COLOURS = {"green": (0, 180, 0), "red": (190, 0, 0), "white": (190, 190, 190)}


def save_labelled(root: Path, counts: dict[str, int]) -> None:
    for folder, count in counts.items():
        for name, colour in COLOURS.items():
            for seed in range(count):
                save_image(root / folder / name / f"{seed}.png", hash((folder, seed)) % 1000, colour)


def test_a_checkpoint_and_a_saved_model_have_the_figures_of_their_run(command: Command, tmp_path: Path) -> None:
    trainer = train_two_steps()
    trainer.config = replace(CONFIG, objective=replace(CONFIG.objective, hole_ratio=0.35))
    checkpoint = save(tmp_path / "run", trainer)
    save_pretrained(trainer.model, tmp_path / "saved", bf16=False, card=None, hole_ratio=0.35)
    for seed in range(3):
        save_image(tmp_path / "images" / f"{seed}.png", seed)
    printed = {}
    for name in ("saved", checkpoint, "run"):
        assert not list(tmp_path.rglob("eval-*"))
        status, out, err = command("eval", name, "--data", "images", "--device", "cpu")
        assert (status, err) == (0, "") and "3 images of" in out and "masked" in out
        printed[name] = out[out.index("┏") : out.rindex("┘")]
    assert printed["saved"] == printed[checkpoint] == printed["run"]
    assert [path.parent.name for path in tmp_path.rglob("eval-*")] == ["run"]
    status, _, err = command("eval", "saved", "--device", "cpu")
    assert status == 1 and "saved is not a run, and only a run knows its test split" in err and err.count("\n") == 1


def test_bits_that_are_dropped_are_said_once(command: Command, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    for name in ("a.tif", "b.tif"):
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / name)
    for arguments, count in (
        (("reconstruct", "model", "a.tif", "b.tif", "-o", "picture.png"), 2),
        (("interpolate", "model", "a.tif", "b.tif", "-o", "way.png"), 2),
        (("encode", "model", "a.tif", "-o", "z.npy"), 1),
    ):
        status, out, err = command(*arguments, "--device", "cpu")
        remark = (
            f"decoder: of {count} images with more than 8 bits, the upper 8 are kept; a run with --bits 16 keeps all"
        )
        assert (status, err) == (0, "") and [line for line in out.splitlines() if "decoder" in line] == [remark]


def test_probes_are_those_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    # classes that overlap, features of several scales, and one that is always the same
    x = torch.randn(300, 8) + 0.7 * torch.nn.functional.one_hot(labels, 8)
    x = torch.cat((x * torch.arange(1.0, 9.0), torch.ones(300, 1)), 1)
    train, test = slice(200), slice(200, 300)
    std, mean = torch.std_mean(x[train].double(), 0, correction=0)
    z = ((x - mean) / std.clamp_min(1e-12)).numpy()
    linear = linear_model.LogisticRegression(C=0.01, max_iter=1000).fit(z[train], labels[train])
    nearest = neighbors.KNeighborsClassifier(20, metric="cosine").fit(x[train], labels[train])
    given = (x[train], labels[train], x[test], labels[test], 3)
    assert linear_accuracy(*given) == pytest.approx(linear.score(z[test], labels[test]), abs=1e-9)
    assert nearest_accuracy(*given) == pytest.approx(nearest.score(x[test], labels[test]), abs=0.011)
    assert 0.4 < linear_accuracy(*given) < 0.95


def test_probe_reads_classes_beside_its_lower_lines(command: Command, tmp_path: Path) -> None:
    save(tmp_path / "run", train_two_steps())
    save_labelled(tmp_path / "split", {"train": 6, "test": 2})
    status, out, err = command("probe", "run", "--data", "split", "--device", "cpu")
    assert (status, err) == (0, "") and "3 classes, 18 images to train, 6 to test" in out
    assert out.count("decoder: ") == 1
    (written,) = (tmp_path / "run").glob("probe-split-*.json")
    figures = json.loads(written.read_text())
    assert figures["largest_class"] == pytest.approx(1 / 3)
    assert figures["pixels"] == {"features": 256, "linear": 1.0, "knn": pytest.approx(1 / 3)}
    assert figures["encoder"]["features"] == figures["random_encoder"]["features"] == 6
    assert f"{figures['encoder']['linear']:.1%}" in out

    # one folder for each class: a fifth of each is held out, the same images every time
    save_labelled(tmp_path / "whole", {".": 10})
    for _ in range(2):
        _, out, _ = command("probe", "run", "--data", "whole", "--device", "cpu")
        assert "3 classes, 24 images to train, 6 to test" in out


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        (["labelled/a/1.png", "labelled/a/2.png"], "labelled holds 1 class"),
        (["labelled/a/1.png", "labelled/b/1.png"], "labelled/a holds one image, too few"),
        (["labelled/train/a/1.png", "labelled/test/b/1.png"], "labelled/test/b is a class that labelled/train lacks"),
        ([], "labelled: no such folder"),
    ],
)
def test_what_probe_refuses(command: Command, tmp_path: Path, paths: list[str], fault: str) -> None:
    save_model(tmp_path / "model")
    for path in paths:
        save_image(tmp_path / path, 0)
    status, _, err = command("probe", "model", "--data", "labelled", "--device", "cpu")
    assert status == 1 and fault in err and err.count("\n") == 1


def test_an_exported_program_computes_what_the_model_does(command: Command, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    status, out, err = command("export", "model", "--torch-export", "out/m.pt2", "--part", "encode")
    assert (status, err) == (0, "") and "written to out/m.pt2: it takes any number of images" in out
    program = torch.export.load("out/m.pt2").module()
    # a spatial model takes any size
    x = torch.rand(7, 3, 24, 32)
    torch.testing.assert_close(program(x), model.encode(x).detach(), atol=1e-5, rtol=0)


def test_exported_onnx_computes_what_the_model_does(command: Command, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = save_model(tmp_path / "model", latent=6)
    assert command("export", "model", "--onnx", "m.onnx")[0] == 0
    x = torch.rand(7, 3, 16, 16)
    (got,) = onnxruntime.InferenceSession("m.onnx").run(["reconstructions"], {"images": x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-4)


def test_nothing_is_left_of_an_export_that_is_wrong(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    monkeypatch.setattr(fastle.method.export, "_write_program", lambda graph, example, path: path.touch())
    for off, said in ((2e-4, "off by 0.0002, where 0.0001 is the most"), (float("nan"), "off by nan")):

        def read(path: Path, off: float = off) -> object:
            model = Autoencoder.from_pretrained("model")
            return lambda x: model(x) + off

        monkeypatch.setattr(fastle.method.export, "_read_program", read)
        status, _, err = command("export", "model", "--torch-export", "m.pt2")
        assert status == 1 and said in err and "nothing is written" in err
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_export_refuses(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    assert "there is nothing to export to" in command("export", "model")[2]
    assert "--onnx m.bin: give it a name that ends in .onnx" in command("export", "model", "--onnx", "m.bin")[2]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = command("export", "model", "--onnx", "m.onnx")
    assert status == 1 and 'needs onnxscript, which is not installed: pip install "fastle[export]"' in err


def test_compare_puts_runs_side_by_side(command: Command, tmp_path: Path) -> None:
    trainer = train_two_steps()
    for number, name in enumerate(("one", "two")):
        save(tmp_path / name, trainer)
        append_metrics(tmp_path / name / "metrics.jsonl", {"step": 2, "valid_psnr": 20.5 + number, "total": 1.25})
        save_image(tmp_path / name / "grids" / "step-00000002.png", number)
    settings = json.loads((tmp_path / "two" / "config.json").read_text())
    settings["train"]["lr"] = 0.125
    (tmp_path / "two" / "config.json").write_text(json.dumps(settings))
    measured = {"step": 2, "clean": {"psnr": 19.25, "ssim": 0.5, "lpips": 0.125}}
    (tmp_path / "two" / "eval-test.json").write_text(json.dumps(measured))

    status, out, err = command("compare", "one", "two", "-o", "side.png")
    assert (status, err) == (0, "")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in out.splitlines()
        if "│" in line
    }
    assert rows["valid psnr"] == ["20.5", "21.5"] and rows["test clean psnr"] == ["", "19.25"]
    assert rows["test clean lpips"] == ["", "0.125"]
    assert rows["lr"][1] == "0.125" and "batch-size" not in rows
    assert Image.open("side.png").size == (18 + 8 + 18, 20)
    assert "other images" not in out
    settings["data"]["channels"] = settings["model"]["channels"] = 4 - settings["data"]["channels"]
    (tmp_path / "two" / "config.json").write_text(json.dumps(settings))
    assert "the runs have other images" in command("compare", "one", "two")[1]

    assert "all settings are the same" in command("compare", "one")[1]
    (tmp_path / "two" / "eval-test.json").write_text("{}")
    assert "eval-test.json cannot be used" in command("compare", "one", "two")[2]
    assert "stands there twice" in command("compare", "one", "./one")[2]
    assert "nothing is not a run" in command("compare", "one", "nothing")[2]


def test_doctor_says_what_is_used_and_what_is_slow(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fastle.commands.doctor, "NVIDIA", Path("nowhere"))
    monkeypatch.setattr(fastle.commands.doctor, "why_no_dali", lambda: "it is not installed")
    status, out, err = command("doctor")
    assert (status, err) == (0, "")
    assert (
        "eager and fp32 by default" in out
        and "because there is no GPU" in out
        and "without DALI: it is not installed" in " ".join(out.split())
    )
    assert len(out.splitlines()) <= 24

    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        out = " ".join(command("doctor")[1].split())
    assert "device mps" in out and "SIGReg and views run in torch on mps" in out and "eager and fp32" in out

    monkeypatch.setattr(fastle.commands.doctor, "LEAST_FREE", 2**63)
    status, out, err = command("doctor")
    assert status == 1 and "too little for a run" in out and "2 of what fastle needs does not work here" in err
