"""SIGReg's kernels for a CPU: how they are compiled, kept and done without. Their values are in test_sigreg.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastle.kernels import sigreg_cpu
from fastle.kernels.sigreg import sigreg
from fastle.kernels.sigreg_knots import Knots
from tests.kernels.sigreg_cases import made, unit_columns

KNOTS = Knots(3.0, 17)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a new process, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (sigreg_cpu._library, sigreg_cpu._warn_slow):
        cached.cache_clear()
    yield
    sigreg_cpu._library.cache_clear()


@pytest.fixture
def compiler(forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler, and beside it the log of what it was asked to build."""
    path = tmp_path / "c++"
    path.write_text(f'#!/bin/sh\necho "$@" >> {path}.log\nexec c++ "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def built(compiler: Path) -> int:
    return sum("sigreg_cpu.cpp" in line for line in Path(f"{compiler}.log").read_text().splitlines())


def test_the_library_is_kept(compiler: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert sigreg_cpu.available(KNOTS)
        sigreg_cpu._library.cache_clear()
    assert built(compiler) == 1
    # another layout of the knots is another library; t_max is an argument
    assert sigreg_cpu.available(Knots(5.0, 17)) and built(compiler) == 1
    assert sigreg_cpu.available(Knots(3.0, 9)) and built(compiler) == 2
    kept = list((tmp_path / "cache" / "fastle" / "kernels").iterdir())
    assert len(kept) == 2 and all(path.suffix == ".so" for path in kept)


def test_a_cache_that_cannot_be_written_to_costs_time_only(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sigreg_cpu.available(KNOTS) and built(compiler) == 1


@pytest.mark.parametrize(
    ("command", "reason"), [("/nonexistent/c++", "there is no /nonexistent/c++"), ("false", "false failed: status 1")]
)
@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_it_warns_once_and_runs(command: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    z, slices = made(256, 3).requires_grad_(), torch.eye(3).repeat(1, 100)
    with pytest.warns(UserWarning, match=f"runs uncompiled .*{reason}.*GCC or Clang"):
        value = sigreg(z, slices)
    value.backward()
    torch.testing.assert_close(value.double(), sigreg(z.double(), slices.double()), rtol=2e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigreg(z, slices, knots=9).backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.usefixtures("forgotten")
def test_a_compiler_without_openmp_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "c++"
    path.write_text('#!/bin/sh\ncase "$*" in *fopenmp*) exit 1;; esac\nexec c++ "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.warns(UserWarning, match="on one thread .*no OpenMP"):
        assert sigreg_cpu.available(KNOTS)


def test_the_default_device_has_no_part_in_it() -> None:
    z, slices = made(500, 6).requires_grad_(), unit_columns(6, 101)
    expected = torch.autograd.grad(sigreg(z, slices), z)
    # on a GPU, a result there would be written to as if it were in memory
    with torch.device("meta"):
        assert torch.equal(torch.autograd.grad(sigreg(z, slices), z)[0], expected[0])


def test_threads_change_no_bit() -> None:
    z, slices = made(3, 500, 6), unit_columns(6, 101)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            value = sigreg(leaf, slices)
            results.append((value, *torch.autograd.grad(value, leaf)))
    finally:
        torch.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        # the product with the slices is the BLAS library's
        torch.testing.assert_close(gradient, results[0][1])
