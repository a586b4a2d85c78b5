"""The optimizers: AdamW, and Muon, which gives the directions of a weight's update all the same length.

Muon (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks") takes weights for matrices. It
steps along the orthogonal factor of their momentum: of U S Vᵀ it takes U Vᵀ. So a few large directions do not drown all
others. Five Newton-Schulz iterations come near to that (see `orthogonalize`). The step is scaled to what AdamW's would
be (Liu et al., 2025, "Muon is scalable for LLM training"), and both have one rate.

`torch.optim.Muon` takes matrices only, not the weights of convolutions, and no rate in a tensor, which a CUDA graph
needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastle.config import TrainConfig

MOMENTUM = 0.95
# coefficients of the iteration X ↦ a X + (b X Xᵀ + c (X Xᵀ)²) X: a, b and c
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# the root mean square that AdamW's steps typically have, over its rate
RMS = 0.2


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a configuration, around all weights that a step changes."""
    # a captured graph would keep a Python number for good; a tensor it reads anew in every replay
    captured = device.type == "cuda"
    rate = torch.tensor(config.lr, device=device) if captured else config.lr
    weights = trained(model)
    adamw = torch.optim.AdamW(weights, lr=rate, weight_decay=config.weight_decay, fused=True, capturable=captured)
    if config.optimizer == "adamw":
        return adamw
    matrices = [weight for weight in weights if weight.ndim >= 2]
    # Newton-Schulz needs no more precision than the step has
    return Muon(adamw, matrices, torch.bfloat16 if config.precision == "bf16" else None)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that a step changes: parts of a network of the caller's own may be fixed."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Muon(torch.optim.Optimizer):
    """Muon for some weights, and AdamW for all others.

    Its state is AdamW's, except that Muon's weights have their momentum ("exp_avg") only.

    Args:
        adamw: Around all weights; its rate and its weight decay are Muon's too.
        matrices: Muon's weights, of two or more dimensions: the first is the rows', and all others are the columns'.
        dtype: In which the directions are computed; None for the weights' own.
    """

    def __init__(self, adamw: torch.optim.AdamW, matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self._adamw, self._dtype = adamw, dtype
        (group,) = adamw.param_groups
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in group["params"] if id(weight) not in chosen]
        shared = {name: group[name] for name in ("lr", "weight_decay")}
        super().__init__([{**group, "params": others}, {"params": list(matrices), **shared}], {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient."""
        others, matrices = self.param_groups
        for weight in matrices["params"]:
            if weight.grad is not None:
                self._update(weight, weight.grad, matrices["lr"], matrices["weight_decay"])
        # its own groups hold the matrices too, and loading a state gives this optimizer new groups and a new dict
        self._adamw.param_groups, self._adamw.state = [others], self.state
        self._adamw.step()

    def _update(self, weight: Tensor, gradient: Tensor, rate: float | Tensor, decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
        momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        # Nesterov's: the gradient, and the momentum that it has just moved
        direction = orthogonalize(gradient.lerp(momentum, MOMENTUM).flatten(1).to(self._dtype or weight.dtype))
        scale = RMS * max(direction.shape) ** 0.5
        weight.mul_(1 - rate * decay).sub_(direction.reshape(weight.shape).to(weight.dtype) * (rate * scale))


def kept_of(optimizer: torch.optim.Optimizer) -> Iterable[tuple[nn.Parameter, tuple[str, ...]]]:
    """Each weight in the order of the optimizer's state dict, and the names of the tensors that are kept of it."""
    for group in optimizer.param_groups:
        names = ("step", "exp_avg", "exp_avg_sq") if "betas" in group else ("exp_avg",)
        yield from ((weight, names) for weight in group["params"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ (rows, columns).

    Singular values above 0.002 of the Frobenius norm become 0.68 to 1.21. Smaller ones grow up to 485 times, so that
    what is as good as nothing stays small.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    # the iteration multiplies by the smaller of X Xᵀ and Xᵀ X
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
