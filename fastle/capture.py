"""A whole training step as one CUDA graph: recorded once, replayed for every batch.

Launching some hundreds of kernels takes the host longer than a GPU needs for small models and batches; a replay is one
launch. What a graph reads and writes stays where it was at the recording, so batches are copied in and losses out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Generator, Tensor

from .errors import FastleError
from .objective import Losses

# compiles, tunes and fills the optimizer's state, none of which may happen while a graph is recorded
WARM_UP = 3


class CannotCapture(FastleError):
    """The step cannot be recorded here; it has changed nothing."""


class StepGraph:
    """A step, recorded for batches of one shape.

    Recording takes a few real steps; all that they change is put back, so the first replay is the first step.

    Args:
        step: draws, loss, backward and update of a batch on the GPU, without waiting for it.
        images: a batch.
        generators: what the step draws from. A replay draws what it would from their state at that time.
        changed: all tensors that the step changes and that outlive it. May grow by the optimizer's moments, which begin
            at zero.

    Attributes:
        memory: bytes allocated at the peak of the step, all that was there before included.

    Raises:
        CannotCapture: PyTorch or the driver refuses; the message is the reason.
        torch.OutOfMemoryError: the batch is too large.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Losses],
        images: Tensor,
        *,
        generators: Sequence[Generator],
        changed: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._images = images.clone()
        before = {tensor: tensor.clone() for tensor in changed()}
        try:
            self._warm_up(step)
            self._graph, self._losses, self.memory = self._record(step, generators)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CannotCapture(reason.strip()) from error
        finally:
            with torch.no_grad():
                for tensor in changed():
                    tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()

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

    def _warm_up(self, step: Callable[[Tensor], Losses]) -> None:
        """On another stream, as a recording is."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step(self._images)
        current.wait_stream(stream)

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
