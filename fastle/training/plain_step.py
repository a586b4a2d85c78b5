"""The plain training step, with which fastle's step is compared: the author's structure in plain modules.

It computes the same as fastle's step, without fastle's savings. All convolutions, those of size 1 too, run on the
upsampled map. Encoder and decoder run once for each branch, the judge once for each view. The judge is a second encoder
that receives a copy of the weights after every step. Crops use grid_sample, with a new grid in each call; the hole uses
torch.where; SIGReg builds every (N, M, K) tensor. State dicts have fastle's keys, and all random numbers come from
fastle's `Draws`.

It supports the configurations that are measured: the step-frozen judge with crop-resize, with or without a mask, and
gradients with or without a bound.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.choices import StepMode
from fastle.config import CropResizeConfig, ModelConfig, ObjectiveConfig, Precision, RunConfig
from fastle.kernels import reference
from fastle.method.objective import Draws
from fastle.method.transforms import Boxes, box_blur, box_size, to_grey
from fastle.phases import phase

from .optimizer import make_optimizer
from .trainer import Trainer

Box = tuple[int | Tensor, int | Tensor]  # height and width, pixels


class PlainDown(nn.Module):
    """(B, C_in, H, W) → (B, C_out, H/2, W/2)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        skip = F.pixel_unshuffle(x, 2).reshape(batch, self.mix.out_channels, -1, height // 2, width // 2).mean(dim=2)
        return F.silu(self.mix(F.silu(self.reduce(x))) + skip)


class PlainUp(nn.Module):
    """(B, C_in, H, W) → (B, C_out, 2H, 2W)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.mix = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.silu(self.mix(F.silu(self.expand(x))) + self.skip(x))


class PlainEncoder(nn.Module):
    """(B, C, H, W) in [0, 1] → latents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, channels = config.hidden, config.map_channels
        self.stem = nn.Conv2d(config.channels, hidden, 4, stride=2, padding=1)
        self.down = nn.Sequential(PlainDown(hidden, 2 * hidden), PlainDown(2 * hidden, channels))
        self.pool = nn.Linear(math.prod(config.map_shape), config.latent) if config.latent else None
        self.norm = nn.BatchNorm1d(config.latent_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        code = self.features(x)[-1]
        return self.norm(code) if code.ndim == 2 else self.norm(code.flatten(2)).reshape(code.shape)

    def features(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stem and of the blocks, and the code where a Linear makes it."""
        features = [F.silu(self.stem(x))]
        for block in self.down:
            features.append(block(features[-1]))
        if self.pool is not None:
            features.append(self.pool(features[-1].flatten(1)))
        # under autocast, the latent and its statistics stay in the weights' precision, as in fastle's model
        return [feature.to(self.norm.weight.dtype) for feature in features]


class PlainDecoder(nn.Module):
    """Latents → (B, C, H, W) in [0, 1]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.map_shape, hidden = config.map_shape, config.hidden
        self.unpool = nn.Linear(config.latent, math.prod(config.map_shape)) if config.latent else None
        self.up = nn.Sequential(PlainUp(config.map_channels, 2 * hidden), PlainUp(2 * hidden, hidden))
        self.head = nn.Conv2d(hidden, config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        if self.unpool is not None:
            z = F.silu(self.unpool(z)).reshape(-1, *self.map_shape)
        x = self.head(F.interpolate(self.up(z), scale_factor=2, mode="nearest"))
        return torch.sigmoid(x.to(self.head.weight.dtype))


class PlainAutoencoder(nn.Module):
    """The parameters of fastle's `Autoencoder`, under the same names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = PlainEncoder(config), PlainDecoder(config)


class PlainObjective(nn.Module):
    """agreement + λ·SIGReg(z), or the weighted mean of consistency, clean and masked + λ · mean SIGReg of all latents.

    Attributes:
        judge: A separate encoder, which receives the encoder's weights from `refresh_judge`.
    """

    def __init__(self, model: PlainAutoencoder, config: ObjectiveConfig) -> None:
        super().__init__()
        if config.judge != "step-frozen" or not isinstance(config.transform, CropResizeConfig):
            raise ValueError(f"the plain step has a step-frozen judge and crop-resize, not {config}")
        self.model, self.config = model, config
        self.transform = config.transform
        self.judge = copy.deepcopy(model.encoder).requires_grad_(False)
        # without running statistics, BatchNorm uses those of the batch
        self.judge.norm.track_running_stats = False
        self.judge.norm.running_mean = self.judge.norm.running_var = self.judge.norm.num_batches_tracked = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """The loss, a scalar, of a batch (B, C, H, W), uint8 or float in [0, 1]."""
        config, encoder, decoder = self.config, self.model.encoder, self.model.decoder
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        crops = draws.view if isinstance(draws.view, tuple) else (draws.view,)

        def agreement(xhat: Tensor) -> Tensor:
            errors = [self._compare(self._crop(x, boxes), self._crop(xhat, boxes)) for boxes in crops]
            errors += [self._compare(blurred(x, side), blurred(xhat, side)) for side in self.transform.blur_views]
            agreed = torch.stack(errors).mean()
            return (agreed + self._compare(x, xhat)) / 2 if self.transform.full_view else agreed

        if draws.hole is None or config.hole_ratio is None:
            with phase("encode"):
                z = encoder(x)
            with phase("decode"):
                xhat = decoder(z)
            return agreement(xhat) + config.sigreg_weight * self._sigreg(z, draws)
        hole = box_size(round(math.sqrt(config.hole_ratio) * min(x.shape[2:])), x.shape)
        corners = zip(draws.hole.top.chunk(config.holes), draws.hole.left.chunk(config.holes), strict=True)
        branches = [x, *(cut(x, Boxes(top, left), hole) for top, left in corners)]
        with phase("encode"):
            if config.branch_statistics == "joint":
                latents = encoder(torch.cat(branches)).chunk(len(branches))
            else:
                latents = [encoder(branch) for branch in branches]
        with phase("decode"):
            xhat, *xhats = (decoder(z) for z in latents)
        clean, masked = agreement(xhat), torch.stack([agreement(xhat) for xhat in xhats]).mean()
        with phase("judge"):
            code = self.judge(xhat)
            consistency = torch.stack([F.mse_loss(code, self.judge(xhat)) for xhat in xhats]).mean()
        regularizer = torch.stack([self._sigreg(z, draws) for z in latents]).mean()
        total = config.consistency_weight * consistency + clean + config.masked_weight * masked
        weights = config.consistency_weight + 1 + config.masked_weight
        return total / weights + config.sigreg_weight * regularizer

    def _crop(self, images: Tensor, boxes: Boxes) -> Tensor:
        least = int(self.transform.ratio * min(images.shape[2:]))
        box: Box = box_size(least, images.shape) if boxes.side is None else box_size(boxes.side, images.shape)
        return crop(images, boxes, box)

    def _compare(self, target: Tensor, view: Tensor) -> Tensor:
        """The mean over the judge's features of mse(J(target), J(view)), or to first order about the view."""
        norm, reach = self.judge.norm, self.config.judge_reach
        first = {"code": -1, "features": 1, "all": 0}[self.config.judge_depth]
        near = target
        if reach < 1:
            with phase("views"):
                here = view.detach()
                near, view = torch.lerp(here, target, reach), torch.lerp(here, view, reach)
        with phase("judge"):
            with torch.no_grad():
                wanted = self.judge.features(near)[first:]
                true = self.judge.features(target)[first:] if reach < 1 else wanted
            errors = []
            for want, like, ours in zip(wanted, true, self.judge.features(view)[first:], strict=True):
                affine = (norm.weight, norm.bias) if want is wanted[-1] else None
                by = like if self.config.judge_statistics == "target" else None
                seen = standardize(ours, by, norm.eps, affine)
                # with a reach of 1 its own statistics are the target's, and BatchNorm is the faster form
                wished = standardize(want, by if reach < 1 else None, norm.eps, affine)
                errors.append(F.mse_loss(seen, wished) / reach**2)
            return torch.stack(errors).mean()

    @torch.no_grad()
    def refresh_judge(self) -> None:
        """Copies the encoder's weights to the judge; call it after the optimizer's step."""
        for copied, parameter in zip(self.judge.parameters(), self.model.encoder.parameters(), strict=True):
            copied.copy_(parameter)

    def _sigreg(self, z: Tensor, draws: Draws) -> Tensor:
        assert draws.slices is not None
        # bf16 cosines would spoil the statistic; fastle's operator computes in fp32 too
        with phase("SIGReg"), torch.autocast(z.device.type, enabled=False):
            samples = z if z.ndim == 2 else z.flatten(2).permute(2, 0, 1)
            return reference.sigreg(samples, draws.slices).mean()


def blurred(images: Tensor, side: int) -> Tensor:
    """The grey images in all channels, blurred by boxes of a side in pixels."""
    with phase("views"):
        return box_blur(to_grey(images), side).expand_as(images)


def standardize(x: Tensor, like: Tensor | None, eps: float, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """Each channel of x, (B, C, ...), normalised by the mean and variance of `like` (None: of x), then by `affine`."""
    if like is None:
        weight, bias = affine or (None, None)
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    dims = [dim for dim in range(like.ndim) if dim != 1]
    mean, variance = like.mean(dims, keepdim=True), like.var(dims, correction=0, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + eps)
    return x if affine is None else x * affine[0].view_as(mean) + affine[1].view_as(mean)


def crop(x: Tensor, boxes: Boxes, box: Box) -> Tensor:
    """A box of each image, (height, width) in pixels, resized back to the image's size."""
    with phase("views"):
        return grid_crop(x, boxes.top, boxes.left, box, (x.shape[2], x.shape[3]))


def cut(x: Tensor, boxes: Boxes, hole: tuple[int, int]) -> Tensor:
    """Each image with a hole, (height, width) in pixels, filled by the mean of each of its channels."""
    with phase("views"):
        return fill_with_mean(x, boxes.top, boxes.left, hole)


def grid_crop(x: Tensor, top: Tensor, left: Tensor, box: Box, out: tuple[int, int]) -> Tensor:
    """A box of each image (B, C, H, W), resized by grid_sample with aligned corners.

    Args:
        top, left: (B,), the corner of each image's box.
        box: Rows and columns of the boxes, numbers or tensors of shape ().
        out: Rows and columns of the result.
    """
    down, across = (
        2 * (corner[:, None] + torch.linspace(0, side - 1, n, dtype=x.dtype, device=x.device)) / (extent - 1) - 1
        for corner, side, n, extent in zip((top, left), box, out, x.shape[2:], strict=True)
    )
    size = (len(x), *out)
    grid = torch.stack((across[:, None, :].expand(size), down[:, :, None].expand(size)), dim=-1)
    # where rounding puts a coordinate outside the image, the border is read, not zero
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def fill_with_mean(x: Tensor, top: Tensor, left: Tensor, hole: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) with a hole of some rows and columns, filled by the mean of each channel."""
    rows, columns = (
        (line >= corner[:, None]) & (line < corner[:, None] + side)
        for corner, side, line in zip(
            (top, left), hole, (torch.arange(n, device=x.device) for n in x.shape[2:]), strict=True
        )
    )
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(inside, x.mean(dim=(2, 3), keepdim=True), x)


class StartingPoint:
    """fastle's initial weights and draws, from which another implementation of the step can start.

    Args:
        config: The run's configuration; its precision does not matter.
        device: Where weights and draws live.
        total_steps: See `Trainer`.

    Attributes:
        weights: A state dict.
    """

    def __init__(self, config: RunConfig, device: torch.device, *, total_steps: int | None = None) -> None:
        self.config, self.device = config, device
        # only its weights, draws and rates are used: its step is never taken
        self._step = Trainer(config, device, total_steps=total_steps)
        self.weights: dict[str, Tensor] = self._step.model.state_dict()

    def draw(self, images: Tensor, done: int) -> Draws:
        """The draws of fastle's step for a batch, after `done` steps."""
        self._step.done = done
        return self._step.draw(images)

    def rate(self, done: int) -> float:
        """The learning rate of fastle's step after `done` steps."""
        return self._step.rate(done)

    def parameters(self) -> list[Tensor]:
        """The initial parameters, in the model's order."""
        return [parameter.detach() for parameter in self._step.model.parameters()]


class PlainStep:
    """Draw, loss, backward, the optimizer, and the copy of the weights to the judge.

    Args:
        start: Where the weights and the draws come from.
        precision: "bf16" is autocast; weights, latent and statistics stay fp32.
        channels_last: The memory format of the weights, which the convolutions' results take over; otherwise they are
            contiguous.
        mode: "compiled" computes the loss as one graph of torch.compile, "captured" records that in CUDA graphs, as
            torch.compile's "reduce-overhead" does.

    Raises:
        ValueError: The configuration's judge or transformation is not the one that this step knows.
    """

    def __init__(
        self,
        start: StartingPoint,
        *,
        precision: Precision = "fp32",
        channels_last: bool = False,
        mode: StepMode = "eager",
    ) -> None:
        config, self.device, self._start = start.config, start.device, start
        self.precision, self.done = precision, 0
        self.model = PlainAutoencoder(config.model)
        self.model.load_state_dict(start.weights)
        self.model.to(self.device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective = PlainObjective(self.model, config.objective)
        train = config.train
        self._clip = train.clip
        self.optimizer: torch.optim.Optimizer
        if train.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
        else:
            self.optimizer = make_optimizer(self.model, dataclasses.replace(train, precision=precision), self.device)
        if mode != "eager":
            # compile the whole graph or fail: a silent fallback would be timed as if it were compiled
            graphs = "reduce-overhead" if mode == "captured" else None
            self.objective.compile(fullgraph=True, dynamic=False, mode=graphs)

    def __call__(self, images: Tensor) -> Tensor:
        """Takes one step on a batch, uint8 (B, C, H, W) on the device. Returns the loss."""
        with phase("draws"):
            draws = self._start.draw(images, self.done)
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with phase("loss"), autocast:
            loss = cast(Tensor, self.objective(images, draws))
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            if self._clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
            for group in self.optimizer.param_groups:
                group["lr"] = self._start.rate(self.done)
            self.optimizer.step()
            self.objective.refresh_judge()
        self.done += 1
        # a CUDA graph's next step overwrites this loss
        return loss.detach().clone()
