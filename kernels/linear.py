"""Registers a linear operator on image batches together with its adjoint, which computes its gradient.

Both take a list of image batches and the same further arguments; no gradient goes to the latter. Each operator is the
other's derivative, so derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .images import dense
from .impl import traced

Batches = list[Tensor]
ImagesOperator = Callable[..., Batches]


def linear_operator(
    name: str, arguments: str, *, forward: ImagesOperator, adjoint: ImagesOperator, empty: Callable[..., Tensor],
    empty_adjoint: Callable[..., Tensor],
) -> ImagesOperator:  # fmt: skip
    """Registers `fastle::name` and `fastle::name_backward`; returns the operator as a function of (images, *arguments).

    Args:
        name: The operator's name.
        arguments: The schema of the arguments after the images.
        forward: (images, *arguments) → results; images are dense.
        adjoint: (gradients to the results, *arguments) → gradients to the images; gradients are dense.
        empty: Makes one uninitialised result from one image and the arguments.
        empty_adjoint: Makes one uninitialised gradient to an image from one gradient to a result and the arguments.
    """

    def dense_adjoint(gradients: Batches, *rest: Any) -> Batches:
        return adjoint([dense(gradient) for gradient in gradients], *rest)

    schema = f"(Tensor[] images, {arguments}) -> Tensor[]"
    operator = torch.library.custom_op(f"fastle::{name}", forward, mutates_args=(), schema=schema)
    backward = torch.library.custom_op(f"fastle::{name}_backward", dense_adjoint, mutates_args=(), schema=schema)
    operator.register_fake(lambda images, *rest: [empty(image, *rest) for image in images])
    backward.register_fake(lambda images, *rest: [empty_adjoint(dense(image), *rest) for image in images])
    operator.register_autograd(_backward_of(backward), setup_context=_save_arguments)
    backward.register_autograd(_backward_of(operator), setup_context=_save_arguments)

    class Eager(torch.autograd.Function):
        """The same operator without the cost of its dispatch."""

        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], *images: Tensor) -> tuple[Tensor, ...]:
            results = tuple(forward(list(images), *rest))
            _save_arguments(ctx, (images, *rest), results)
            pairs = zip(images, results, strict=True)
            ctx.mark_non_differentiable(*[result for image, result in pairs if not image.requires_grad])
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # the registered operator can be differentiated again
            adjoint_operator = backward if torch.is_grad_enabled() else dense_adjoint
            return None, *_vjp(adjoint_operator, ctx, gradients, ctx.needs_input_grad[1:])

    def call(images: Batches, *rest: Any) -> Batches:
        return operator(images, *rest) if traced(*images) else list(Eager.apply(rest, *images))

    return call


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    _, *rest = inputs
    # results without a gradient need no gradient of zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in rest])
    ctx.constants = [None if isinstance(value, Tensor) else value for value in rest]


def _backward_of(adjoint: ImagesOperator) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return _vjp(adjoint, ctx, gradients, ctx.needs_input_grad[0]), *[None] * len(ctx.constants)

    return backward


def _vjp(
    adjoint: ImagesOperator, ctx: Any, gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients to the images that need one and whose result has one; None for the others."""
    rest = [
        constant if saved is None else saved for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
    ]
    to_images: list[Tensor | None] = [None] * len(gradients)
    pairs = zip(gradients, needed, strict=True)
    needing = {k: gradient for k, (gradient, is_needed) in enumerate(pairs) if gradient is not None and is_needed}
    if needing:
        for k, gradient in zip(needing, adjoint(list(needing.values()), *rest), strict=True):
            to_images[k] = gradient
    return to_images
