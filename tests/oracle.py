"""The method written out once more, naively and in float64: what fastle is held to.

Everything is a plain function of tensors and of a model's state dict. Convolutions are sums of shifted slices, bilinear
resizing gathers four neighbours, BatchNorm and its running statistics are written by hand, SIGReg keeps all its knots.
Nothing here calls fastle; its configuration and draws are read by their field names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastle.config import CropResizeConfig, DetailConfig, IdentityConfig, MaskConfig, NoiseConfig

if TYPE_CHECKING:
    from fastle.config import ObjectiveConfig, TransformConfig
    from fastle.method.objective import Draws
    from fastle.method.transforms import Boxes, ViewDraw

State = dict[str, Tensor]

BN_EPS = 1e-5
BN_MOMENTUM = 0.1
EMA_DECAY = 0.999


# layers


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


# model


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


def stage_error(target: Tensor, view: Tensor, *, own: bool) -> Tensor:
    """The mean squared error of two stages' features, standardised with their own statistics or with the target's."""

    def standardised(x: Tensor, by: Tensor) -> Tensor:
        statistics = batch_statistics(by)
        mean, variance = (s[:, None, None] for s in (statistics.mean, statistics.variance))
        return (x - mean) / torch.sqrt(variance + BN_EPS)

    return mse(standardised(target, target), standardised(view, view if own else target))


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


# SIGReg


def sigreg_statistics(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """(N, D) samples on (D, M) slices: the (M,) statistics, through (N, M, K) tensors."""
    step = t_max / (knots - 1)
    t = torch.arange(knots, dtype=z.dtype) * step
    phi = torch.exp(-(t**2) / 2)
    weight = 2 * step * phi
    weight[0] = weight[0] / 2
    weight[-1] = weight[-1] / 2
    angles_NMK = torch.einsum("nd,dm->nm", z, slices)[:, :, None] * t
    cosine_MK, sine_MK = angles_NMK.cos().mean(0), angles_NMK.sin().mean(0)
    return z.shape[0] * (weight * ((cosine_MK - phi) ** 2 + sine_MK**2)).sum(1)


def sigreg_gradient(z: Tensor, slices: Tensor, *, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """∂SIGReg/∂z (N, D) by the formula of docs/method.md, section 2."""
    step = t_max / (knots - 1)
    projected_NM = z @ slices
    gradient_NM = torch.zeros_like(projected_NM)
    for k in range(knots):
        t = k * step
        phi = math.exp(-t * t / 2)
        weight = (step if k in (0, knots - 1) else 2 * step) * phi
        cosine_NM, sine_NM = torch.cos(t * projected_NM), torch.sin(t * projected_NM)
        inner = sine_NM.mean(0) * cosine_NM - (cosine_NM.mean(0) - phi) * sine_NM
        gradient_NM += 2 * weight * t * inner
    return gradient_NM @ slices.T / slices.shape[1]


def sigreg(z: Tensor, slices: Tensor) -> Tensor:
    """The loss of a code: (N, D), or (B, c, h, w) tested position by position."""
    if z.dim() == 2:
        return sigreg_statistics(z, slices).mean()
    positions = [z[:, :, i, j] for i in range(z.shape[2]) for j in range(z.shape[3])]
    return torch.stack([sigreg_statistics(samples, slices).mean() for samples in positions]).mean()


@dataclass
class SIGRegOracle:
    """The (..., M) statistics, and the gradients of their mean to z (..., N, D) and to the slices (D, M).

    An entry of `to_slices` is a sum over samples whose terms may cancel. `parts` is the largest sum of the terms'
    absolute values, which sets the scale of its rounding.
    """

    statistics: Tensor
    to_z: Tensor
    to_slices: Tensor
    parts: float


def sigreg_and_gradients(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17
) -> SIGRegOracle:
    """Statistics and gradients of samples (..., N, D) by the formulas, one test and one knot at a time, in fp64.

    Args:
        weights: (..., N), how often each sample counts. Samples of weight 0 are left out before anything is computed.
    """
    leading, slices = z.shape[:-2], slices.double()
    samples = z.double().flatten(0, -3) if leading else z.double()[None]
    counted = torch.ones(samples.shape[:2]) if weights is None else weights.reshape(samples.shape[:2])
    share = 1 / (samples.shape[0] * slices.shape[1])
    to_z, to_slices, parts = torch.zeros_like(samples), torch.zeros_like(slices), torch.zeros_like(slices)
    statistics = []
    for b in range(samples.shape[0]):
        kept = counted[b] > 0
        values, times = samples[b][kept], counted[b][kept].double()[:, None]
        total = float(times.sum())
        projected_NM, score_M = values @ slices, slices.new_zeros(slices.shape[1])
        gradient_NM = torch.zeros_like(projected_NM)
        for k in range(knots if total > 0 else 0):
            step = t_max / (knots - 1)
            t = k * step
            phi = math.exp(-t * t / 2)
            weight = (step if k in (0, knots - 1) else 2 * step) * phi
            cosine_NM, sine_NM = torch.cos(t * projected_NM), torch.sin(t * projected_NM)
            cosine_M, sine_M = (times * cosine_NM).sum(0) / total - phi, (times * sine_NM).sum(0) / total
            score_M += total * weight * (cosine_M**2 + sine_M**2)
            gradient_NM += 2 * weight * t * times * (sine_M * cosine_NM - cosine_M * sine_NM)
        statistics.append(score_M)
        to_z[b, kept] = share * gradient_NM @ slices.T
        to_slices += share * values.T @ gradient_NM
        parts += share * values.T.abs() @ gradient_NM.abs()
    return SIGRegOracle(torch.stack(statistics).view(*leading, -1), to_z.view(z.shape), to_slices, float(parts.max()))


def cf_deviations(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 17
) -> Tensor:
    """(N, D) samples on (D, M) slices: Σ_n ω_n (cos − φ) and Σ_n ω_n sin at all knots but t = 0, (2, K − 1, M)."""
    times = torch.ones(z.shape[0], dtype=z.dtype) if weights is None else weights.to(z.dtype)
    rows = []
    for k in range(1, knots):
        t = k * t_max / (knots - 1)
        angles_NM = t * (z @ slices)
        rows.append(torch.stack([times @ (angles_NM.cos() - math.exp(-t * t / 2)), times @ angles_NM.sin()]))
    return torch.stack(rows, dim=1)


def sigreg_eb_jepa(
    z: Tensor, slices: Tensor, *, weights: Tensor | None = None, t_max: float = 3.0, knots: int = 10
) -> Tensor:
    """eb_jepa's loss of (N, D) samples: knots on both sides of 0, one at a time, and no factor N."""
    times = torch.ones(z.shape[0], dtype=z.dtype) if weights is None else weights.to(z.dtype)
    z, times = z[times > 0], times[times > 0]
    if z.shape[0] == 0:
        return z.sum()
    projected_NM, share_N = z @ slices, (times / times.sum()).to(torch.complex128)
    t = torch.linspace(-t_max, t_max, knots, dtype=z.dtype)
    heights = []
    for point in t:
        window = torch.exp(-(point**2) / 2)
        empirical_M = share_N @ torch.exp(1j * point * projected_NM)
        heights.append(window * (empirical_M - window).abs() ** 2)
    return torch.trapezoid(torch.stack(heights), t, dim=0).mean()


