"""The captured step, with stand-ins for CUDA graphs on a CPU: what is recorded, restored, copied in and copied out."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from fastle.checkpoint import Checkpoint
from fastle.config import ConfigError, TrainConfig
from fastle.method.objective import Losses
from fastle.training import trainer as trainer_module
from fastle.training.capture import StepGraph
from fastle.training.loop import Execution, train
from fastle.training.memory import OutOfMemory
from fastle.training.optimizer import Muon
from fastle.training.trainer import Trainer
from tests.training import fake_graph
from tests.training.test_trainer import config

CPU = torch.device("cpu")
WHY_NO_CAPTURE = trainer_module._why_no_capture
ROWS: dict[str, dict[str, Any]] = {
    "pixel": {"objective": "pixel", "slices": None},
    "live": {"judge": "live", "masked": False},
    "ema": {"masked": True, "judge": "ema", "holes": 2},
    "masked": {"judge_statistics": "own"},
    "target-statistics": {"judge_statistics": "target"},
    "pixel-mask": {"transform": "pixel-mask", "masked": False},
    "recipe": {
        "judge_depth": "all", "judge_reach": 0.3, "judge_statistics": "target", "full_view": True,
        "blur_views": (3, 5), "averages": (0.05, 0.2), "clip": 0.1, "accumulate": 2, "optimizer": "muon",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> fake_graph.Allocator:
    allocator = fake_graph.install(monkeypatch)
    monkeypatch.setattr(trainer_module, "_why_no_capture", lambda device, world_size: None)
    # compiled code cannot be recorded operator by operator
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    return allocator


def batch(number: int, count: int = 4) -> Tensor:
    generator = Generator().manual_seed(number)
    images = torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def everything(step: Trainer) -> dict[str, Tensor]:
    return {f"{section}.{name}": value for section, part in step.state().items() for name, value in part.items()}


def assert_same(left: Trainer, right: Trainer) -> None:
    ours, theirs = everything(left), everything(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("row", ROWS)
def test_captured_steps_are_the_eager_ones(row: str) -> None:
    eager, captured = Trainer(config(**ROWS[row]), CPU), Trainer(config(**ROWS[row]), CPU, mode="captured")
    for number in range(4):
        wanted, losses = eager(batch(number)), captured(batch(number))
        assert captured.mode == "captured" and captured.graph_memory == 123
        assert torch.equal(losses.latent, wanted.latent)
        for name, value in wanted.terms().items():
            assert torch.equal(losses.terms()[name], value), name
        assert_same(captured, eager)


def test_no_copy_of_a_weight_ties_it_to_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first graph of autograd that a weight is part of fixes its gradient's stream, for as long as one is alive.

    If that is not the recording's, CUDA refuses: the other stream would depend on a capturing one.
    """
    step = Trainer(config(), CPU, mode="captured")
    update, weights = step._update, set(step.model.parameters())
    tied: list[int] = []

    def spied(images: Tensor) -> Losses:
        if not tied:
            nodes = [thing.grad_fn for thing in gc.get_objects() if type(thing) is Tensor]
            edges = [edge for node in nodes if node is not None for edge, _ in node.next_functions]
            tied.append(sum(getattr(edge, "variable", None) in weights for edge in edges))
        return update(images)

    monkeypatch.setattr(step, "_update", spied)
    step(batch(0))
    assert step.mode == "captured" and tied == [0]


def test_losses_are_not_overwritten_by_later_steps() -> None:
    step = Trainer(config(), CPU, mode="captured")
    first = step(batch(0))
    kept = {name: value.clone() for name, value in first.terms().items()} | {"latent": first.latent.clone()}
    step(batch(1))
    for name, value in kept.items():
        assert torch.equal(value, first.latent if name == "latent" else first.terms()[name]), name


