"""Checkpoints: whole or not there, readable or named in one line."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastle.checkpoint import (
    KEPT,
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    newest_good_checkpoint,
    read_run_config,
    save_checkpoint,
    with_checksum,
)
from fastle.errors import FastleError
from fastle.files import CannotWrite


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
    assert refusal(path).startswith(f"{path} cannot be read (") and f"`fastle check {tmp_path}`" in refusal(path)


def refusal(path: Path) -> str:
    """The one line in which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    state = {"model": {"a": torch.randn(5, 3), "n": torch.tensor(7)}, "optimizer": {"0.step": torch.tensor(9.0)}}
    path = save_checkpoint(tmp_path, 9, state, {"step": 9, "train_images": 5, "config": {"x": None}})
    before = path.read_bytes()
    chosen = random.Random(0).sample(range(8 * len(before)), 400)
    for bit in chosen:
        damaged = bytearray(before)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refusal(path)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: Any, tensors: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def permute(header: Any) -> None:
    header["model.a.weight"]["shape"] = [3, 2]


def retype(header: Any) -> None:
    header["model.a.weight"]["dtype"] = "I32"


def rename(header: Any) -> None:
    header["model.b.weight"] = header.pop("model.a.weight")


def forget(header: Any) -> None:
    header["__metadata__"]["fastle"] = header["__metadata__"]["fastle"][9:]


def resign(**changes: Any) -> Callable[[Any], None]:
    """Changes metadata, and makes its checksum right."""

    def change(header: Any) -> None:
        values = json.loads(header["__metadata__"]["fastle"][9:]) | changes
        text = json.dumps({name: value for name, value in values.items() if value != "gone"})
        header["__metadata__"] = {"fastle": with_checksum(text)}

    return change


def entry(**changes: Any) -> Callable[[Any], None]:
    return lambda header: header["model.a.weight"].update(changes)


