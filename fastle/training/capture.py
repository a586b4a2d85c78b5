"""A whole training step as one CUDA graph: recorded once, replayed for every batch.

Launching some hundreds of kernels takes the host longer than a GPU needs for small models and batches; a replay is one
launch. What a graph reads and writes stays where it was at the recording, so batches are copied in and losses out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Generator, Tensor

from fastle.errors import FastleError
from fastle.method.objective import Losses

# compiles, tunes and fills the optimizer's state, none of which may happen while a graph is recorded
WARM_UP = 3
# of the loss of a replay: its kernels are those of the step, but libraries may choose others while recording
TOLERANCE = 1e-2


class CannotCapture(FastleError):
    """The step cannot be recorded here; it has changed nothing."""


class StepGraph:
    """A step, recorded for batches of one shape.

    Recording takes a few real steps and a replay, which must give the loss of the first of them. All that they change
    is put back, so that the first call is the first step.

    Args:
        step: draws, loss, backward and update of a batch on the GPU, without waiting for it.
        images: a batch.
        seed: puts the generators where they are for the step that comes next.
        generators: what the step draws from. A replay draws what it would from their state at that time.
        changed: all tensors that the step changes and that outlive it. May grow by the optimizer's moments, which begin
            at zero.

    Attributes:
        memory: bytes allocated at the peak of the step, all that was there before included.

    Raises:
        CannotCapture: PyTorch or the driver refuses, or a replay computes something else; the message is the reason.
        torch.OutOfMemoryError: the batch is too large.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Losses],
        images: Tensor,
        *,
        seed: Callable[[], None],
        generators: Sequence[Generator],
        changed: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._images = images.clone()
        before = {tensor: tensor.clone() for tensor in changed()}

        def put_back() -> None:
            with torch.no_grad():
                for tensor in changed():
                    tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()

        try:
            seed()
            wanted = self._warm_up(step)
            self._graph, self._losses, self.memory = self._record(step, generators)
            put_back()
            seed()
            self._graph.replay()
            found = float(self._losses.total)
            if not math.isclose(found, wanted, rel_tol=TOLERANCE):
                raise CannotCapture(f"a replay computes a loss of {found:.6g} where the step's is {wanted:.6g}")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CannotCapture(reason.strip()) from error
        finally:
            put_back()

    def __call__(self, images: Tensor) -> Losses:
        """The step on a batch.

        Raises:
            ValueError: its shape is not that of the recording.
        """
        if images.shape != self._images.shape:
            shapes = f"{tuple(images.shape)}, not {tuple(self._images.shape)}"
            raise ValueError(f"the step was captured for batches of another shape: {shapes}")
        self._images.copy_(images)
        self._graph.replay()
        # the next replay writes over the graph's own
        return _each(self._losses, Tensor.clone)

    def _warm_up(self, step: Callable[[Tensor], Losses]) -> float:
        """On another stream, as a recording is; returns the loss of the first step."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            losses = [step(self._images).total.detach().clone() for _ in range(WARM_UP)]
        current.wait_stream(stream)
        return float(losses[0])

    def _record(
        self, step: Callable[[Tensor], Losses], generators: Sequence[Generator]
    ) -> tuple[torch.cuda.CUDAGraph, Losses, int]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        torch.cuda.reset_peak_memory_stats()
        # the feed's thread copies batches meanwhile, which a stricter mode would take for part of the recording
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            losses = _each(step(self._images), Tensor.detach)
        return graph, losses, torch.cuda.max_memory_allocated()


def _each(losses: Losses, change: Callable[[Tensor], Tensor]) -> Losses:
    values = {field.name: getattr(losses, field.name) for field in fields(losses)}
    return replace(losses, **{name: change(value) for name, value in values.items() if value is not None})
