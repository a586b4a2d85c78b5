"""What kernels.sigreg does not take, and what it says then."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.kernels import reference
from fastle.kernels.sigreg import cf_deviations, sigreg
from tests import oracle
from tests.kernels.sigreg_cases import every_impl, made, marks, unit_columns

pytestmark = marks


@every_impl
@pytest.mark.parametrize(
    ("z_shape", "slices_shape", "options"),
    [
        pytest.param((4, 3), (5, 2), {}, id="dimensions-differ"),
        pytest.param((3,), (3, 2), {}, id="no-sample-axis"),
        pytest.param((4, 3), (3,), {}, id="slices-not-a-matrix"),
        pytest.param((4, 3), (1, 3, 2), {}, id="slices-with-leading-axis"),
        pytest.param((0, 3), (3, 2), {}, id="no-samples"),
        pytest.param((0, 4, 3), (3, 2), {}, id="no-tests"),
        pytest.param((4, 3), (3, 0), {}, id="no-slices"),
        pytest.param((4, 3), (3, 2), {"knots": 1}, id="one-knot"),
        pytest.param((4, 3), (3, 2), {"t_max": 0.0}, id="no-range"),
        pytest.param((4, 3), (3, 2), {"t_max": -1.0}, id="negative-range"),
        pytest.param((4, 3), (3, 2), {"t_max": math.nan}, id="nan-range"),
        pytest.param((4, 3), (3, 2), {"t_max": math.inf}, id="infinite-range"),
        pytest.param((4, 3), (3, 2), {"weights": torch.ones(5)}, id="weights-too-long"),
        pytest.param((4, 3), (3, 2), {"weights": torch.ones(4, 3)}, id="weight-for-each-feature"),
        pytest.param((2, 4, 3), (3, 2), {"weights": torch.ones(3, 4)}, id="weights-for-other-tests"),
    ],
)
def test_errors(
    z_shape: tuple[int, ...], slices_shape: tuple[int, ...], options: dict[str, Any], impl: Any, device: torch.device
) -> None:
    here: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()
    }
    match = "of nothing" if 0 in z_shape + slices_shape else r"SIGReg|do not fit|does not fit"
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=match):
            function(torch.zeros(z_shape, device=device), torch.zeros(slices_shape, device=device), impl=impl, **here)


def test_reference_alone(device: torch.device) -> None:
    z, slices = made(2, 9, 4, dtype=torch.float64), unit_columns(4, 5, torch.float64)
    weights = torch.rand(2, 9, generator=Generator().manual_seed(5), dtype=torch.float64)
    for omega in (None, weights):
        exact = oracle.sigreg_and_gradients(z, slices, weights=omega, t_max=2.0, knots=10)
        here = None if omega is None else omega.to(device)
        found = reference.sigreg(z.to(device), slices.to(device), weights=here, t_max=2.0, knots=10)
        torch.testing.assert_close(found.cpu(), exact.statistics, rtol=1e-10, atol=0)


def test_choices_that_do_not_exist(device: torch.device) -> None:
    z, slices = made(6, 4).to(device), unit_columns(4, 5).to(device)
    choice: Any
    for choice in ("cuda-graphs", "", None):
        for function in (sigreg, cf_deviations):
            with pytest.raises(ValueError, match="impl"):
                function(z, slices, impl=choice)
    for choice in ("sum", "none", ""):
        with pytest.raises(ValueError, match="reduction"):
            sigreg(z, slices, reduction=choice)


def test_triton_does_not_take_float64(device: torch.device) -> None:
    z, slices = made(6, 4, dtype=torch.float64).to(device), unit_columns(4, 5, torch.float64).to(device)
    for function in (sigreg, cf_deviations):
        with pytest.raises(ValueError, match=r"triton.*(float64|fp64)|(float64|fp64).*triton"):
            function(z, slices, impl="triton")


def run_alone(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, in which Triton does not interpret."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2], env=inherited | environment,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("missing", ["interpreter", "triton"])
def test_triton_that_cannot_be_had_says_why(missing: str) -> None:
    # Triton decides at its import whether it interprets
    script = """if True:
        import sys, torch
        if sys.argv[1] == "triton":
            sys.modules["triton"] = None
        from fastle.kernels.sigreg import sigreg
        z, slices = torch.ones(6, 4), torch.eye(4)
        for impl in ("auto", "torch", "reference"):
            assert sigreg(z, slices, impl=impl).isfinite()
        try:
            sigreg(z, slices, impl="triton")
        except ValueError as error:
            print(error)
    """
    said = run_alone(script, missing).stdout
    assert "triton" in said and ("TRITON_INTERPRET" if missing == "interpreter" else "install") in said


def test_no_compiler_is_slower_and_said_once(tmp_path: Path) -> None:
    script = """if True:
        import torch
        from fastle.kernels.sigreg import sigreg
        z = torch.randn(256, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        slices = torch.eye(3).repeat(1, 100)
        for _ in range(2):
            value = sigreg(z, slices)
            value.backward()
            torch.testing.assert_close(value.double(), sigreg(z.double(), slices.double()), rtol=2e-6, atol=0)
        # without the compiler other knots work too
        sigreg(z, slices, knots=9).backward()
        assert z.grad.isfinite().all()
    """
    said = run_alone(script, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).stderr
    assert said.count("uncompiled") == 1 and "C++ compiler" in said
