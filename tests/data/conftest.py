"""Pictures to encode, smooth, so that codecs treat them as photographs, and what the tests of the cache share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.caches import MANY, write_splits

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(seed, width=178, height=218): an RGB image; CelebA's size unless told otherwise."""

    def make(seed: int, width: int = 178, height: int = 218) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("many"), MANY)
