"""A run that dies in the middle of a step."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from fastle.training.trainer import Trainer


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the package can catch it by accident."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th step from now dies half-way, its weights already changed."""
    original, remaining = Trainer.__call__, [steps]

    def call(self: Trainer, images: Tensor) -> Any:
        losses = original(self, images)
        remaining[0] -= 1
        if remaining[0] == 0:
            monkeypatch.setattr(Trainer, "__call__", original)
            raise Killed
        return losses

    monkeypatch.setattr(Trainer, "__call__", call)
