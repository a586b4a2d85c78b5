"""What a kernel reads and writes: tensors in global memory, its parameters, and the shared memory of each of its CTAs.

Each address is checked before it is used: it must be a multiple of the access's size and lie in one tensor. Tensors are
far from each other here, wherever they lie on the host, so that an access beyond an edge meets nothing. Fresh shared
memory holds NaN, in fp32 and fp64 alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# alignment that a tensor keeps
ALIGNMENT = 256
# the lowest and the highest of no warps
_NOBODY = 1 << 62, -1


class MemoryFault(Exception):
    """An access that a GPU would refuse or leave undefined."""


@dataclass(frozen=True, slots=True)
class Region:
    start: int
    content: Array  # bytes


class GlobalMemory:
    # the distance of two regions, and how far into its own one begins
    region_bits, margin = 36, 1 << 20

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._starts: dict[tuple[int, int], int] = {}

    def place(self, tensor: Tensor) -> int:
        """The address of a CPU tensor, whose own memory it is; the same for the same tensor."""
        numbers = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((numbers if tensor.numel() else 0,), (1,)).view(torch.uint8)
        key = tensor.data_ptr(), flat.numel()
        if key not in self._starts:
            self._starts[key] = self.place_bytes(flat.numpy(), tensor.data_ptr() % ALIGNMENT)
        return self._starts[key]

    def place_bytes(self, content: Array, offset: int = 0) -> int:
        start = ((len(self._regions) + 1) << self.region_bits) + self.margin + offset
        self._regions.append(Region(start, content))
        return start

    def text(self, address: int) -> str:
        """The string that ends with a zero."""
        region = self._regions[(address >> self.region_bits) - 1]
        return bytes(region.content[address - region.start :]).split(b"\0")[0].decode()

    def load(self, addresses: Array, size: int) -> Array:
        """Bytes (accesses, size) at addresses (accesses,)."""
        found = np.empty((len(addresses), size), np.uint8)
        for region, chosen in self._by_region(addresses, size, "load"):
            offsets = addresses[chosen] - region.start
            found[chosen] = region.content[offsets[:, None] + np.arange(size)]
        return found

    def store(self, addresses: Array, values: Array) -> None:
        """Writes bytes (accesses, size)."""
        size = values.shape[1]
        for region, chosen in self._by_region(addresses, size, "store"):
            offsets = addresses[chosen] - region.start
            region.content[offsets[:, None] + np.arange(size)] = values[chosen]

    def _by_region(self, addresses: Array, size: int, what: str) -> list[tuple[Region, Array]]:
        _check_alignment(addresses, size, what)
        numbers = addresses >> self.region_bits
        found = []
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            if not 1 <= number <= len(self._regions):
                raise MemoryFault(f"{what} of {size} bytes at {_hex(addresses[chosen])}, which is in no tensor")
            region = self._regions[number - 1]
            offsets = addresses[chosen] - region.start
            outside = (offsets < 0) | (offsets + size > len(region.content))
            if outside.any():
                raise MemoryFault(
                    f"{what} of {size} bytes out of bounds at {_hex(addresses[chosen][outside])}: byte "
                    f"{offsets[outside][0]} of a tensor of {len(region.content)} bytes"
                )
            found.append((region, chosen))
        return found


class ParameterMemory(GlobalMemory):
    """A kernel's parameters, whose addresses fit into 32 bits."""

    region_bits, margin = 12, 256


class SharedMemory:
    """Of several CTAs, each with `size` bytes of its own, and who of them used which since the last barrier."""

    def __init__(self, ctas: int, size: int) -> None:
        self._content = np.full((ctas, size), 0xFF, np.uint8)
        self._writer = np.full((ctas, size), -1, np.int64)
        # the lowest and the highest warp that read
        self._readers = tuple(np.full((ctas, size), nobody, np.int64) for nobody in _NOBODY)

    def load(self, ctas: Array, warps: Array, addresses: Array, size: int) -> Array:
        """Bytes (accesses, size) of the CTAs (accesses,) at addresses (accesses,), read by threads of `warps`."""
        where = self._where(ctas, addresses, size, "load")
        writer = self._writer[where]
        race = (writer >= 0) & (writer != warps[:, None])
        if race.any():
            raise MemoryFault(
                f"shared load at {_hex(addresses[race.any(1)])} of what another warp stored after the last barrier"
            )
        np.minimum.at(self._readers[0], where, warps[:, None])
        np.maximum.at(self._readers[1], where, warps[:, None])
        return self._content[where]

    def store(self, ctas: Array, warps: Array, addresses: Array, values: Array) -> None:
        """Writes bytes (accesses, size)."""
        where = self._where(ctas, addresses, values.shape[1], "store")
        lowest, highest = (readers[where] for readers in self._readers)
        race = (lowest < warps[:, None]) | (highest > warps[:, None])
        if race.any():
            raise MemoryFault(
                f"shared store at {_hex(addresses[race.any(1)])} to what another warp read after the last barrier"
            )
        self._writer[where] = warps[:, None]
        self._content[where] = values

    def barrier(self, ctas: Array) -> None:
        for tracked, value in ((self._writer, -1), *zip(self._readers, _NOBODY, strict=True)):
            tracked[ctas] = value

    def _where(self, ctas: Array, addresses: Array, size: int, what: str) -> tuple[Array, Array]:
        _check_alignment(addresses, size, f"shared {what}")
        total = self._content.shape[1]
        outside = (addresses < 0) | (addresses + size > total)
        if outside.any():
            raise MemoryFault(
                f"shared {what} of {size} bytes out of bounds at {_hex(addresses[outside])}: there are {total} bytes"
            )
        return ctas[:, None], addresses[:, None] + np.arange(size)


def _check_alignment(addresses: Array, size: int, what: str) -> None:
    misaligned = addresses % size != 0
    if misaligned.any():
        raise MemoryFault(f"misaligned {what} of {size} bytes at {_hex(addresses[misaligned])}")


def _hex(addresses: Array) -> str:
    return hex(int(addresses[0]))