def test_step_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(fake_graph.FakeGraph, "__enter__", counting(fake_graph.FakeGraph.__enter__, recorded))
    trainer = Trainer(config(), CPU, mode="captured")
    for number in range(4):
        trainer(batch(number))
    assert len(recorded) == 1 and trainer.done == 4


def counting(function: Any, calls: list[object]) -> Any:
    def counted(self: object) -> Any:
        calls.append(self)
        return function(self)

    return counted


def test_rate_that_is_a_tensor_may_change_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor_rate(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
        adamw = torch.optim.AdamW(model.parameters(), lr=torch.tensor(config.lr), fused=True)
        return Muon(adamw, [weight for weight in model.parameters() if weight.ndim > 1])

    monkeypatch.setattr(trainer_module, "make_optimizer", tensor_rate)
    falling = config(**ROWS["recipe"], schedule="cosine", warmup=0.5, steps=4)
    eager, captured = Trainer(falling, CPU), Trainer(falling, CPU, mode="captured")
    rates = []
    for number in range(4):
        for step in (eager, captured):
            step(batch(number))
        rates.append(float(eager.optimizer.param_groups[0]["lr"]))
        assert_same(captured, eager)
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_captured_run_resumes_exactly(tmp_path: Path) -> None:
    for name, lengths in (("whole", (9,)), ("parts", (4, 9))):
        for steps in lengths:
            execution = Execution(device=CPU, mode="captured")
            train(
                config(steps=steps, judge="ema", optimizer="muon"),
                tmp_path / name,
                execution,
                console=Console(quiet=True),
            )
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("whole", "parts")]
    # all but the rates
    assert rows[0].split('"images_per_second"')[0] == rows[1].split('"images_per_second"')[0]


def test_loading_drops_the_graph() -> None:
    # later than the first step, an average would keep what the recording has done to it
    recipe = config(**ROWS["recipe"])
    source = Trainer(recipe, CPU)
    source(batch(0))
    step = Trainer(recipe, CPU, mode="captured")
    step(batch(5))
    kept = {name: value.clone() for name, value in everything(source).items()}
    step.load(Checkpoint(Path("kept"), kept, {"step": 1}), 1)
    for number in (1, 2):
        source(batch(number))
        step(batch(number))
    assert_same(step, source)


def test_batch_of_another_shape_is_refused() -> None:
    step = Trainer(config(), CPU, mode="captured")
    step(batch(0))
    with pytest.raises(ValueError, match=r"\(3, 1, 16, 16\), not \(4, 1, 16, 16\)"):
        step(batch(1, count=3))
    assert step.done == 1


def refusing(monkeypatch: pytest.MonkeyPatch, error: Exception, *, after: int) -> None:
    """Graphs that break off after so many operators."""
    dispatch = fake_graph.FakeGraph.__torch_dispatch__

    def broken(self: fake_graph.FakeGraph, *arguments: Any, **keywords: Any) -> Any:
        if len(self.calls) == after:
            raise error
        return dispatch(self, *arguments, **keywords)

    monkeypatch.setattr(fake_graph.FakeGraph, "__torch_dispatch__", broken)


