"""TF32: where a step on a GPU takes it, and that SIGReg and the caller's process do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.config import Precision
from fastle.kernels.sigreg import sigreg
from fastle.presets import make_config
from fastle.training import precision, trainer

CUDA = torch.device("cuda")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings under which operators multiply; those of a graph do not appear."""
    settings: list[str] = []
    multiply = torch.Tensor.__matmul__

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        settings.append(torch.get_float32_matmul_precision())
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    return settings


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_step_on_a_gpu_takes_tf32_for_linear_and_not_in_sigreg(
    monkeypatch: pytest.MonkeyPatch, products: list[str], chosen: Precision
) -> None:
    arithmetic = precision.fast_arithmetic
    monkeypatch.setattr(precision, "is_old", lambda device: False)
    monkeypatch.setattr(trainer, "fast_arithmetic", lambda device, _: arithmetic(CUDA, chosen))
    config = make_config(
        "shapes", recipe="post", transform="identity", size=16, hidden=4, batch_size=4, latent=8, precision="fp32"
    )
    training = trainer.Trainer(config, torch.device("cpu"))
    seen: list[Any] = []

    def note(*_: Any) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))

    assert training.model.encoder.pool is not None
    training.model.encoder.pool.register_forward_hook(note)
    training.model.encoder.pool.register_full_backward_hook(note)
    training(torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    assert set(seen) == {("high" if chosen == "fp32" else "highest", True)} and len(seen) >= 2
    assert set(products) == {"highest"} and len(products) >= 2
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)


def test_a_graph_keeps_sigreg_exact(products: list[str]) -> None:
    z, slices = torch.randn(8, 4, requires_grad=True), torch.randn(4, 6)
    compiled = torch.compile(lambda z: sigreg(z, slices), fullgraph=True, backend="aot_eager")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        (gradient,) = torch.autograd.grad(compiled(z), z)
    finally:
        torch.set_float32_matmul_precision(before)
    # the projection and its gradient, in operators
    assert set(products) == {"highest"} and len(products) >= 2
    torch.testing.assert_close(gradient, torch.autograd.grad(sigreg(z, slices), z)[0])