NONSENSE: dict[str, tuple[Callable[[Any], object], str]] = {
    "another shape": (permute, "the checksum of model is wrong"),
    "another type": (retype, "the checksum of model is wrong"),
    "another name": (rename, "the checksum of model is wrong"),
    "no checksum": (forget, "it lacks checksums"),
    "no checksums": (resign(checksums={}), "it lacks checksums"),
    "odd checksums": (resign(checksums=5), "it lacks checksums"),
    "negative step": (resign(step=-1), "its step is -1"),
    "true step": (resign(step=True), "its step is True"),
    "real step": (resign(step=2.0), "its step is 2.0"),
    "giant step": (resign(step=2**63), "its step is 9223372036854775808"),
    "text for step": (resign(step="2" * 10**5), "its step is 222"),
    "no step": (resign(step="gone"), "it does not say of which step it is"),
    "step of another name": (resign(step=3), "it is of step 3: it was renamed"),
    "negative images": (resign(train_images=-5), "its train_images is -5"),
    "later format": (resign(format=3), "its format is 3"),
    "true format": (resign(format=True), "its format is True"),
    "old format": (resign(format="gone"), "its metadata is damaged"),
    "metadata is no text": (lambda header: header.update(__metadata__={"fastle": 5}), "its header is damaged"),
    "metadata is no object": (lambda header: header.update(__metadata__=[]), "its header is damaged"),
    "negative shape": (entry(shape=[-2, -3]), "its header is damaged"),
    "real shape": (entry(shape=[2.0, 3]), "its header is damaged"),
    "true shape": (entry(shape=[True, 6]), "its header is damaged"),
    "giant shape": (entry(shape=[2**40, 3]), "a shape and a number of bytes disagree"),
    "giant shape and bytes": (entry(shape=[2**40], data_offsets=[0, 2**42]), "its header speaks of"),
    "beyond 64 bits": (entry(shape=[2**63]), "its header is damaged"),
    "overlap": (entry(shape=[1], data_offsets=[4, 8]), "tensors overlap, or leave a gap"),
    "unknown type": (entry(dtype=["F32"]), "its header names an unknown type of numbers"),
    "no entry": (lambda header: header.update({"model.a.weight": 5}), "its header is damaged"),
    "one more field": (entry(more=1), "its header is damaged"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_in_a_header_is_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    header, tensors = parts(path)
    change, message = NONSENSE[name]
    change(header)
    put(path, header, tensors)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 10**5 + b"]" * 10**5, "nested deeper"),
        (b'{"a":' * 10**4 + b"1" + b"}" * 10**4, "nested deeper"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "1e999 is beyond every number"),
        (b"\xff", "not text in UTF-8"),
        (b"[]", "its header is damaged"),
        (b" " * 2**21, "its header is damaged"),
        (b'"\\' * 10**4, "Unterminated string"),
        (b'{"a": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=range(10),
)
def test_hostile_json_is_refused_at_once(header: bytes, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    put(path, header, b"")
    assert message in refusal(path)
    (tmp_path / "config.json").write_bytes(header)
    with pytest.raises(FastleError, match=re.escape(str(tmp_path / "config.json"))) as error:
        read_run_config(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    path.unlink()
    os.mkfifo(path)
    assert "it is not a regular file" in refusal(path)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        read_run_config(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value: float, tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"model\.a\.weight is not finite; the last good checkpoint is step-00000001"
    ):
        save(tmp_path, 2, value)
    assert list(first.parent.iterdir()) == [first]
    # a file of a version that saved it
    tensors = {"model.a": torch.tensor([1.0, value])}
    safetensors.torch.save_file(tensors, first, {"fastle": '{"step": 1, "train_images": 5}'})
    assert "model.a is not finite" in refusal(first)


def test_only_what_is_read_must_be_intact(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(4)}, "optimizer": {"0.step": torch.tensor(9.0)}}
    path = save_checkpoint(tmp_path, 9, state, {"step": 9})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refusal(path)
    header, _ = parts(path)
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    good = "model" if last.startswith("optimizer") else "optimizer"
    assert load_checkpoint(path, (good,)).tensors.keys() == {name for name in header if name.startswith(good)}


def test_the_newest_good_checkpoint_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)

    def fits(checkpoint: Checkpoint) -> None:
        if checkpoint.tensors["model.a.weight"][0, 0] == 2:
            raise checkpoint.unfit("holds twos")

    nothing: Callable[[Checkpoint], None] = lambda checkpoint: None  # noqa: E731
    assert newest_good_checkpoint(tmp_path, nothing)[1] is None
    assert newest_good_checkpoint(tmp_path, fits)[1] == f"{new} holds twos: {old.name} is used instead"
    new.write_bytes(new.read_bytes()[:-1])
    checkpoint, remark = newest_good_checkpoint(tmp_path, nothing)
    assert checkpoint.path == old and remark is not None
    assert remark.startswith(f"{new} cannot be read (") and remark.endswith(f": {old.name} is used instead")
    # the run goes on: what could not be used is set aside, and is not what the run resumes from next time
    newer = save_checkpoint(tmp_path, 1, {"model": {"a.weight": torch.ones(2, 3)}}, {"step": 1})
    assert sorted(path.name for path in newer.parent.iterdir()) == [old.name, f"{new.name}.damaged"]
    old.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000001\.safetensors cannot be read .*: `fastle check "):
        newest_good_checkpoint(tmp_path, nothing)


def test_steps_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path).name == "step-100000000.safetensors"


def test_a_checkpoint_needs_no_more_memory_than_its_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2**20)}}, {"step": 1})
    tracemalloc.start()
    load_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * path.stat().st_size


def test_a_safetensors_file_of_someone_else_is_no_checkpoint(tmp_path: Path) -> None:
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


def test_a_full_disk(tmp_path: Path) -> None:
    """On a real file system of 1 MiB: the earlier checkpoint stays whole and is the newest."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.decode().strip()}")
    try:
        small = save(tmp_path, 1, value=3.0)
        with pytest.raises(CannotWrite, match="No space left on device"):
            save_checkpoint(tmp_path, 2, {"model": {"big": torch.zeros(2**20)}}, {"step": 2})
        assert latest_checkpoint(tmp_path) == small
        assert load_checkpoint(small).section("model")["a.weight"].eq(3.0).all()
        assert [path.name for path in small.parent.iterdir()] == [small.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.arange(3.0)}, "optimizer": {"0.step": torch.tensor(1.0)}}
    files = {save_checkpoint(tmp_path / str(n), 1, state, {"step": 1}).read_bytes() for n in range(8)}
    assert len(files) == 1
