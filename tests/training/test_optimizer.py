"""Muon: its step by hand and against PyTorch's, which weights it takes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from fastle.training import optimizer as optimizer_module
from fastle.training.optimizer import Muon, make_optimizer, orthogonalize
from fastle.training.plain_step import PlainStep, StartingPoint
from fastle.training.trainer import Trainer
from tests.training.test_trainer import config

CPU = torch.device("cpu")
SHAPES = ((8, 8), (5, 12), (12, 5), (6, 4, 3, 3), (1, 7), (7, 1))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_directions_stay_and_get_one_length(shape: tuple[int, int], scale: float) -> None:
    matrix = randn(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # from the largest to a thirtieth of it
    matrix = scale * u @ torch.diag(torch.logspace(0, -1.5, len(s), dtype=torch.float64)) @ vh
    lengths = u.T @ orthogonalize(matrix) @ vh.T
    torch.testing.assert_close(lengths, torch.diag(lengths.diag()), rtol=0, atol=1e-9)
    assert float(lengths.diag().min()) > 0.68 and float(lengths.diag().max()) < 1.21


def test_what_is_as_good_as_nothing_stays_small() -> None:
    lengths = orthogonalize(torch.diag(torch.tensor([1.0, 1e-2, 2e-3, 1e-5], dtype=torch.float64))).diag()
    assert 0.68 < float(lengths[:3].min()) and float(lengths[3]) == pytest.approx(4.85e-3, rel=0.01)


def test_nothing_has_no_direction() -> None:
    assert not orthogonalize(torch.zeros(3, 4)).any()


def polar(matrix: Tensor) -> Tensor:
    """What the iteration makes of each singular value, by the polynomial of singular values alone."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_steps_by_hand(tensor_rate: bool, layout: torch.memory_format) -> None:
    rate, decay = 0.01, 0.3
    weights = [nn.Parameter(randn(*shape, seed=n)) for n, shape in enumerate(SHAPES)]
    for weight in weights:
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)
    bias, twin = nn.Parameter(randn(4)), nn.Parameter(randn(4))
    wanted, momenta = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]
    lr = torch.tensor(rate) if tensor_rate else rate
    adamw = torch.optim.AdamW([bias, *weights], lr=lr, weight_decay=decay, fused=True)
    ours, reference = Muon(adamw, weights), torch.optim.AdamW([twin], lr=rate, weight_decay=decay)
    for step in range(3):
        for index, weight in enumerate(weights):
            gradient = randn(*weight.shape, seed=100 + 10 * step + index)
            weight.grad = gradient.clone()
            momenta[index] = 0.95 * momenta[index] + 0.05 * gradient
            direction = 0.05 * gradient + 0.95 * momenta[index]
            turned = polar(direction.reshape(len(direction), -1))
            scale = 0.2 * max(turned.shape) ** 0.5
            wanted[index] = (1 - rate * decay) * wanted[index] - rate * scale * turned.reshape(weight.shape)
        bias.grad, twin.grad = randn(4, seed=step), randn(4, seed=step)
        ours.step()
        reference.step()
    torch.testing.assert_close([w.detach() for w in weights], wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bias.detach(), twin.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pytorch_s_steps_on_matrices_are_the_same_but_for_its_bf16(dtype: torch.dtype | None) -> None:
    moved = []
    for theirs in (True, False):
        weights = [nn.Parameter(randn(*shape).float()) for shape in ((16, 40), (40, 16))]
        before = [w.detach().clone() for w in weights]
        optimizer: torch.optim.Optimizer
        if theirs:
            optimizer = torch.optim.Muon(weights, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        else:
            optimizer = Muon(torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1, fused=True), weights, dtype)
        for step in range(3):
            for weight in weights:
                weight.grad = randn(*weight.shape, seed=step).float()
            optimizer.step()
        moved.append([w.detach() - b for w, b in zip(weights, before, strict=True)])
    for wanted, ours in zip(*moved, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < 0.02


def test_a_weight_without_a_gradient_stays() -> None:
    weights = [nn.Parameter(randn(3, 3)), nn.Parameter(randn(3, 3))]
    before = [w.detach().clone() for w in weights]
    optimizer = Muon(torch.optim.AdamW(weights, lr=0.1, fused=True), weights)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert not torch.equal(weights[0], before[0]) and torch.equal(weights[1], before[1])
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_directions_are_computed_in_the_precision_of_the_step(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(matrix: Tensor) -> Tensor:
        seen.append(matrix.dtype)
        return orthogonalize(matrix)

    monkeypatch.setattr(optimizer_module, "orthogonalize", noted)
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    # the precision of a plain step is its own, not its configuration's
    start = StartingPoint(config(optimizer="muon", crop_ratio=0.3, precision="fp32"), CPU)
    steps = (Trainer(config(optimizer="muon", precision=precision), CPU), PlainStep(start, precision=precision))
    for step in steps:
        seen.clear()
        step(images)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(weight.dtype == torch.float32 for weight in step.model.parameters())


def test_muon_takes_the_layers_weights_and_adamw_all_others() -> None:
    whole = config(optimizer="muon")
    model = Trainer(whole, CPU).model
    optimizer = make_optimizer(model, whole.train, CPU)
    others, matrices = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {
        name for name, parameter in model.named_parameters() if parameter.ndim < 2
    }
    assert len(matrices["params"]) + len(others["params"]) == len(names)
    fixed = replace(whole.train, optimizer="adamw")
    model.encoder.stem.weight.requires_grad_(False)
    for train in (whole.train, fixed):
        taken = [p for group in make_optimizer(model, train, CPU).param_groups for p in group["params"]]
        assert len(taken) == len(names) - 1 and all(p.requires_grad for p in taken)