# transformations


def resize_crops(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """The box of each image back to (H, W): bilinear, corners aligned, from four gathered neighbours."""
    crops = torch.stack(
        [images[b, :, top[b] : top[b] + side, left[b] : left[b] + side] for b in range(images.shape[0])]
    )

    def neighbours(out: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(out, dtype=images.dtype) * (side - 1) / max(out - 1, 1)
        low = position.floor().long().clamp(0, side - 1)
        return low, (low + 1).clamp(max=side - 1), position - low

    y0, y1, fy = neighbours(images.shape[2])
    x0, x1, fx = neighbours(images.shape[3])
    fy = fy[:, None]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return crops[:, :, rows[:, None], columns[None, :]]

    above = at(y0, x0) * (1 - fx) + at(y0, x1) * fx
    below = at(y1, x0) * (1 - fx) + at(y1, x1) * fx
    return above * (1 - fy) + below * fy


def fill_rectangle(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """A rectangle of each image replaced by the image's own mean of each channel."""
    filled = []
    for b in range(images.shape[0]):
        rows = torch.zeros(images.shape[2], dtype=torch.bool)
        columns = torch.zeros(images.shape[3], dtype=torch.bool)
        rows[max(int(top[b]), 0) : max(int(top[b]) + height, 0)] = True
        columns[max(int(left[b]), 0) : max(int(left[b]) + width, 0)] = True
        inside = rows[:, None] & columns[None, :]
        channels = [torch.where(inside, channel.sum() / channel.numel(), channel) for channel in images[b]]
        filled.append(torch.stack(channels))
    return torch.stack(filled)


def box_mean(x: Tensor, size: int) -> Tensor:
    """The mean over the pixels of the size x size square that lie in the image."""

    def near(length: int) -> Tensor:
        i = torch.arange(length)
        return ((i[:, None] - i).abs() <= size // 2).to(x.dtype)

    rows, columns = near(x.shape[2]), near(x.shape[3])
    return rows @ x @ columns / (rows.sum(1)[:, None] * columns.sum(1))


def grey(x: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    if x.shape[1] == 3:
        return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
    return x.mean(1, keepdim=True)


def vivid(x: Tensor) -> Tensor:
    """Saturation 1.8, then contrast 1.4 about each image's mean."""
    saturated = grey(x) + 1.8 * (x - grey(x))
    mean = torch.stack([image.mean() for image in saturated])[:, None, None, None]
    return mean + 1.4 * (saturated - mean)


def sobel(g: Tensor) -> Tensor:
    """Gradient magnitude of (B, 1, H, W), its border repeated."""
    height, width = g.shape[-2:]

    def shifted(dy: int, dx: int) -> Tensor:
        rows = (torch.arange(height) + dy).clamp(0, height - 1)
        columns = (torch.arange(width) + dx).clamp(0, width - 1)
        return g[:, :, rows][:, :, :, columns]

    smooth = {-1: 1, 0: 2, 1: 1}
    gx = sum((w * (shifted(d, 1) - shifted(d, -1)) for d, w in smooth.items()), torch.zeros_like(g))
    gy = sum((w * (shifted(1, d) - shifted(-1, d)) for d, w in smooth.items()), torch.zeros_like(g))
    return torch.sqrt(gx**2 + gy**2 + 1e-12) - 1e-6


def per_image(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for each image, shaped to broadcast over it."""
    return torch.stack([reduce(image) for image in x])[:, None, None, None]


def detail_views(x: Tensor) -> list[Tensor]:
    """The five views of the detail stack."""
    g = grey(x)
    edges = sobel(g)
    texture = (x - box_mean(x, 5)).abs()
    deviation = g - box_mean(g, 5)
    contrast = deviation / torch.sqrt(box_mean(deviation**2, 5) + 1e-4)
    low, high = per_image(contrast, torch.min), per_image(contrast, torch.max)
    views = [
        box_mean(x, 11),
        vivid(x),
        edges / per_image(edges, torch.max).clamp(min=1e-6),
        texture / per_image(texture, torch.max).clamp(min=1e-6),
        (contrast - low) / (high - low).clamp(min=1e-6),
    ]
    return [view.expand_as(x).clamp(0, 1) for view in views]


def hash32(x: int) -> int:
    for _ in range(2):
        x ^= x >> 16
        x = x * 0x045D9F3B % 2**32
    return x ^ x >> 16


def keyed(seed: int, index: int) -> int:
    return hash32((hash32(seed) + (index + 1) * 0x9E3779B9) % 2**32)


def permuted(seed: int, number: int, count: int) -> int:
    """π of `fastle.kernels.random_mask`: a Feistel network of 8 rounds, walked until the number is below `count`."""
    bits = max(6, (count - 1).bit_length())
    low_bits = bits // 2
    while True:
        high, low = divmod(number, 2**low_bits)
        for r in range(0, 8, 2):
            high ^= hash32(low ^ keyed(seed, r)) % 2 ** (bits - low_bits)
            low ^= hash32(high ^ keyed(seed, r + 1)) % 2**low_bits
        number = high * 2**low_bits + low
        if number < count:
            return number


def kept(config: TransformConfig | None, x: Tensor, seeds: Tensor) -> Tensor:
    """1 where a random mask keeps a value of x and 0 elsewhere, in the shape of x."""
    assert isinstance(config, MaskConfig)
    keep = torch.ones_like(x)
    batch, channels, height, width = x.shape
    for b, seed in zip(range(batch), seeds.tolist(), strict=True):
        if config.kind == "channel":
            for c in range(channels):
                keep[b, c] = float(keyed(seed, c) >= config.ratio * 2**32)
            continue
        side = 4 if config.kind == "patch" else 1
        count, across = (height // side) * (width // side), width // side
        for p in range(count):
            if permuted(seed, p, count) < int(config.ratio * count):
                row, column = p // across * side, p % across * side
                keep[b, :, row : row + side, column : column + side] = 0
    return keep


def views(config: TransformConfig | None, x: Tensor, drawn: ViewDraw) -> list[Tensor]:
    """The views of x under the transformation whose random numbers are `drawn`."""
    if isinstance(config, DetailConfig):
        return detail_views(x)
    if isinstance(config, IdentityConfig) or drawn is None:
        return [x]
    if isinstance(drawn, Tensor):
        return [x + drawn] if isinstance(config, NoiseConfig) else [x * kept(config, x, drawn)]
    assert isinstance(config, CropResizeConfig)
    fixed = int(config.ratio * min(x.shape[2:]))
    crops = drawn if isinstance(drawn, tuple) else (drawn,)
    return [resize_crops(x, box.top, box.left, fixed if box.side is None else int(box.side)) for box in crops]


# objectives


@dataclass
class Step:
    """What one evaluation of an objective gives: the loss and its terms by fastle's names."""

    total: Tensor
    terms: dict[str, Tensor]
    latent: Tensor


def mse(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / a.numel()


def detached(state: State) -> State:
    return {name: value.detach() for name, value in state.items()}


def cut_hole(x: Tensor, hole: Boxes, ratio: float) -> Tensor:
    side = round(math.sqrt(ratio) * min(x.shape[2:]))
    return fill_rectangle(x, hole.top, hole.left, side, side)


def objective(
    config: ObjectiveConfig, state: State, ema: State | None, images: Tensor, draws: Draws, *, cut_path: bool = False
) -> Step:
    """Any row of docs/method.md, section 1. The running statistics in `state` are updated in place.

    Args:
        state: the model's state dict, its parameters leaves that require a gradient.
        ema: the weights of the EMA judge.
        images: (B, C, H, W) float64 in [0, 1].
        cut_path: detach the reconstructions before they are judged, which the method does not do.
    """
    x = images
    y = cut_hole(x, draws.hole, config.hole_ratio) if draws.hole is not None and config.hole_ratio else None
    if config.name == "pixel":
        z = encode(state, x if y is None else y)
        loss = mse(decode(state, z), x)
        return Step(loss, {"pixel": loss}, z)

    assert draws.slices is not None
    live = config.judge == "live"
    weights = state if live else detached(state) if config.judge == "step-frozen" else detached(ema or {})
    slices = draws.slices.to(x.dtype)

    def reconstruct(z: Tensor) -> Tensor:
        return decode(state, z).detach() if cut_path else decode(state, z)

    def compare(target: Tensor, view: Tensor) -> Tensor:
        representation = judge(weights, target)
        like = target if config.judge_statistics == "target" else None
        errors = [mse(representation if live else representation.detach(), judge(weights, view, like))]
        if config.judge_depth != "code":
            first = 0 if config.judge_depth == "all" else 1
            pairs = zip(stages(weights, target)[first:-1], stages(weights, view)[first:-1], strict=True)
            errors += [stage_error(wanted, ours, own=like is None) for wanted, ours in pairs]
        return torch.stack(errors).mean()

    def agreement(xhat: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = list(
            zip(views(config.transform, x, draws.view), views(config.transform, xhat, draws.view), strict=True)
        )
        mean = torch.stack([compare(target, view) for target, view in pairs]).mean()
        crops = config.transform
        full = crops.full_view if isinstance(crops, CropResizeConfig) else isinstance(crops, DetailConfig)
        return mean, compare(x, xhat) if full else None

    def combined(mean: Tensor, full: Tensor | None) -> Tensor:
        return mean if full is None else (mean + full) / 2

    z_clean = encode(state, x)
    xhat_clean = reconstruct(z_clean)
    if y is None:
        mean, full = agreement(xhat_clean)
        regularizer = sigreg(z_clean, slices)
        terms = {"agreement": mean, "sigreg": regularizer} | ({} if full is None else {"full_view": full})
        return Step(combined(mean, full) + config.sigreg_weight * regularizer, terms, z_clean)

    z_masked = encode(state, y)
    xhat_masked = reconstruct(z_masked)
    consistency = mse(judge(weights, xhat_clean), judge(weights, xhat_masked))
    clean, masked = combined(*agreement(xhat_clean)), combined(*agreement(xhat_masked))
    regularizer = (sigreg(z_clean, slices) + sigreg(z_masked, slices)) / 2
    total = (consistency + clean + masked) / 3 + config.sigreg_weight * regularizer
    terms = {"consistency": consistency, "clean": clean, "masked": masked, "sigreg": regularizer}
    return Step(total, terms, z_clean)


def update_ema(ema: State, state: State) -> State:
    """After an optimizer step: 0.999 of the old judge and 0.001 of the encoder."""
    return {name: EMA_DECAY * value + (1 - EMA_DECAY) * state[name].detach() for name, value in ema.items()}
