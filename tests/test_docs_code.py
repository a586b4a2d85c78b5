"""The code of the pages: blocks of Python run, and lines that call fastle are taken by the commands' own parsers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastle
import fastle.commands.main
import fastle.commands.train
from fastle.method.contract import MODEL_SETTINGS
from tests.commands.trained import save_image, save_model
from tests.test_docs import PAGES, ROOT
from tests.test_fitting import PIXELS, TINY, small_reports
from tests.test_own import Own, decoder

__all__ = ["small_reports"]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
PARSERS = {"fastle": fastle.commands.main.make_parser(), "fastle-train": fastle.commands.train.make_parser()}
# the changelog tells of flags that were
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]
WITH_PYTHON = [page for page in NOW if PYTHON.search(page.read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    """The lines of a page that call fastle, each as words. Of a line with an ellipsis, what stands before it."""
    lines = [" ".join(span.split()) for span in SPAN.findall(text)]
    for block in (*SHELL.findall(text), *INDENTED.findall(text)):
        lines += block.replace("\\\n", " ").splitlines()
    called = []
    for line in lines:
        found = re.match(r"\s*(?:torchrun .* -- )?(fastle(?:-train)? .*)", line)
        if found:
            # RUN... stands for several, and N for a number
            text = re.sub(r"\bN\b", "1", re.split(r"…|&&| > ", found[1])[0].replace("...", ""))
            called.append(shlex.split(text, comments=True))
    return called


def fault(words: list[str]) -> str | None:
    """What a parser says against a command, unless only its name stands there."""
    program, *arguments = words
    try:
        PARSERS[program].parse_args(
            arguments if len(arguments) > 1 or program == "fastle-train" else [*arguments, "--help"]
        )
    except SystemExit as left:
        return f"{' '.join(words)}: {left.code}" if left.code else None
    return None


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = [said for words in commands(page.read_text(encoding="utf-8")) if (said := fault(words))]
    assert faults == [], capsys.readouterr().err


def test_commands_are_found_and_their_faults_too(capsys: pytest.CaptureFixture[str]) -> None:
    spans, indented, block = (
        "`fastle eval RUN...`, `fastle\neval`",
        "    fastle brush --sized 3  # no",
        "fastle-train shapes",
    )
    text = f"{spans} and\n\n{indented}\n\n```sh\n{block} --steps N && ls\n```\n"
    assert [" ".join(words) for words in commands(text)] == [
        "fastle eval RUN", "fastle eval", "fastle-train shapes --steps 1", "fastle brush --sized 3",
    ]  # fmt: skip
    assert [fault(words) is None for words in commands(text)] == [True, True, True, False]
    assert fault(["fastle", "no"]) and fault(["fastle-train", "no"])


def names(page: str) -> dict[str, Any]:
    """What the blocks of a page take for granted. Batch and time are of one length: a mask fits either order."""
    B, D = 5, 8
    z = torch.randn(B, B, D, requires_grad=True)
    if page == "README.md":
        save_model(Path("runs/mine"))
    if page == "commands.md":
        np.save("z.npy", np.zeros((1, 4), np.float32))
        Path("z.npy.names.json").write_text(json.dumps(["a.jpg"]))
    if page in ("python.md", "own.md"):
        for i in range(20):
            save_image(Path(f"photographs/{i}.png"), i)
        save_image(Path("held-out/a.png"), 20)
    runtime = SimpleNamespace(run=lambda _, feed: [feed["images"]])
    given: dict[str, Any] = {
        "torch": torch, "F": torch.nn.functional, "fastle": fastle, "json": json, "numpy": np,
        "images": PIXELS, "x": torch.rand(B, 3, 128, 128), "x_hat": torch.rand(B, 3, 128, 128),
        "top": torch.zeros(B, dtype=torch.long), "left": torch.zeros(B, dtype=torch.long),
        "heights": torch.full((B,), 19), "widths": torch.full((B,), 10),
        "z": z, "z1": z[0], "z2": z[1], "proj": z, "embeddings": z, "T": B, "D": D,
        "lengths": torch.arange(1, B + 1), "slices": torch.nn.functional.normalize(torch.randn(D, 16), dim=0),
        "prediction_loss": z.square().mean(), "regularizer": fastle.SIGReg(num_slices=16),
        "Encoder": Own, "Decoder": decoder, "Features": Own, "dataclass": dataclass,
        "onnxruntime": SimpleNamespace(InferenceSession=lambda path: runtime),
    }  # fmt: skip
    # what a block replaces is another package's
    others = (
        "SIGReg",
        "lejepa",
        "LeJEPALoss",
        "LeJEPA",
        "local_proj",
        "global_proj",
        "local_views",
        "global_views",
        "BCS",
    )
    return given | {name: MagicMock() for name in others}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit: Callable[..., Any] = fastle.fit

    def tiny(*config: Any, **given: Any) -> Any:
        # networks of one's own have their widths
        less = {name: value for name, value in TINY.items() if "model" not in given or name not in MODEL_SETTINGS}
        return fit(*config, **{**given, **less, "size": 16, "device": "cpu"})

    monkeypatch.setattr(fastle, "fit", tiny)
    known = names(page.name)
    text = page.read_text(encoding="utf-8")
    for block in PYTHON.finditer(text):
        # a traceback names the line of the page
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page.relative_to(ROOT)), "exec"), known)
    results = [value for value in known.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert all(bool(value.isfinite().all()) for value in results)
