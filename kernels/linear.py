"""Registers a linear operator on image batches with its adjoint, which is its gradient.

Both take a list of image batches and the same further arguments, none of which gets a gradient. Each is the other's
derivative, so that any order of derivative exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .images import dense
from .impl import traced

Images = list[Tensor]
Lists = Callable[..., Images]


def linear_operator(
    name: str, arguments: str, *, forward: Lists, adjoint: Lists, empty: Callable[..., Tensor],
    empty_adjoint: Callable[..., Tensor],
) -> Lists:  # fmt: skip
    """The operator `fastle::name` as a function of (images, *arguments).

    Args:
        arguments: the schema of what follows the images.
        forward: (images, *arguments) → results; images are dense.
        adjoint: (gradients to the results, *arguments) → gradients to the images; gradients are dense.
        empty, empty_adjoint: one result of each, uninitialised, from one image or gradient and the arguments.
    """

    def adjoint_of_any(gradients: Images, *rest: Any) -> Images:
        return adjoint([dense(gradient) for gradient in gradients], *rest)

    schema = f"(Tensor[] images, {arguments}) -> Tensor[]"
    operator = torch.library.custom_op(f"fastle::{name}", forward, mutates_args=(), schema=schema)
    backward = torch.library.custom_op(f"fastle::{name}_backward", adjoint_of_any, mutates_args=(), schema=schema)
    operator.register_fake(lambda images, *rest: [empty(image, *rest) for image in images])
    backward.register_fake(lambda images, *rest: [empty_adjoint(dense(image), *rest) for image in images])
    operator.register_autograd(_gradient_by(backward), setup_context=_keep)
    backward.register_autograd(_gradient_by(operator), setup_context=_keep)

    class Eager(torch.autograd.Function):
        """The same without the operator's dispatch."""

        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], *images: Tensor) -> tuple[Tensor, ...]:
            results = tuple(forward(list(images), *rest))
            _keep(ctx, (images, *rest), results)
            pairs = zip(images, results, strict=True)
            ctx.mark_non_differentiable(*[result for image, result in pairs if not image.requires_grad])
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # a second derivative is the registered operator's
            call = backward if torch.is_grad_enabled() else adjoint_of_any
            return None, *_chain(call, ctx, gradients, ctx.needs_input_grad[1:])

    def call(images: Images, *rest: Any) -> Images:
        return operator(images, *rest) if traced(*images) else list(Eager.apply(rest, *images))

    return call


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    _, *rest = inputs
    # a result may have no gradient, and then needs none made for it
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in rest])
    ctx.constants = [None if isinstance(value, Tensor) else value for value in rest]


def _gradient_by(other: Lists) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return _chain(other, ctx, gradients, ctx.needs_input_grad[0]), *[None] * len(ctx.constants)

    return backward


def _chain(call: Lists, ctx: Any, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """`call` on the gradients that there are and that somebody needs; None for the others."""
    rest = [
        constant if saved is None else saved for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
    ]
    found: list[Tensor | None] = [None] * len(gradients)
    pairs = zip(gradients, needed, strict=True)
    wanted = {k: gradient for k, (gradient, asked) in enumerate(pairs) if gradient is not None and asked}
    if wanted:
        for k, gradient in zip(wanted, call(list(wanted.values()), *rest), strict=True):
            found[k] = gradient
    return found
