"""How SIGReg's Triton kernels are launched: tiles, threads and programs, splits of samples, compile-time arguments."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .sigreg_knots import Knots

# one thread for each slice of a tile: in the first stage no sum is spread over threads, which would take shuffles and
# barriers
BN, BM = 1, 128
# a program that holds more sums than these spills registers
MAX_SUMS = 48
# rows between two times that their expectation is taken off the sums; a split has a multiple of them
CHUNK = 32
# a program needs this many rows to pay for its start and its partial sums; the gradient, which has no sums, needs
# fewer, and so do the sums where programs would be too few for the GPU (measured on an H100)
MIN_ROWS, FEWEST_ROWS = 64, 32
# loads of partial sums that a thread of the second stage has in flight; with more, it spills registers
MAX_LOADS = 72
# with more splits than these, threads share them
SHARED_SPLITS = 8


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched on GPUs of one generation; chosen by counts (docs/sigreg.md) where not measured."""

    warps: int
    # threads of a warp, and slices of the second stage's programs, which are one warp each where splits are few
    threads: int
    # with this many on each multiprocessor, a split of the samples would only cost another launch
    programs: int
    # whether six products in bf16 were measured to take less time than one in fp32
    tensor_cores: bool = False


# what issues 128 fp32 operations a cycle needs four warps for each scheduler to hide their latency
WIDE = Launch(warps=4, threads=32, programs=4)
# measured on an H100 with one shape: 256 tests of 128 samples take 180 µs, and 201 with WIDE
HOPPER = Launch(warps=4, threads=32, programs=8, tensor_cores=True)
# sm_75 and sm_80 issue 64, so two do
NARROW = Launch(warps=4, threads=32, programs=2)
# AMD's warps have 64 threads: with four, two threads would have the same slice
AMD = Launch(warps=2, threads=64, programs=4)


def launch_for(capability: tuple[int, int] | None) -> Launch:
    """The launch on an NVIDIA GPU of this compute capability, or on AMD's for None."""
    if capability is None:
        return AMD
    if capability == (9, 0):
        return HOPPER
    return NARROW if capability <= (8, 0) else WIDE


def split_rows(samples: int, programs: int, wanted: int, least: int) -> tuple[int, int]:
    """(rows of a split, splits) with which `programs` of all samples become about as many as are `wanted`.

    A split has at least `least` rows, if there are as many.
    """
    splits = max(1, round(wanted / programs))
    rows = min(max(math.ceil(samples / splits), least), samples)
    rows = math.ceil(rows / CHUNK) * CHUNK
    return rows, math.ceil(samples / rows)


def least_rows(samples: int, programs: int, multiprocessors: int) -> int:
    """The fewest rows of a split whose program writes partial sums."""
    splits = math.ceil(samples / MIN_ROWS)
    # a test in one piece takes a launch less
    return MIN_ROWS if splits == 1 or programs * splits >= 2 * multiprocessors else FEWEST_ROWS


def finish_constants(splits: int, launch: Launch, knots: Knots) -> dict[str, int]:
    """The second stage's tile of BS splits and BM slices, its warps, and how many tiles a program loads at once."""
    if splits > SHARED_SPLITS:
        return {"BS": 16, "BM": 16, "AT_ONCE": 1, "num_warps": launch.warps}
    most = 4 if MAX_LOADS >= 4 * (4 * knots.reach + 2) else 2
    return {"BS": 1, "BM": launch.threads, "AT_ONCE": min(most, triton.next_power_of_2(splits)), "num_warps": 1}


@functools.cache
def launch_on(device: torch.device) -> tuple[Launch, int]:
    """The launch on this device, and its multiprocessors."""
    if device.type != "cuda":
        # the interpreter runs on a CPU and stands for a GPU of this size
        return WIDE, 128
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    return launch_for(capability), torch.cuda.get_device_properties(device).multi_processor_count


def group_constants(knots: Knots) -> list[dict[str, Any]]:
    """The compile-time arguments that the sums' kernel and the gradient's share, for each launch's blocks of knots."""
    most = max(1, MAX_SUMS // (4 * knots.reach + 2))
    # as even as can be: seven blocks are 3, 2 and 2
    launches = math.ceil(knots.blocks / most)
    starts = [math.ceil(i * knots.blocks / launches) for i in range(launches + 1)]
    return [
        {**knot_constants(knots), "FIRST": first, "GROUP": after - first, "BN": BN, "BM": BM}
        for first, after in itertools.pairwise(starts)
    ]


def knot_constants(knots: Knots) -> dict[str, Any]:
    """The compile-time arguments of all kernels."""
    return {"STEP": knots.step(torch.float32), "LIVE": knots.live, "REACH": knots.reach}
