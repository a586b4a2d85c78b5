"""How kernels.sigreg divides its work among a GPU's programs, which no GPU is needed for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastle.kernels.impl import MISSING_TRITON

if MISSING_TRITON:
    pytest.skip(MISSING_TRITON, allow_module_level=True)

from fastle.kernels import sigreg_launch, sigreg_triton
from fastle.kernels.sigreg_knots import Knots

LARGEST_AXIS = 65_535


class Recorded:
    """Stands in for a Triton kernel and keeps the grid and the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append((grid, arguments))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    recorded = {name: Recorded() for name in ("_sums_kernel", "finish_kernel", "_gradient_kernel")}
    for name, kernel in recorded.items():
        monkeypatch.setattr(sigreg_triton, name, kernel)
    return recorded


def launch(batch: int, samples: int, slices: int) -> None:
    p, knots = torch.zeros(batch * samples, slices), Knots(3.0, 17)
    statistics, deviations = sigreg_triton.statistics(p, None, samples, knots)
    sigreg_triton.projection_gradient(statistics, deviations, p, None, samples, knots)


@pytest.mark.parametrize(("batch", "samples"), [(70_000, 1), (1, 5_000_000)], ids=["tests", "samples"])
def test_no_grid_is_too_large(batch: int, samples: int, kernels: dict[str, Recorded]) -> None:
    launch(batch, samples, 1)
    for kernel in kernels.values():
        for (first, *others), arguments in kernel.launches:
            assert first < 2**31 and all(axis <= LARGEST_AXIS for axis in others)
            # every sample has a program
            assert arguments.get("rows", samples) * arguments["splits"] >= samples


def test_tests_that_fill_the_gpu_take_one_launch_forward(kernels: dict[str, Recorded]) -> None:
    launch(256, 128, 256)
    assert not kernels["finish_kernel"].launches
    ((_, arguments),) = kernels["_sums_kernel"].launches
    assert arguments["splits"] == 1 and arguments["WHOLE"]


@pytest.mark.parametrize(("multiprocessors", "splits"), [(128, 32), (132, 64)])
def test_a_single_test_is_split_until_each_multiprocessor_has_two_programs(
    multiprocessors: int, splits: int, kernels: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sigreg_triton, "launch_on", lambda _: (sigreg_launch.HOPPER, multiprocessors))
    launch(1, 2048, 1024)
    ((grid, arguments),) = kernels["_sums_kernel"].launches
    assert grid == (8 * splits,) and arguments["splits"] == splits and len(kernels["finish_kernel"].launches) == 1


def test_a_thread_has_a_slice() -> None:
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None):
        choice = sigreg_launch.launch_for(capability)
        assert choice.warps * choice.threads == sigreg_launch.BM * sigreg_launch.BN
    # of Hopper a measurement says so
    assert sigreg_launch.launch_for((9, 0)).programs == 2 * sigreg_launch.launch_for((8, 9)).programs


@pytest.mark.parametrize("knots", [2, 10, 17, 25, 41, 101])
def test_every_block_of_knots_is_in_one_launch(knots: int) -> None:
    grid = Knots(3.0, knots)
    groups = sigreg_launch.group_constants(grid)
    blocks = [block for group in groups for block in range(group["FIRST"], group["FIRST"] + group["GROUP"])]
    assert blocks == list(range(grid.blocks))
    sums = [group["GROUP"] * (4 * grid.reach + 2) for group in groups]
    assert max(sums) <= sigreg_launch.MAX_SUMS
