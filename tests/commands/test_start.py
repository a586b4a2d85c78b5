"""How the commands begin and how they end when their output or their terminal fails them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastle
import fastle.training.loop
from fastle.checkpoint import latest_checkpoint
from fastle.commands import cli
from fastle.errors import FastleError
from fastle.training.loop import Execution, train
from fastle.training.run import RunDirectory
from fastle.training.signals import Interrupted, raising_signals
from tests.training.runs import CPU, config

ROOT = Path(__file__).parents[2]
# a signal arrives as the first slow import begins
IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            for signum in {signums}:
                signal.raise_signal(signum)
sys.meta_path.insert(0, Finder())
from fastle.commands.start import {command}
{command}()
"""


@pytest.mark.parametrize(
    ("command", "arguments", "signums", "said"),
    [
        ("fastle", "check run", [signal.SIGINT], "fastle: stopped by SIGINT\n"),
        (
            "fastle_train",
            "shapes",
            [signal.SIGUSR1, signal.SIGTERM],
            "fastle-train: SIGUSR1: no step is under way\nfastle-train: stopped by SIGTERM\n",
        ),
    ],
)
def test_a_signal_during_the_imports(command: str, arguments: str, signums: list[signal.Signals], said: str) -> None:
    script = IMPORT.format(command=command, signums=[int(signum) for signum in signums])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + signums[-1], "", said)


@pytest.mark.parametrize(
    ("command", "arguments", "status"),
    [
        ("fastle_train", "shapes --dry-run", 0),
        ("fastle_train", "--help", 0),
        ("fastle", "eval --help", 0),
        ("fastle_train", "shapes --latent x", 2),
    ],
)
def test_help_dry_run_and_wrong_flags_are_answered_without_torch(command: str, arguments: str, status: int) -> None:
    script = f"""if True:
        import sys, time
        sys.argv = ["program", *{arguments.split()}]
        from fastle.commands.start import {command}
        try:
            {command}()
        finally:
            seconds = time.process_time()
            print("torch" in sys.modules, seconds < (1 if "--dry-run" in sys.argv else 0.3), file=sys.stderr)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.endswith("False True\n"), done.stderr


def test_every_public_name_is_there() -> None:
    assert sorted(fastle._HOMES) == sorted(fastle.__all__)
    assert all(getattr(fastle, name).__name__ == name for name in fastle.__all__)
    assert set(fastle.__all__) <= set(dir(fastle))
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        fastle.missing  # noqa: B018


class Closed(io.StringIO):
    """An output that is closed by its reader after some lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self._lines = lines

    def write(self, text: str) -> int:
        self._lines -= text.count("\n")
        if self._lines < 0:
            raise BrokenPipeError
        return super().write(text)


@pytest.fixture
def no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    # those of pytest
    monkeypatch.setattr(cli, "_drop_output", lambda: None)


@pytest.mark.usefixtures("no_descriptors")
def test_a_run_whose_output_is_closed_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)
    # a line before the steps, and one of the first report
    with pytest.raises(Interrupted, match="stopped and saved at step 5"):
        train(config(steps=40), tmp_path, Execution(device=CPU), console=cli.Output(file=Closed(1)))
    assert latest_checkpoint(tmp_path).name == "step-00000005.safetensors"
    assert capsys.readouterr().err == "the output was closed; stopping\n"


@pytest.mark.usefixtures("no_descriptors")
def test_a_command_whose_output_is_closed_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted), raising_signals():
        cli.Output(file=Closed(0)).print("figures")
    assert capsys.readouterr().err == "the output was closed; stopping\n"
    with pytest.raises(SystemExit) as left, cli.one_line_errors("fastle"):
        raise BrokenPipeError
    assert left.value.code == 128 + signal.SIGPIPE


def test_a_signal_does_not_hide_the_error_that_it_meets() -> None:
    def fail() -> None:
        with cli.one_line_errors("fastle-train"):
            try:
                raise FastleError("another rank is gone")
            finally:
                # while the ranks part
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="fastle-train: error: another rank is gone"):
        fail()


def test_a_terminal_without_utf8_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (
        ("ascii", "4 -> 5, 2 x 3 - ?"),
        ("latin-1", "4 -> 5, 2 × 3 - ?"),
        ("utf-8", "4 → 5, 2 × 3 – 語"),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        cli.readable_anywhere()
        print("4 → 5, 2 × 3 – 語", flush=True)
        assert raw.getvalue().decode(encoding) == shown + "\n"
