"""The plain training step, with which fastle's step is compared: the author's structure in plain modules.

It computes the same as fastle's step, without fastle's savings. All convolutions, those of size 1 too, run on the
upsampled map. Encoder and decoder run once for each branch, the judge once for each view. The judge is a second encoder
that receives a copy of the weights after every step. Crops use grid_sample, with a new grid in each call; the hole uses
torch.where; SIGReg builds every (N, M, K) tensor. State dicts have fastle's keys, and all random numbers come from
fastle's `Draws`.

It supports the configurations that are measured: the step-frozen judge with crop-resize, with or without a mask.
"""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.config import CropResizeConfig, ModelConfig, ObjectiveConfig, Precision, RunConfig
from fastle.kernels import reference
from fastle.method.objective import Draws
from fastle.method.transforms import Boxes
from fastle.phases import phase

from .trainer import Trainer


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
        # under autocast, the latent and its statistics stay in the weights' precision, as in fastle's model
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
        judge: a separate encoder, which receives the encoder's weights from `refresh_judge`.
    """

    def __init__(self, model: PlainAutoencoder, config: ObjectiveConfig) -> None:
        super().__init__()
        if config.judge != "step-frozen" or not isinstance(config.transform, CropResizeConfig):
            raise ValueError(f"the plain step has a step-frozen judge and crop-resize, not {config}")
        self.model, self.config, self.crop_ratio = model, config, config.transform.ratio
        self.judge = copy.deepcopy(model.encoder).requires_grad_(False)
        # without running statistics, BatchNorm uses those of the batch
        self.judge.norm.track_running_stats = False
        self.judge.norm.running_mean = self.judge.norm.running_var = self.judge.norm.num_batches_tracked = None

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """The loss, a scalar, of a batch (B, C, H, W), uint8 or float in [0, 1]."""
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
        """The judge's output for a view, normalised with the statistics of its own batch or of the features `like`."""
        with phase("judge"):
            if like is None:
                return self.judge(view)
            dims, norm = [dim for dim in range(like.ndim) if dim != 1], self.judge.norm
            mean, variance = like.mean(dims, keepdim=True), like.var(dims, correction=0, keepdim=True)
            weight, bias = norm.weight.view_as(mean), norm.bias.view_as(mean)
            return (self.judge.features(view) - mean) / torch.sqrt(variance + norm.eps) * weight + bias

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


def crop(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    """A square box of each image, resized back to the image's size."""
    with phase("views"):
        return grid_crop(x, boxes.top, boxes.left, (side, side), (x.shape[2], x.shape[3]))


def cut(x: Tensor, boxes: Boxes, side: int) -> Tensor:
    """Each image with a square filled by the mean of each of its channels."""
    with phase("views"):
        return fill_with_mean(x, boxes.top, boxes.left, (side, side))


def grid_crop(x: Tensor, top: Tensor, left: Tensor, box: tuple[int, int], out: tuple[int, int]) -> Tensor:
    """A box of each image (B, C, H, W), resized by grid_sample with aligned corners.

    Args:
        top, left: (B,), the corner of each image's box.
        box, out: rows and columns of the boxes and of the result.
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
        config: the run's configuration; its precision does not matter.
        device: where weights and draws live.

    Attributes:
        weights: a state dict.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        # this step is never taken
        self._step = Trainer(config, device)
        self.weights: dict[str, Tensor] = self._step.model.state_dict()

    def draw(self, images: Tensor, done: int) -> Draws:
        """The draws of fastle's step for a batch, after `done` steps."""
        self._step.done = done
        return self._step.draw(images)

    def parameters(self) -> list[Tensor]:
        """The initial parameters, in the model's order."""
        return [parameter.detach() for parameter in self._step.model.parameters()]


class PlainStep:
    """Draw, loss, backward, AdamW with PyTorch's defaults, and the copy of the weights to the judge.

    Args:
        start: where the weights and the draws come from.
        precision: "bf16" is autocast; weights, latent and statistics stay fp32.
        channels_last: the memory format of the weights, which the convolutions' results take over; otherwise they are
            contiguous.
        compiled: compute the loss as one graph of torch.compile.

    Raises:
        ValueError: the configuration's judge or transformation is not the one that this step knows.
    """

    def __init__(
        self,
        start: StartingPoint,
        *,
        precision: Precision = "fp32",
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        config, self.device = start.config, start.device
        self.precision, self.done, self.draw = precision, 0, start.draw
        self.model = PlainAutoencoder(config.model)
        self.model.load_state_dict(start.weights)
        self.model.to(self.device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective = PlainObjective(self.model, config.objective)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.train.lr)
        if compiled:
            # compile the whole graph or fail: a silent fallback would be timed as if it were compiled
            self.objective.compile(fullgraph=True, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Takes one step on a batch, uint8 (B, C, size, size) on the device. Returns the loss."""
        with phase("draws"):
            draws = self.draw(images, self.done)
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with phase("loss"), autocast:
            loss = cast(Tensor, self.objective(images, draws))
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.objective.refresh_judge()
        self.done += 1
        return loss.detach()
