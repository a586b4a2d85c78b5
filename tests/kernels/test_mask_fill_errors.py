"""What kernels.mask_fill does not take, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.kernels.mask_fill import mask_fill
from tests.kernels import views
from tests.kernels.views import DEVICE, every_bad_image, every_impl, made


@every_impl
@pytest.mark.parametrize(("height", "width", "says"), [(-1, 3, "-1"), (3, -2, "-2"), (-7, 0, "-7")])
def test_sizes_out_of_range(height: int, width: int, says: str, impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=says) as raised:
        mask_fill(made(2, 1, 5, 8), zero, zero, height, width, impl=impl)
    assert "mask_fill" in str(raised.value)


@every_impl
@every_bad_image
def test_images_that_it_does_not_take(bad: Callable[[], Any], says: str, impl: Any) -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=says):
        mask_fill(bad(), zero, zero, 3, 3, impl=impl)


@every_impl
@pytest.mark.parametrize("argument", ["top", "left"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:3], r"\(3,\)|\b3\b"),
        (lambda x: x[:, None], r"4\D+1"),
        (lambda x: x[0], r"\(\)|\[\]|scalar|shape"),
        (lambda x: x.float(), "float32"),
        (lambda x: x > 0, "bool"),
        (lambda x: x.to("meta"), "meta"),
    ],
    ids=["too-few", "two-axes", "no-axis", "float", "bool", "other-device"],
)
def test_corners_that_are_no_corners(change: Callable[[Tensor], Tensor], says: str, argument: str, impl: Any) -> None:
    corners = dict(zip(("top", "left"), torch.ones(2, 4, dtype=torch.int64, device=DEVICE), strict=True))
    corners[argument] = change(corners[argument])
    with pytest.raises(ValueError, match=says) as raised:
        mask_fill(made(4, 1, 5, 8), **corners, height=3, width=3, impl=impl)
    assert argument in str(raised.value)


def test_choices_that_cannot_be_had() -> None:
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    views.choices_that_cannot_be_had(lambda x, impl: mask_fill(x, zero, zero, 3, 3, impl=impl), made(2, 1, 5, 8))
