"""The index of images that need not exist: written, opened and looked up as a training does it."""

from __future__ import annotations

import re
import sys

import pytest

from scripts import many_images


def test_an_index_of_made_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["many_images.py", "--images", "20000", "--members", "50"])
    many_images.main()
    said = capsys.readouterr().out
    assert "50 members of a.tar listed" in said and "resumed in the middle of the third" in said
    shard, name = re.findall(r"such as (\d{6})\.tar, (\d{9})\.jpg", said)[0]
    assert int(name) // many_images.PER_SHARD == int(shard)
