"""CUDA graphs on a CPU, for tests: what is recorded runs again, operator by operator, into the same memory.

As with a real one, a replay sees new values in old memory only: a tensor that was made outside and replaced since, or a
number that Python computed, stays what it was at the recording. Unlike with a real one, recording computes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastle.training import capture


class FakeGraph(TorchDispatchMode):
    """Records every operator below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.generators: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Generator)}
        if not used <= self.generators:
            raise RuntimeError("a generator that is not registered with the graph\nand a second line")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.add(id_of(generator))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            read = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            result = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(result), strict=True):
                # views and what was changed in place are there already
                if isinstance(old, Tensor) and old.untyped_storage()._cdata not in read:
                    old.detach().copy_(new)


def id_of(generator: Generator) -> int:
    """The same for every Python object around a generator."""
    return generator._cdata  # type: ignore[attr-defined]


class Allocator:
    """What CUDA's caching allocator does while a recording is under way, or is left so by one that broke off."""

    def __init__(self) -> None:
        self.under_way: set[int] = set()
        self.pools: set[int] = set()
        self.handles = 0
        self.deferred = 0

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    @contextmanager
    def recording(self, graph: FakeGraph, *, pool: int, **options: object) -> Iterator[None]:
        assert not gc.isenabled()
        self.under_way.add(pool)
        self.pools.add(pool)
        with graph:
            try:
                yield
            except RuntimeError:
                # as by CUDA, and before PyTorch has told its allocator
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.under_way.remove(pool)

    def end(self, device: int, pool: int) -> None:
        if pool not in self.under_way:
            raise RuntimeError("not currently recording to this pool")
        self.under_way.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.pools.remove(pool)

    def free_batch(self) -> None:
        """Frees a batch that a side stream has used: not before all recordings have ended."""
        self.deferred = self.deferred + 1 if self.under_way else 0


def install(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """torch.cuda's graphs, streams and memory are these from now on."""
    allocator = Allocator()

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": allocator.recording,
        "graph_pool_handle": allocator.handle,
        "current_device": lambda: 0,
        "set_stream": lambda stream: None,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(capture, "peak_memory", lambda call, device: (call(), 123)[1])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
    return allocator
