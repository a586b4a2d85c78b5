"""Checkpoints and atomic files: whole or not there, readable or named in one line."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fastle.checkpoint import (
    KEPT,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    read_run_config,
    save_checkpoint,
    write_atomic,
)


def save(run: Path, step: int, value: float = 0.0) -> Path:
    return save_checkpoint(run, step, {"model": {"a.weight": torch.full((2, 3), value)}}, {"step": step})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    weights = {"a": torch.randn(2, 3), "b.c": torch.arange(5), "scalar": torch.tensor(1.5)}
    # channels-last weights are not contiguous
    weights["conv"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    path = save_checkpoint(tmp_path, 7, {"model": weights, "optimizer": {"0.step": torch.tensor(3.0)}}, {"step": 7})
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata == {"step": 7}
    assert checkpoint.section("optimizer") == {"0.step": torch.tensor(3.0)}
    loaded = checkpoint.section("model")
    assert loaded.keys() == weights.keys()
    assert all(
        torch.equal(loaded[name], weights[name]) and loaded[name].dtype == weights[name].dtype for name in weights
    )


def test_a_section_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no judge"):
        load_checkpoint(save(tmp_path, 1)).section("judge")


def test_the_newest_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000100.safetensors",
        "step-00001000.safetensors",
    ]
    assert KEPT == 2
    assert latest_checkpoint(tmp_path).name == "step-00001000.safetensors"


@pytest.mark.parametrize("kept", [0, 4, 50, -1])
def test_a_truncated_checkpoint_names_itself_and_the_way_out(tmp_path: Path, kept: int) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "step-00000001.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_safetensors_file_of_someone_else_is_no_checkpoint(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "checkpoints" / "step-00000001.safetensors"
    path.parent.mkdir()
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_run_config(tmp_path)


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk(tmp_path: Path) -> None:
    """On a real file system of 1 MiB: the earlier checkpoint stays whole and is the newest."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.decode().strip()}")
    try:
        small = save(tmp_path, 1, value=3.0)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_checkpoint(tmp_path, 2, {"model": {"big": torch.zeros(2**20)}}, {"step": 2})
        assert latest_checkpoint(tmp_path) == small
        assert load_checkpoint(small).section("model")["a.weight"].eq(3.0).all()
        assert [path.name for path in small.parent.iterdir()] == [small.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
