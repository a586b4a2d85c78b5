"""A whole training step as one CUDA graph: recorded once, replayed for every batch.

With small models and batches, the host needs longer to launch a step's several hundred kernels than the GPU needs to
run them; a replay is a single launch. A graph reads and writes the memory it was recorded with, so every batch is
copied in and the losses are copied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Generator, Tensor

from fastle.errors import FastleError
from fastle.method.objective import Losses

# steps before the recording: they compile, tune and allocate the optimizer's state, which a recording must not do
WARM_UP = 3
# relative, for the loss of the first replay: libraries may choose other kernels while a graph is recorded
TOLERANCE = 1e-2


class CannotCapture(FastleError):
    """The step cannot be recorded here. The attempt has changed nothing."""


class StepGraph:
    """A step recorded for batches of one shape.

    The constructor takes a few real steps, records one, and replays it to compare its loss with that of the first. Then
    it restores everything that these steps changed, so that the first call is the first step.

    Args:
        step: Makes the draws and computes loss, gradient and update of a batch on the GPU, without waiting for the GPU.
        images: A batch on the GPU.
        seed: Seeds the generators for the next step.
        generators: Every generator the step draws from. A replay draws from the state they have at that time.
        state: Returns all tensors that the step changes and that outlive it. More may appear after the first step: the
            optimizer's moments, which start at zero.

    Attributes:
        memory: Bytes allocated at the peak of the step, including what was allocated before.

    Raises:
        CannotCapture: PyTorch or the driver refuses, or the replay computes another loss. The message is the reason.
        torch.OutOfMemoryError: The batch is too large.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Losses],
        images: Tensor,
        *,
        seed: Callable[[], None],
        generators: Sequence[Generator],
        state: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._images = images.clone()
        saved = {tensor: tensor.clone() for tensor in state()}

        def restore() -> None:
            with torch.no_grad():
                for tensor in state():
                    tensor.copy_(saved[tensor]) if tensor in saved else tensor.zero_()

        try:
            seed()
            expected = self._warm_up(step)
            self._graph, self._losses, self.memory = self._record(step, generators)
            restore()
            seed()
            self._graph.replay()
            replayed = float(self._losses.total)
            if not math.isclose(replayed, expected, rel_tol=TOLERANCE):
                raise CannotCapture(f"a replay computes a loss of {replayed:.6g} where the step's is {expected:.6g}")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CannotCapture(reason.strip()) from error
        finally:
            restore()

    def __call__(self, images: Tensor) -> Losses:
        """Replays the step on a batch.

        Raises:
            ValueError: The batch does not have the shape of the recording.
        """
        if images.shape != self._images.shape:
            shapes = f"{tuple(images.shape)}, not {tuple(self._images.shape)}"
            raise ValueError(f"the step was captured for batches of another shape: {shapes}")
        self._images.copy_(images)
        self._graph.replay()
        # the next replay overwrites the graph's own tensors
        return _map_losses(self._losses, Tensor.clone)

    def _warm_up(self, step: Callable[[Tensor], Losses]) -> float:
        """Takes a few steps on a side stream, as a recording must; returns the loss of the first."""
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
        # the feed's threads copy batches meanwhile, which a stricter mode would reject as part of the recording
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            losses = _map_losses(step(self._images), Tensor.detach)
        return graph, losses, torch.cuda.max_memory_allocated()


def _map_losses(losses: Losses, function: Callable[[Tensor], Tensor]) -> Losses:
    values = {field.name: getattr(losses, field.name) for field in fields(losses)}
    return replace(losses, **{name: function(value) for name, value in values.items() if value is not None})