@pytest.mark.parametrize("after", [0, 400])
def test_refused_capture_leaves_no_trace_and_goes_on_compiled(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    refusing(monkeypatch, RuntimeError("operation not permitted\nwhen stream is capturing"), after=after)
    eager, captured = Trainer(config(judge="ema"), CPU), Trainer(config(judge="ema"), CPU, mode="captured")
    for number in range(3):
        eager(batch(number))
        captured(batch(number))
    assert captured.mode == "compiled"
    assert captured.why_not_captured == "steps cannot be captured (operation not permitted): they are compiled"
    assert_same(captured, eager)


def test_a_replay_that_computes_another_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = fake_graph.FakeGraph.replay

    def astray(self: fake_graph.FakeGraph) -> None:
        # what it drew is not what the step would draw
        self.calls = [call for call in self.calls if "rand" not in str(call[0])]
        replay(self)

    monkeypatch.setattr(fake_graph.FakeGraph, "replay", astray)
    eager, captured = Trainer(config(), CPU), Trainer(config(), CPU, mode="captured")
    for number in range(2):
        eager(batch(number))
        captured(batch(number))
    assert captured.mode == "compiled" and captured.why_not_captured is not None
    assert "a replay computes a loss of " in captured.why_not_captured
    assert_same(captured, eager)


def test_a_refused_capture_leaves_the_allocator_free(
    monkeypatch: pytest.MonkeyPatch, allocator: fake_graph.Allocator
) -> None:
    refusing(monkeypatch, RuntimeError("the driver's error"), after=200)
    step = Trainer(config(), CPU, mode="captured")
    step(batch(0))
    # the first error, not the one with which the recording ended
    assert step.why_not_captured is not None and "(the driver's error)" in step.why_not_captured
    assert not allocator.under_way and not allocator.pools and gc.isenabled()
    for _ in range(1000):
        allocator.free_batch()
    assert allocator.deferred == 0


def test_a_replay_that_computes_another_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = fake_graph.FakeGraph.replay

    def halved(self: fake_graph.FakeGraph) -> None:
        # the loss is right, and half of the gradients are lost: a wrong backward pass
        replay(self)
        with torch.no_grad():
            for moments in list(captured.optimizer.state.values())[::2]:
                moments["exp_avg"].zero_()

    captured = Trainer(config(), CPU, mode="captured")
    monkeypatch.setattr(fake_graph.FakeGraph, "replay", halved)
    captured(batch(0))
    assert captured.mode == "compiled" and captured.why_not_captured is not None
    assert "a replay computes another gradient" in captured.why_not_captured


def test_the_fallback_is_reported_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing(monkeypatch, RuntimeError("old driver"), after=7)
    output = io.StringIO()
    execution = Execution(device=CPU, mode="captured")
    train(config(steps=3), tmp_path, execution, console=Console(file=output, width=200))
    assert output.getvalue().count("steps cannot be captured (old driver): they are compiled") == 1
    assert "compiled and captured" not in output.getvalue()


def test_recording_that_does_not_fit_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), after=30)
    step = Trainer(config(), CPU, mode="captured")
    with pytest.raises(OutOfMemory, match="a step of 4 images"):
        step(batch(0))
    assert step.mode == "captured" and step.done == 0


def test_draws_from_an_unregistered_generator_are_refused() -> None:
    # as by CUDA: a draw from a generator that the graph does not know would repeat itself
    weights, other = torch.zeros(()), Generator().manual_seed(0)

    def draw(images: Tensor) -> Losses:
        return Losses(total=weights + torch.rand((), generator=other), latent=images)

    with pytest.raises(Exception, match="not registered"):
        StepGraph(draw, batch(0), seed=lambda: None, generators=(Generator(),), state=lambda: [weights], moments=list)


def gpu_of(monkeypatch: pytest.MonkeyPatch, *capability: int) -> torch.device:
    """A device that says it is a GPU of this compute capability."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return torch.device("cuda")


def test_what_cannot_be_captured_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = [WHY_NO_CAPTURE(CPU, 1), WHY_NO_CAPTURE(gpu_of(monkeypatch, 7, 5), 1)]
    ampere = gpu_of(monkeypatch, 8, 0)
    assert WHY_NO_CAPTURE(ampere, 1) is None
    reasons.append(WHY_NO_CAPTURE(ampere, 2))
    parts = ("a cpu device has no CUDA graphs", "on Tesla T4 operators run in torch", "of one process, not of 2")
    for reason, part in zip(reasons, parts, strict=True):
        assert reason is not None and part in reason


def test_a_gpu_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--precision bf16: Tesla T4 has no bf16 arithmetic.*use --precision fp32"):
        Trainer(config(precision="bf16"), gpu_of(monkeypatch, 7, 5))
