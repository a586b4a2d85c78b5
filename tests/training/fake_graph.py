"""CUDA graphs on a CPU, for tests: what is recorded runs again, operator by operator, into the same memory.

As with a real one, a replay sees new values in old memory only: a tensor that was made outside and replaced since, or a
number that Python computed, stays what it was at the recording. Unlike with a real one, recording computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


@contextmanager
def recording(graph: FakeGraph, **options: str) -> Iterator[None]:
    with graph:
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's graphs, streams and memory are these from now on."""

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": recording,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 123,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
