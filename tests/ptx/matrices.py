"""The product of matrices that a warp's threads hold in pieces, as `mma.sync` of half precision has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WARP = 32
# a thread's group of four, and twice its place there
_GROUP, _PAIR = np.arange(WARP) // 4, np.arange(WARP) % 4 * 2


def multiplied(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """A · B + C of every warp, for A [16, 16], B [16, 8] and C [16, 8], in fp32.

    Each array has one number of each lane; numbers go in the order of PTX's a0 … a7, b0 … b3 and c0 … c3. A GPU adds in
    an order and with roundings of its own that nobody documents; here the sum is exact but for one rounding to fp32.
    """
    left = _gathered(a, [(_GROUP + i // 2 % 2 * 8, _PAIR + i % 2 + i // 4 * 8) for i in range(8)], (16, 16))
    right = _gathered(b, [(_PAIR + i % 2 + i // 2 * 8, _GROUP) for i in range(4)], (16, 8))
    places = [(_GROUP + i // 2 * 8, _PAIR + i % 2) for i in range(4)]
    result = (left @ right + _gathered(c, places, (16, 8))).astype(np.float32)
    return [result[:, rows, columns].ravel() for rows, columns in places]


def _gathered(numbers: Sequence[Array], places: Sequence[tuple[Array, Array]], shape: tuple[int, int]) -> Array:
    """The matrix of each warp, [warps, rows, columns] in fp64, from the row and column of each lane's numbers."""
    found = np.full((len(numbers[0]) // WARP, *shape), np.nan)
    for values, (rows, columns) in zip(numbers, places, strict=True):
        found[:, rows, columns] = values.reshape(-1, WARP)
    return found
