"""The fingerprint of a list of images: what changes it, what does not, and how a change is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastle.data.decode import DiskFile
from fastle.data.identity import Identity, identify
from fastle.errors import DataError


def of(folder: Path) -> Identity:
    return identify([DiskFile(str(path)) for path in sorted(folder.rglob("*.png"))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        path = tmp_path / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (i + 1))
    return tmp_path / "photographs"


def test_a_moved_or_touched_folder_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(folder)
    shutil.copytree(folder, folder.parent / "elsewhere" / "deep")
    os.utime(folder / "a.png", (1, 1))
    assert of(folder) == of(folder.parent / "elsewhere" / "deep") == before and before.count == 3
    monkeypatch.chdir(folder)
    assert of(Path()) == before and before.difference(of(Path())) is None
    assert Identity(**before.to_dict()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "a.png").unlink(), "were 3 when the run was saved and are 2 now"),
        (lambda folder: (folder / "a.png").rename(folder / "aa.png"), "their names have changed"),
        (lambda folder: (folder / "sub").rename(folder / "other"), "their names have changed"),
        (lambda folder: (folder / "a.png").write_bytes(b"xy"), "sizes of the files have changed"),
    ],
    ids=["removed", "renamed", "moved", "rewritten"],
)
def test_a_change_is_named(folder: Path, change: Callable[[Path], object], words: str) -> None:
    before = of(folder)
    change(folder)
    assert words in str(of(folder).difference(before))


def test_names_that_are_not_utf8_and_files_that_are_gone(folder: Path) -> None:
    odd = folder / os.fsdecode(b"\xff\n.png")
    odd.write_bytes(b"x")
    before = of(folder)
    assert identify([DiskFile(str(folder / "gone.png")), DiskFile(str(odd))]).count == 2
    assert identify([]).count == 0 and replace(before, count=3) != before


@pytest.mark.parametrize(
    "values", [None, {}, {"count": True, "names": "", "sizes": ""}, {"count": 1, "names": ""}], ids=str
)
def test_an_identity_that_is_none_is_refused(values: object) -> None:
    assert Identity.from_dict(Identity(3, "a", "b").to_dict()) == Identity(3, "a", "b")
    with pytest.raises(DataError, match="identity of the training images must hold count, names, sizes"):
        Identity.from_dict(values)
