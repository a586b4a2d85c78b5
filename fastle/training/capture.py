"""A whole training step as one CUDA graph: recorded once, replayed for every batch.

With small models and batches, the host needs longer to launch a step's several hundred kernels than the GPU needs to
run them; a replay is a single launch. A graph reads and writes the memory it was recorded with, so every batch is
copied in and the losses are copied out.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields

import torch
from torch import Generator, Tensor

from fastle.errors import FastleError
from fastle.machine import allocated_memory, peak_memory
from fastle.method.objective import Losses

from .memory import out_of_memory

# steps before the recording: they compile, tune and allocate the optimizer's state, which a recording must not do
WARM_UP = 3
# relative, for the loss of the first replay: libraries may choose other kernels while a graph is recorded
TOLERANCE = 1e-2
# relative to the norm of the moments' change; bf16 rounds gradients more than the loss, and a wrong gradient differs by
# its whole norm
MOMENTS_TOLERANCE = 0.1


class CannotCapture(FastleError):
    """The step cannot be recorded here. The attempt has changed nothing."""


class StepGraph:
    """A step recorded for batches of one shape.

    The constructor takes a few real steps, records one, and replays it to compare its loss and gradient with those of
    the first. Then it restores everything that these steps changed, so that the first call is the first step.

    Args:
        step: Makes the draws and computes loss, gradient and update of a batch on the GPU, without waiting for the GPU.
        images: A batch on the GPU.
        seed: Seeds the generators for the next step.
        generators: Every generator the step draws from. A replay draws from the state they have at that time.
        state: Returns all tensors that the step changes and that outlive it. More may appear after the first step: the
            optimizer's moments, which start at zero.
        moments: Returns those of the state's tensors that move with the gradient, the optimizer's first moments.

    Attributes:
        memory: Bytes allocated at the peak of the step, including what was allocated before.

    Raises:
        CannotCapture: PyTorch or the driver refuses, or the replay computes another loss or gradient. The message is
            the reason: the first error, since those that follow it say only that the recording has failed.
        RuntimeError: The batch is too large: see `out_of_memory`.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Losses],
        images: Tensor,
        *,
        seed: Callable[[], None],
        generators: Sequence[Generator],
        state: Callable[[], Iterable[Tensor]],
        moments: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._images = images.clone()
        # detached: a copy that autograd knows would tie the weight's gradient to this stream, and no recording may wait
        # for another stream
        saved = {tensor: tensor.detach().clone() for tensor in state()}

        def restore() -> None:
            with torch.no_grad():
                for tensor in state():
                    tensor.copy_(saved[tensor]) if tensor in saved else tensor.zero_()

        def changes() -> list[Tensor]:
            return [tensor - saved[tensor] if tensor in saved else tensor.clone() for tensor in moments()]

        try:
            # one stream for all steps: a weight's gradient stays on the stream that computed it first
            stream = torch.cuda.Stream()
            seed()
            expected, wanted = self._warm_up(step, changes, stream)
            self._graph, self._terms, self._latent, self.memory = self._record(step, generators, stream)
            restore()
            seed()
            self._graph.replay()
            self._compare(expected, wanted, changes())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
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
        terms = dict(zip(self._names, self._terms.clone().unbind(), strict=True))
        return Losses(**terms, latent=self._latent.clone())

    def _warm_up(
        self, step: Callable[[Tensor], Losses], changes: Callable[[], list[Tensor]], stream: torch.cuda.Stream
    ) -> tuple[float, list[Tensor]]:
        """Takes a few steps on a side stream, as a recording must; returns loss and `changes` of the first."""
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = step(self._images).total.detach().clone()
            changed = changes()
            for _ in range(WARM_UP - 1):
                step(self._images)
        current.wait_stream(stream)
        return float(loss), changed

    def _record(
        self, step: Callable[[Tensor], Losses], generators: Sequence[Generator], stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, int]:
        """The graph, the stacked terms of the losses and the latents that it writes, and `memory`."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        recorded: list[Tensor] = []

        def record() -> None:
            with _recording(graph, stream):
                losses = step(self._images)
                values = {field.name: getattr(losses, field.name) for field in fields(losses) if field.name != "latent"}
                self._names = [name for name, value in values.items() if value is not None]
                recorded.extend((torch.stack([values[name].detach() for name in self._names]), losses.latent.detach()))

        memory = allocated_memory(self._images.device) + peak_memory(record, self._images.device)
        terms, latent = recorded
        return graph, terms, latent, memory

    def _compare(self, expected: float, wanted: list[Tensor], changed: list[Tensor]) -> None:
        """Compares the first step's loss, and how it changed the moments, with the replay's."""
        replayed = float(self._terms[self._names.index("total")])
        if not math.isclose(replayed, expected, rel_tol=TOLERANCE):
            raise CannotCapture(f"a replay computes a loss of {replayed:.6g} where the step's is {expected:.6g}")
        difference = _norm([ours - theirs for ours, theirs in zip(changed, wanted, strict=True)])
        # written so that NaN is refused
        if not difference <= MOMENTS_TOLERANCE * _norm(wanted):
            raise CannotCapture("a replay computes another gradient than the step")


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Records into a graph on a side stream, and after an error leaves allocator, stream and collector as they were.

    Raises:
        RuntimeError: The first error, of which others may have come while the recording ended.
    """
    pool, current, collects = torch.cuda.graph_pool_handle(), torch.cuda.current_stream(), gc.isenabled()
    first: RuntimeError | None = None
    # freeing a tensor made before the recording would abort it
    gc.disable()
    try:
        # the feed's threads copy batches meanwhile, which a stricter mode would reject as part of the recording
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except RuntimeError as error:
                first = error
                raise
    except RuntimeError as error:
        # PyTorch calls these only after a successful recording; otherwise memory used by two streams is never freed
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise (first or error) from None
    finally:
        if collects:
            gc.enable()


def _norm(tensors: list[Tensor]) -> float:
    # one number, so that the host waits once
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()) if tensors else 0.0
