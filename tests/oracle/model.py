"""The layers, the encoder with its judge, and the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

State = dict[str, Tensor]

BN_EPS = 1e-5
BN_MOMENTUM = 0.1
EMA_DECAY = 0.999


def conv(x: Tensor, state: State, name: str, *, stride: int = 1, padding: int) -> Tensor:
    """Convolution (B, C, H, W) with `name`.weight (O, C, k, k) and `name`.bias: one shifted slice for each tap."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    batch, channels, height, width = x.shape
    k = weight.shape[-1]
    padded = x.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    out_h, out_w = ((n + 2 * padding - k) // stride + 1 for n in (height, width))
    rows = [slice(i, i + stride * (out_h - 1) + 1, stride) for i in range(k)]
    columns = [slice(j, j + stride * (out_w - 1) + 1, stride) for j in range(k)]
    taps = torch.stack([padded[:, :, row, column] for row in rows for column in columns])
    return torch.einsum("tbchw,oct->bohw", taps, weight.flatten(2)) + bias[:, None, None]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """(B, I) → (B, O)."""
    return (x[:, None, :] * state[f"{name}.weight"]).sum(-1) + state[f"{name}.bias"]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def nearest_x2(x: Tensor) -> Tensor:
    """out[i, j] = x[i // 2, j // 2]."""
    rows = torch.arange(2 * x.shape[2]) // 2
    columns = torch.arange(2 * x.shape[3]) // 2
    return x[:, :, rows][:, :, :, columns]


def unshuffle_average(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) → (B, channels, H/2, W/2): the 4C channels (c, row parity, column parity), averaged in groups."""
    pieces = [x[:, c, i::2, j::2] for c in range(x.shape[1]) for i in (0, 1) for j in (0, 1)]
    group = len(pieces) // channels
    return torch.stack([torch.stack(pieces[g * group : (g + 1) * group]).mean(0) for g in range(channels)], 1)


@dataclass
class Statistics:
    """BatchNorm's mean and biased variance of one batch, (c,) each, and the number of values behind each."""

    mean: Tensor
    variance: Tensor
    count: int


def batch_statistics(code: Tensor) -> Statistics:
    """Over everything but the channels (axis 1)."""
    values = code.transpose(0, 1).flatten(1)
    count = values.shape[1]
    mean = values.sum(1) / count
    return Statistics(mean, ((values - mean[:, None]) ** 2).sum(1) / count, count)


def normalise(code: Tensor, mean: Tensor, variance: Tensor, state: State) -> Tensor:
    """BatchNorm with the given statistics and the affine weights of `encoder.norm`."""
    shape = (-1,) + (1,) * (code.dim() - 2)
    centred = (code - mean.view(shape)) / torch.sqrt(variance.view(shape) + BN_EPS)
    return centred * state["encoder.norm.weight"].view(shape) + state["encoder.norm.bias"].view(shape)


def update_running(state: State, statistics: Statistics) -> None:
    """Momentum 0.1, with the unbiased variance."""
    unbiased = statistics.variance * statistics.count / (statistics.count - 1)
    for name, value in (("running_mean", statistics.mean), ("running_var", unbiased)):
        key = f"encoder.norm.{name}"
        state[key] = (1 - BN_MOMENTUM) * state[key] + BN_MOMENTUM * value.detach()
    state["encoder.norm.num_batches_tracked"] = state["encoder.norm.num_batches_tracked"] + 1


def trunk(state: State, x: Tensor) -> Tensor:
    """The code before its BatchNorm."""
    return stages(state, x)[-1]


def stages(state: State, x: Tensor) -> list[Tensor]:
    """The outputs of the stem and of the blocks, and the code before its BatchNorm where a Linear makes it."""
    h = silu(conv(x, state, "encoder.stem", stride=2, padding=1))
    outputs = [h]
    for block in ("encoder.down.0", "encoder.down.1"):
        main = conv(h, state, f"{block}.reduce", stride=2, padding=1)
        main = conv(silu(main), state, f"{block}.mix", padding=1)
        h = silu(main + unshuffle_average(h, main.shape[1]))
        outputs.append(h)
    return [*outputs, linear(h.flatten(1), state, "encoder.pool")] if "encoder.pool.weight" in state else outputs


def encode(state: State, x: Tensor) -> Tensor:
    """E(x) in training: the batch's statistics, and the running ones move on."""
    code = trunk(state, x)
    statistics = batch_statistics(code)
    update_running(state, statistics)
    return normalise(code, statistics.mean, statistics.variance, state)


def encode_eval(state: State, x: Tensor) -> Tensor:
    """E(x) in evaluation."""
    running = (state["encoder.norm.running_mean"], state["encoder.norm.running_var"])
    return normalise(trunk(state, x), *running, state)


def judge(state: State, x: Tensor, like: Tensor | None = None) -> Tensor:
    """J(x): the statistics of this batch, or of the images `like`, the running ones untouched."""
    code = trunk(state, x)
    statistics = batch_statistics(code if like is None else trunk(state, like))
    return normalise(code, statistics.mean, statistics.variance, state)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / a.numel()


def stage_error(target: Tensor, view: Tensor, like: Tensor | None) -> Tensor:
    """The mean squared error of two stages' features, standardised by their own statistics or by those of `like`."""

    def standardised(x: Tensor, by: Tensor) -> Tensor:
        statistics = batch_statistics(by)
        mean, variance = (s[:, None, None] for s in (statistics.mean, statistics.variance))
        return (x - mean) / torch.sqrt(variance + BN_EPS)

    return mse(*(standardised(x, x if like is None else like) for x in (target, view)))


def decode(state: State, z: Tensor) -> Tensor:
    """D(z)."""
    h = z
    if "decoder.unpool.weight" in state:
        channels = state["decoder.up.0.expand.weight"].shape[1]
        flat = linear(z, state, "decoder.unpool")
        side = math.isqrt(flat.shape[1] // channels)
        h = silu(flat.view(-1, channels, side, side))
    for block in ("decoder.up.0", "decoder.up.1"):
        wide = nearest_x2(h)
        main = conv(silu(conv(wide, state, f"{block}.expand", padding=1)), state, f"{block}.mix", padding=1)
        h = silu(main + conv(wide, state, f"{block}.skip", padding=0))
    return sigmoid(conv(nearest_x2(h), state, "decoder.head", padding=1))
