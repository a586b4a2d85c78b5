"""The plain step that fastle's is measured against: the author's structure in plain modules.

It computes what fastle computes, and saves nothing: convolutions on the upsampled map, also of size 1; the encoder and
the decoder once for each branch, the judge once for each view; the judge is a second encoder, and the weights are
copied to it after every step of the optimizer; crops by grid_sample, its grid made in each call; the hole by where;
SIGReg with every (N, M, K) tensor. State dicts have fastle's keys, and everything random comes in fastle's `Draws`.

It knows the rows that are measured: the step-frozen judge with crop-resize, masked or not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.config import CropResizeConfig, ModelConfig, ObjectiveConfig, RunConfig
from fastle.kernels import reference
from fastle.method.objective import Draws
from fastle.method.transforms import Boxes
from fastle.phases import phase


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
    """(B, C, size, size) in [0, 1] → codes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, channels = config.hidden, config.map_channels
        self.stem = nn.Conv2d(config.channels, hidden, 4, stride=2, padding=1)
        self.down = nn.Sequential(PlainDown(hidden, 2 * hidden), PlainDown(2 * hidden, channels))
        self.pool = nn.Linear(math.prod(config.map_shape), config.latent) if config.latent else None
        self.norm = nn.BatchNorm1d(config.latent_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.norm(x) if x.ndim == 2 else self.norm(x.flatten(2)).reshape(x.shape)

    def features(self, x: Tensor) -> Tensor:
        x = self.down(F.silu(self.stem(x)))
        if self.pool is not None:
            x = self.pool(x.flatten(1))
        # under autocast, as fastle: the latent and its statistics stay in the weights' precision
        return x.to(self.norm.weight.dtype)


class PlainDecoder(nn.Module):
    """Codes → (B, C, size, size) in [0, 1]."""

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
    """agreement + λ·SIGReg(z), or (consistency + clean + masked) / 3 + λ/2 · (SIGReg(z_c) + SIGReg(z_m)).

    Attributes:
        judge: an encoder of its own; `refresh_judge` gives it the encoder's weights.
    """

    def __init__(self, model: PlainAutoencoder, config: ObjectiveConfig) -> None:
        super().__init__()
        if config.judge != "step-frozen" or not isinstance(config.transform, CropResizeConfig):
            raise ValueError(f"the plain step has a step-frozen judge and crop-resize, not {config}")
        self.model, self.config, self.crop_ratio = model, config, config.transform.ratio
        self.judge = copy.deepcopy(model.encoder).requires_grad_(False)
        # without running statistics a BatchNorm takes those of its batch
        self.judge.norm.track_running_stats = False
        self.judge.norm.running_mean = self.judge.norm.running_var = self.judge.norm.num_batches_tracked = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """The loss of a batch (B, C, H, W), uint8 or in [0, 1]."""
        config, encoder, decoder = self.config, self.model.encoder, self.model.decoder
        assert isinstance(draws.view, Boxes)
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        boxes, side = draws.view, int(self.crop_ratio * min(x.shape[2:]))
        with torch.no_grad():
            seen = crop(x, boxes, side)
            target, like = self._judged(seen, None), None
            if config.judge_statistics == "target":
                with phase("judge"):
                    like = self.judge.features(seen)
        with phase("encode"):
            z = encoder(x)
        with phase("decode"):
            xhat = decoder(z)
        agreement = F.mse_loss(self._judged(crop(xhat, boxes, side), like), target)
        if draws.hole is None:
            return agreement + config.sigreg_weight * self._sigreg(z, draws)
        assert config.hole_ratio is not None
        y = cut(x, draws.hole, round(math.sqrt(config.hole_ratio) * min(x.shape[2:])))
        with phase("encode"):
            z_masked = encoder(y)
        with phase("decode"):
            xhat_masked = decoder(z_masked)
        masked = F.mse_loss(self._judged(crop(xhat_masked, boxes, side), like), target)
        consistency = F.mse_loss(self._judged(xhat, None), self._judged(xhat_masked, None))
        regularizer = (self._sigreg(z, draws) + self._sigreg(z_masked, draws)) / 2
        return (consistency + agreement + masked) / 3 + config.sigreg_weight * regularizer

    def _judged(self, view: Tensor, like: Tensor | None) -> Tensor:
        """J of a view, with its own batch's mean and variance or with those of the features `like`."""
        with phase("judge"):
            if like is None:
                return self.judge(view)
            dims, norm = [dim for dim in range(like.ndim) if dim != 1], self.judge.norm
            mean, variance = like.mean(dims, keepdim=True), like.var(dims, correction=0, keepdim=True)
            weight, bias = norm.weight.view_as(mean), norm.bias.view_as(mean)
            return (self.judge.features(view) - mean) / torch.sqrt(variance + norm.eps) * weight + bias

    @torch.no_grad()
    def refresh_judge(self) -> None:
        """After the optimizer's step."""
        for copied, parameter in zip(self.judge.parameters(), self.model.encoder.parameters(), strict=True):
            copied.copy_(parameter)

    def _sigreg(self, z: Tensor, draws: Draws) -> Tensor:
        assert draws.slices is not None
        # bf16 cosines would spoil the statistic, here as in fastle
        with phase("SIGReg"), torch.autocast(z.device.type, enabled=False):
            samples = z if z.ndim == 2 else z.flatten(2).permute(2, 0, 1)
            return reference.sigreg(samples, draws.slices).mean()


def crop(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    """A square box of each image, resized back to the image's size."""
    with phase("views"):
        return _crop(x, boxes, side)


def _crop(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    height, width = x.shape[2:]
    down, across = (
        2 * (corner[:, None] + torch.linspace(0, side - 1, n, dtype=x.dtype, device=x.device)) / (n - 1) - 1
        for corner, n in ((boxes.top, height), (boxes.left, width))
    )
    size = (len(x), height, width)
    grid = torch.stack((across[:, None, :].expand(size), down[:, :, None].expand(size)), dim=-1)
    # a coordinate that rounding puts past the image reads its border, not zero
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def cut(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    """A square of each image filled with the mean of each of its channels."""
    with phase("views"):
        return _cut(x, boxes, side)


def _cut(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    rows, columns = (
        (line >= corner[:, None]) & (line < corner[:, None] + side)
        for corner, line in zip(
            (boxes.top, boxes.left), (torch.arange(n, device=x.device) for n in x.shape[2:]), strict=True
        )
    )
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(inside, x.mean(dim=(2, 3), keepdim=True), x)


class PlainStep:
    """Draw, loss, backward, AdamW with PyTorch's defaults, copy to the judge.

    Args:
        config: of the run, its precision included: "bf16" is autocast, with fp32 weights, latent and statistics.
        weights: a state dict, of fastle's model or of this one.
        draw: everything random in a step, of a batch and the number of steps before.
        channels_last: the weights' memory format, which the convolutions' results take over; contiguous without.
        compiled: the loss as one graph of torch.compile.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        weights: dict[str, Tensor],
        draw: Callable[[Tensor, int], Draws],
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.config, self.device, self.done, self._draw = config, device, 0, draw
        self.model = PlainAutoencoder(config.model)
        self.model.load_state_dict(weights)
        self.model.to(device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective = PlainObjective(self.model, config.objective)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.train.lr)
        if compiled:
            # with the whole graph or an error: a silent fallback would be timed as if it were compiled
            self.objective.compile(fullgraph=True, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """One step on a batch, uint8 (B, C, size, size) on the device. Returns the loss."""
        with phase("draws"):
            draws = self._draw(images, self.done)
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")
        with phase("loss"), autocast:
            loss = cast(Tensor, self.objective(images, draws))
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.objective.refresh_judge()
        self.done += 1
        return loss.detach()
