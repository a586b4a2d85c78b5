"""The modes of a step agree up to rounding, and each resumes exactly."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._inductor import config as inductor

from fastle.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from fastle.choices import StepMode
from fastle.config import RunConfig
from fastle.method.model import DownBlock
from fastle.presets import make_config
from fastle.training.loop import Execution, train
from fastle.training.trainer import CannotCompile, Trainer, compile_options

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
CPU = torch.device("cpu")
STEPS = 20


def config(**flags: Any) -> RunConfig:
    whole = make_config("shapes", **{"recipe": "post", "steps": STEPS, "batch_size": 4, "slices": 8} | flags)
    # spatial: a pooled code's bias has no gradient but rounding, before BatchNorm, which AdamW turns into steps
    model = replace(whole.model, size=16, hidden=8, map_channels=8, latent=None)
    return replace(whole, model=model, data=replace(whole.data, size=16))


def go(run: Path, mode: StepMode, **flags: Any) -> str:
    output = io.StringIO()
    train(config(**flags), run, Execution(device=CPU, mode=mode), console=Console(file=output, width=200))
    return output.getvalue()


def weights(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(latest_checkpoint(run)).tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[StepMode, tuple[Path, str]]:
    """A run of each mode, and what it said."""
    made: dict[StepMode, tuple[Path, str]] = {}
    for mode in ("eager", "compiled"):
        path = tmp_path_factory.mktemp(mode)
        made[mode] = path, go(path, mode)
    return made


def test_modes_agree_over_twenty_steps(runs: dict[StepMode, tuple[Path, str]]) -> None:
    eager, compiled = weights(runs["eager"][0]), weights(runs["compiled"][0])
    assert list(eager) == list(compiled)
    start = Trainer(config(), CPU).model.state_dict()
    for name, wanted in start.items():
        ours, theirs = compiled[f"model.{name}"].double(), eager[f"model.{name}"].double()
        scale = theirs.abs().max()
        assert float((ours - theirs).abs().max()) <= 1e-4 * float(scale), name
        # and they have moved much further than they differ
        if name.endswith("weight"):
            assert float((theirs - wanted).abs().max()) > 1e-3 * float(scale), name


def test_compiling_is_said_with_its_time(runs: dict[StepMode, tuple[Path, str]]) -> None:
    assert "compil" not in runs["eager"][1]
    said = runs["compiled"][1]
    assert said.index("compiling the step") < said.index("compiled in ") < said.index("step 2/20")


def test_resumed_run_is_bit_equal(runs: dict[StepMode, tuple[Path, str]], tmp_path: Path) -> None:
    go(tmp_path, "compiled", steps=7)
    go(tmp_path, "compiled")
    for name, value in weights(runs["compiled"][0]).items():
        assert torch.equal(value, weights(tmp_path)[name]), name


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="bf16 is emulated, which takes long"
)
def test_compiled_bf16_is_finite_and_right() -> None:
    # CelebA's first layers, where AVX-512 code of torch 2.15 gives NaN
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 128, 4, stride=2, padding=1)
    layers = nn.Sequential(stem, nn.SiLU(), DownBlock(128, 256)).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(layers, fullgraph=True, dynamic=False, options=compile_options(CPU, bf16=True))
    results = []
    for call in (layers, compiled):
        layers.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = call(images).float()
        value.square().mean().backward()
        assert stem.weight.grad is not None
        results.append((value.detach(), stem.weight.grad.clone()))
    for wanted, got in zip(*results, strict=True):
        assert float((got - wanted).abs().max()) <= 0.03 * float(wanted.abs().max())


def test_a_machine_that_cannot_compile_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # its own cache, because an earlier run may have compiled the same step
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    trainer = Trainer(config(), CPU, mode="compiled")
    # the smallest graph, since what takes its time is tracing, with a batch that no other test has compiled
    monkeypatch.setattr(type(trainer.objective), "forward", lambda self, images, draws: images.float().exp().mean())
    without = inductor.patch({"cpp.cxx": ("/nonexistent/c++",)})
    with without, pytest.raises(CannotCompile, match=r"^the step cannot be compiled here: .*; use --step eager$"):
        trainer(torch.zeros(7, 1, 16, 16, dtype=torch.uint8))


def test_recipe_resumes_exactly(tmp_path: Path) -> None:
    recipe = config(schedule="cosine", warmup=0.34, averages=(0.05, 0.2), clip=0.1, accumulate=2, steps=6)
    images = [torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8) for _ in range(6)]
    whole, first, second = (Trainer(recipe, CPU) for _ in range(3))
    for number, batch in enumerate(images):
        whole(batch)
        # an average begins with the weights after the first step
        begins = [
            torch.equal(average.model.encoder.stem.weight, whole.model.encoder.stem.weight)
            for average in whole.averages
        ]
        assert all(begins) if number == 0 else not any(begins)
    for batch in images[:3]:
        first(batch)
    second.load(load_checkpoint(save_checkpoint(tmp_path, 3, first.state(), {"step": 3})), 3)
    for batch in images[3:]:
        second(batch)
    ours, theirs = second.state(), whole.state()
    assert ours.keys() == theirs.keys() == {"model", "optimizer", "ema-050", "ema-200"}
    for section, tensors in theirs.items():
        for name, value in tensors.items():
            assert torch.equal(ours[section][name], value), f"{section}.{name}"


def test_accumulated_gradient_is_the_mean_of_the_parts() -> None:
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8)
    pixel: dict[str, Any] = {"objective": "pixel", "slices": None, "masked": False, "batch_size": 8}
    whole, parts = Trainer(config(**pixel), CPU), Trainer(config(**pixel, accumulate=2), CPU)
    # without a BatchNorm of each part, the parts' mean is the whole
    for trainer in (whole, parts):
        trainer.model.encoder.norm.eval = trainer.model.encoder.norm.train = lambda mode=True: None  # type: ignore[method-assign, assignment, return-value]
        trainer.model.encoder.norm.training = False
    losses = [trainer(images) for trainer in (whole, parts)]
    torch.testing.assert_close(losses[1].total, losses[0].total, rtol=1e-5, atol=0)
    assert losses[1].latent.shape == losses[0].latent.shape
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def test_decay_and_clip_reach_the_update() -> None:
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    plain, decayed, clipped = (Trainer(config(**flags), CPU) for flags in ({}, {"weight_decay": 0.5}, {"clip": 1e-3}))
    start = plain.model.encoder.stem.weight.detach().clone()
    for trainer in (plain, decayed, clipped):
        trainer(images)
    moved = decayed.model.encoder.stem.weight - plain.model.encoder.stem.weight
    torch.testing.assert_close(moved, -1e-3 * (0.5 - 0.01) * start, rtol=1e-2, atol=1e-7)
    norm = torch.stack([p.grad.norm() for p in clipped.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)
