"""Pictures to encode: smooth, so that codecs treat them as photographs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(seed, width=178, height=218): an RGB image; CelebA's size unless told otherwise."""

    def make(seed: int, width: int = 178, height: int = 218) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make
