"""What only a GPU can show: the same losses and gradients as on the CPU, and a run that resumes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor

from fastle.checkpoint import latest_checkpoint, load_checkpoint
from fastle.choices import StepMode
from fastle.config import RunConfig
from fastle.method.objective import Draws
from fastle.method.transforms import Boxes, ViewDraw
from fastle.presets import make_config
from fastle.training.loop import Execution, train
from fastle.training.memory import OutOfMemory
from fastle.training.report import read_metrics
from fastle.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
CUDA = torch.device("cuda")
ROWS: dict[str, dict[str, Any]] = {
    "pixel": {"objective": "pixel"},
    "live-identity": {"judge": "live", "transform": "identity"},
    "method": {},
    "ema": {"judge": "ema"},
    "detail": {"transform": "detail"},
    "crops": {"crop_ratio_max": 1.0, "crops": 2},
    "blur-views": {"blur_views": (3, 11), "full_view": True, "judge_statistics": "target"},
    "masked": {"masked": True, "latent": 16},
    "target-statistics": {"masked": True, "latent": 16, "judge_statistics": "target"},
    "reach": {"masked": True, "latent": 16, "judge_statistics": "target", "judge_reach": 0.3},
    "holes": {"masked": True, "latent": 16, "judge": "ema", "holes": 3, "judge_statistics": "target"},
    "pixel-mask": {"transform": "pixel-mask"},
    "noise": {"transform": "noise"},
}


def small(**flags: Any) -> RunConfig:
    # bf16, the default on a GPU, would hide differences by its rounding
    config = make_config("shapes", **{"steps": 40, "batch_size": 16, "precision": "fp32"} | flags)
    return replace(
        config, model=replace(config.model, size=16, hidden=8, map_channels=8), data=replace(config.data, size=16)
    )


def on_gpu(draws: Draws) -> Draws:
    def move(value: ViewDraw) -> Any:
        if isinstance(value, tuple):
            return tuple(move(boxes) for boxes in value)
        if isinstance(value, Boxes):
            return Boxes(move(value.top), move(value.left), move(value.side))
        return None if value is None else value.to(CUDA)

    return Draws(slices=move(draws.slices), view=move(draws.view), hole=move(draws.hole))


@pytest.mark.parametrize("row", ROWS)
def test_losses_and_gradients_are_those_of_the_cpu(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # convolutions run in TF32 by default, which is not what is compared here
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, there = (Trainer(small(**ROWS[row]), device) for device in (torch.device("cpu"), CUDA))
    images = torch.randint(0, 256, (16, 1, 16, 16), dtype=torch.uint8, generator=Generator().manual_seed(0))
    draws = here.draw(images)
    losses, on_device = here.objective(images, draws), there.objective(images.to(CUDA), on_gpu(draws))
    for name, value in losses.terms().items():
        torch.testing.assert_close(on_device.terms()[name].cpu(), value, rtol=1e-4, atol=1e-6)
    losses.total.backward()
    on_device.total.backward()
    for (name, ours), theirs in zip(here.model.named_parameters(), there.model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        scale = ours.grad.abs().max().clamp_min(1e-4)
        # before a BatchNorm, the bias of a pooled code has no gradient but rounding
        limit = 1e-3 * scale if name != "encoder.pool.bias" else torch.tensor(1e-4)
        assert (theirs.grad.cpu() - ours.grad).abs().max() <= limit, name


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_gpu_learns_and_resumes(tmp_path: Path, precision: str, mode: StepMode) -> None:
    for steps in (20, 40):
        config = small(steps=steps, precision=precision, lr=3e-3)
        train(config, tmp_path, Execution(device=CUDA, mode=mode), console=Console(quiet=True))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 40 and rows[-1]["total"] < rows[0]["total"]
    assert load_checkpoint(latest_checkpoint(tmp_path)).metadata["step"] == 40


def test_draws_are_made_on_the_gpu() -> None:
    step = Trainer(small(masked=True, latent=16), CUDA)
    draws = step.draw(torch.zeros(4, 1, 16, 16, dtype=torch.uint8, device=CUDA))
    again = step.draw(torch.zeros(4, 1, 16, 16, dtype=torch.uint8, device=CUDA))
    assert draws.slices is not None and draws.slices.device.type == "cuda"
    assert again.slices is not None and torch.equal(draws.slices, again.slices)
    assert draws.hole is not None and draws.hole.top.device.type == "cuda"


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host waits for the device in it: an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(number: int) -> Tensor:
    generator = Generator(CUDA).manual_seed(number)
    return torch.randint(0, 256, (16, 1, 16, 16), dtype=torch.uint8, device=CUDA, generator=generator)


@pytest.mark.parametrize("row", ROWS)
def test_step_does_not_wait_for_the_gpu(row: str) -> None:
    step = Trainer(small(**ROWS[row]), CUDA)
    images = batch(0)
    # allocates and tunes
    step(images)
    with no_waiting():
        step(images)


@pytest.mark.parametrize("mode", ["compiled", "captured"])
@pytest.mark.parametrize("row", ["method", "ema", "masked", "noise"])
def test_steps_are_those_of_the_eager_mode_and_do_not_wait(
    row: str, mode: StepMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # spatial: a pooled code's bias has no gradient but rounding, before BatchNorm, which AdamW turns into steps
    config = small(**ROWS[row])
    config = replace(config, model=replace(config.model, latent=None))
    eager, other = Trainer(config, CUDA), Trainer(config, CUDA, mode=mode)
    for number in range(20):
        images = batch(number)
        wanted = eager(images)
        with no_waiting() if number > 1 else nullcontext():
            losses = other(images)
        assert other.mode == mode, other.why_not_captured
        torch.testing.assert_close(losses.total, wanted.total.detach(), rtol=1e-3, atol=1e-5)
    weights = other.model.state_dict()
    for name, value in eager.model.state_dict().items():
        scale = value.double().abs().max()
        assert float((weights[name].double() - value.double()).abs().max()) <= 1e-4 * float(scale), name


def test_learning_rate_of_a_captured_step_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer(small(), CUDA, mode="captured")
    images = batch(0)
    step(images)
    monkeypatch.setattr(step, "rate", lambda done: 0.0)
    before = [parameter.clone() for parameter in step.model.parameters()]
    step(images)
    assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))


def test_step_that_does_not_fit_says_what_to_change() -> None:
    step = Trainer(small(), CUDA, mode="captured")
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8, device=CUDA)
    with pytest.raises(OutOfMemory, match="--batch-size"):
        # a view: no memory is asked for but by the step
        step(images[:1].expand(1_000_000_000, -1, -1, -1))
