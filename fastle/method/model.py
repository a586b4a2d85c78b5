"""The autoencoder of docs/method.md, section 4: convolutions, SiLU, and one BatchNorm, on the latent.

encoder  stem    conv 4x4 /2, C→h · SiLU
         down    h→2h, 2h→c: conv 3x3 /2 · SiLU · conv 3x3, plus pixel-unshuffle with channels averaged · SiLU
         latent  the (c, H/8, W/8) map, or Linear to `latent`; BatchNorm over the latent's channels
decoder  latent  (pooled: Linear back to the map · SiLU)
         up      c→2h, 2h→h: nearest x2 · conv 3x3 · SiLU · conv 3x3, plus nearest x2 · conv 1x1 · SiLU
         head    nearest x2 · conv 3x3, h→C · sigmoid

Two savings change the order of the computation but neither its result nor its weights: a 3x3 convolution that follows
nearest x2 is computed on the small map (see upsample.py), and a 1x1 convolution comes before its nearest x2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.config import ConfigError, JudgeDepth, ModelConfig, OwnNetworks

from .conv import Conv2d, HalvingConv2d, shortcut
from .upsample import UpsampledConv2d, nearest_x2

STRIDE = 8  # pixels of an image for one of the encoder's map, in each direction
Features = tuple[Tensor, ...]  # of one batch, from shallow to deep


class DownBlock(nn.Module):
    """(B, C_in, H, W) → (B, C_out, H/2, W/2)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.reduce = Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.mix = Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """`skip` is the shortcut of x, where it is known already."""
        if skip is None:
            skip = shortcut(x, self.mix.out_channels)
        # the convolution first: a sum is laid out as its first operand, and pixel-unshuffle is never channels-last
        return F.silu(self.mix(F.silu(self.reduce(x))) + skip)


class UpBlock(nn.Module):
    """(B, C_in, H, W) → (B, C_out, 2H, 2W)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.expand = UpsampledConv2d(channels_in, channels_out)
        self.mix = Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # a 1x1 convolution reads one pixel, so running it on the small map gives the same for a quarter of the cost.
        # both biases are added there too: their gradient is then a sum over a quarter of the pixels
        skip = self.skip.convolve(x, self.skip.bias + self.mix.bias)
        return F.silu(self.mix.convolve(F.silu(self.expand(x)), None) + nearest_x2(skip))


class Encoder(nn.Module):
    """Maps images to latents. As the judge, it maps images to the features that the loss compares."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, map_channels = config.hidden, config.map_channels
        self.stem = HalvingConv2d(config.channels, hidden)
        self.down = nn.Sequential(DownBlock(hidden, 2 * hidden), DownBlock(2 * hidden, map_channels))
        self.pool = None if config.latent is None else nn.Linear(math.prod(config.map_shape), config.latent)
        self.norm = nn.BatchNorm1d(config.latent_shape[0])

    def forward(self, images: Tensor) -> Tensor:
        """The latent z = E(x).

        In training mode BatchNorm uses the statistics of the batch and updates the running ones. In evaluation mode it
        uses the running ones.

        Args:
            images: (B, C, H, W) of the configuration's size, uint8, uint16 or floats in [0, 1]. With a spatial latent
                H and W may be any multiples of 8, since every layer is a convolution.

        Returns:
            (B, latent), or (B, c, H/8, W/8) for a spatial latent, in the dtype of the weights.

        Raises:
            ValueError: The images have another shape.
        """
        (latent,) = self.encode_batches((images,))
        return latent

    def encode_batches(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The latents of several batches of one shape, computed in one pass.

        BatchNorm treats the batches separately and in order, as if `forward` were called on each of them in turn.

        Args:
            batches: Images as in `forward`, all of one shape.

        Returns:
            One tensor of latents for each batch, shaped as in `forward`.

        Raises:
            ValueError: The images have another shape than the model's.
        """
        return [self.latent(code) for (code,) in self.features(batches)]

    def features(self, batches: Sequence[Tensor], depth: JudgeDepth = "code") -> list[Features]:
        """What a judge compares of several batches, computed in one pass.

        Args:
            batches: Images as in `forward`, all of one shape.
            depth: "code" gives the input of the BatchNorm alone; "features" puts the outputs of the down blocks before
                it, and "all" the output of the stem before these. The last block's output is not repeated where it is
                the code.

        Returns:
            For each batch its features from shallow to deep, (B, C, h, w) each. The last, the code, is shaped like the
            latent.

        Raises:
            ValueError: The images have another shape than the model's.
        """
        # no layer before the BatchNorm mixes samples, so one pass over all batches changes nothing
        features = self._trunk(batches, depth)
        if len(batches) == 1:
            return [tuple(features)]
        return list(zip(*(feature.chunk(len(batches)) for feature in features), strict=True))

    def latent(self, code: Tensor) -> Tensor:
        """The latent of a code, the last of `features`; its arguments and effects are those of the BatchNorm."""
        z: Tensor = self.norm(_flat(code))
        return z.view_as(code)

    def normalize(self, code: Tensor, statistics_of: Tensor | None = None) -> Tensor:
        """The code of a batch as a judge compares it: normalised, scaled and shifted as by the BatchNorm.

        The running statistics stay as they are: views are off-distribution and would spoil them.

        Args:
            code: Of one batch, the last of `features`.
            statistics_of: A code of the same shape, whose mean and variance normalise; None for the batch's own.

        Returns:
            A tensor of the same shape.
        """
        norm = self.norm
        # flat, as BatchNorm1d gets it in `latent`: both round alike
        flat = _flat(code) if statistics_of is None else code
        return normalize_channels(flat, statistics_of, norm.eps, norm.weight, norm.bias).view_as(code)

    @property
    def eps(self) -> float:
        """What is added to a variance before it normalises."""
        return self.norm.eps

    def _check(self, images: Tensor) -> None:
        channels, sides = self.config.channels, self.config.sides
        fits = images.ndim == 4 and images.shape[1] == channels
        if self.pool is not None:
            if not fits or images.shape[2:] != sides:
                raise ValueError(f"images must be (B, {channels}, {sides[0]}, {sides[1]}), not {tuple(images.shape)}")
        elif not fits or any(side % STRIDE or not side for side in images.shape[2:]):
            raise ValueError(
                f"images must be (B, {channels}, H, W), H and W divisible by {STRIDE}, not {tuple(images.shape)}"
            )

    def _trunk(self, batches: Sequence[Tensor], depth: JudgeDepth) -> list[Tensor]:
        for images in batches:
            self._check(images)
        stem, skip = self.stem([unit_range(images) for images in batches])
        middle = self.down[0](stem, skip)
        code = last = self.down[1](middle)
        if self.pool is not None:
            code = self.pool(last.flatten(1))
        blocks = [middle] if self.pool is None else [middle, last]
        shallow = {"code": [], "features": blocks, "all": [stem, *blocks]}[depth]
        # under autocast the trunk runs in bf16; the latent and its statistics keep the precision of the weights
        return [*shallow, code.to(self.norm.weight.dtype)]


class Decoder(nn.Module):
    """Maps latents to images in [0, 1]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, map_channels = config.hidden, config.map_channels
        self.unpool = None if config.latent is None else nn.Linear(config.latent, math.prod(config.map_shape))
        self.up = nn.Sequential(UpBlock(map_channels, 2 * hidden), UpBlock(2 * hidden, hidden))
        self.head = UpsampledConv2d(hidden, config.channels)

    def forward(self, z: Tensor) -> Tensor:
        """x̂ = D(z).

        Args:
            z: Latents, shaped as `Encoder.forward` returns them: (B, latent) or (B, c, h, w).

        Returns:
            (B, C, H, W) of the configuration's size, or (B, C, 8 h, 8 w) of a spatial latent, in [0, 1], fp32 (float64
            for a float64 model).

        Raises:
            ValueError: The latents have another shape.
        """
        expected = self.config.latent_shape
        spatial = self.unpool is None and z.ndim == 4 and z.shape[1] == expected[0] and min(z.shape[2:]) > 0
        if not spatial and tuple(z.shape[1:]) != expected:
            shape = f"{expected[0]}, h, w" if self.unpool is None else expected[0]
            raise ValueError(f"latents must be (B, {shape}), not {tuple(z.shape)}")
        if self.unpool is not None:
            z = F.silu(self.unpool(z)).unflatten(1, self.config.map_shape)
        # Linear and BatchNorm do not keep the memory format, and each convolution takes over that of its input
        z = z.contiguous(memory_format=torch.channels_last)
        return torch.sigmoid(self.head(self.up(z)).to(self.head.weight.dtype))


class Autoencoder(nn.Module):
    """An `Encoder` and a `Decoder` that share one configuration.

    Attributes:
        bits: Of each value of the images that it was trained on, 8 or 16.

    Raises:
        ConfigError: The configuration is that of an encoder and a decoder of the caller's own.

    Example:
        >>> model = Autoencoder.from_pretrained("runs/shapes")
        >>> z = model.encode(images)  # (B, C, H, W), uint8 or in [0, 1]
        >>> reconstructions = model.decode(z)  # in [0, 1]
    """

    bits: int = 8

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.own is not None:
            raise ConfigError(made_in_python(config.own))
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images; see `Encoder.forward`."""
        return self.encoder(images)

    def decode(self, z: Tensor) -> Tensor:
        """The images of latents; see `Decoder.forward`."""
        return self.decoder(z)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions of images as `encode` takes them, in [0, 1]."""
        return self.decoder(self.encoder(images))

    def parameter_count(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        *,
        weights: str = "model",
        model: tuple[nn.Module, nn.Module] | None = None,
    ) -> Autoencoder:
        """Loads a trained model, in evaluation mode and fp32.

        Args:
            name: A run directory, whose newest good checkpoint is loaded, with a warning if a newer one is damaged; one
                checkpoint of a run; a folder that `save_pretrained` or `fastle card` wrote; the name of a model that
                ships with fastle; or "user/model", the id of a model on the Hugging Face hub. What is on disk comes
                first.
            device: The device to put the model on.
            weights: "model", or the name of an average that the run keeps, such as "ema-050" with --averages 0.05.
            model: An encoder and a decoder like those that the run was trained with, if they were the caller's own.
                They get its weights.

        Raises:
            FastleError: Nothing has that name, or it cannot be used, or does not have the weights.
        """
        from .pretrained import load_pretrained

        return load_pretrained(name, device, weights, model)

    def save_pretrained(self, folder: str | Path, *, bf16: bool = False, card: str | None = None) -> None:
        """Saves the model for others: model.safetensors, config.json and README.md, its model card.

        `fastle card` saves a run so, with a card that says how the model was trained.

        Args:
            folder: Created if need be. A model that was saved there before is replaced.
            bf16: Whether to save the parameters in bf16, half as large.
            card: The text of README.md; by default a short one.

        Raises:
            FastleError: The folder holds such files of something else, or cannot be written to, or a weight is not
                finite.
        """
        from .pretrained import save_pretrained

        save_pretrained(self, Path(folder), bf16=bf16, card=card)

    def push_to_hub(self, repo_id: str, *, private: bool = False, bf16: bool = False, card: str | None = None) -> str:
        """Saves the model to the Hugging Face hub, where `from_pretrained` finds it. It needs the extra "hub".

        Args:
            repo_id: "user/model"; the repository is created if need be.
            private: Whether a repository that is created is private.
            bf16, card: See `save_pretrained`.

        Returns:
            The address of the model.

        Raises:
            FastleError: huggingface_hub is not installed, or the hub refuses, or cannot be reached.
        """
        from .pretrained import push_to_hub

        return push_to_hub(self, repo_id, private=private, bf16=bf16, card=card)


def made_in_python(own: OwnNetworks) -> str:
    """Says that only the caller can make an encoder and a decoder, and what to do."""
    return (
        f"the model is your own ({own.encoder}, {own.decoder}), which only Python can make: load it with "
        "fastle.Autoencoder.from_pretrained(RUN, model=(encoder, decoder))"
    )


def normalize_channels(
    code: Tensor, statistics_of: Tensor | None, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A code (B, C, ...), each channel normalised by a mean and a variance, then scaled and shifted.

    Args:
        code: Of one batch.
        statistics_of: Whose mean and variance normalise, a tensor of the same shape; None for the code itself.
        eps: Is added to the variance.
        weight, bias: (C,) each; None for neither.
    """
    if statistics_of is None:
        return F.batch_norm(code, None, None, weight, bias, training=True, eps=eps)
    dims = [d for d in range(code.ndim) if d != 1]
    variance, mean = torch.var_mean(statistics_of, dims, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    if weight is None or bias is None:
        return (code - mean) * scale
    return (code - mean) * (weight.view_as(scale) * scale) + bias.view_as(mean)


def _flat(latent: Tensor) -> Tensor:
    """Puts all positions of a (B, c, ...) tensor on one axis, as BatchNorm1d expects."""
    return latent.flatten(2) if latent.ndim == 4 else latent


def unit_range(images: Tensor) -> Tensor:
    """Scales uint8 and uint16 images to fp32 in [0, 1]; returns floating images as they are."""
    if images.dtype == torch.uint16:
        # CUDA would divide by a Python number by multiplying with its reciprocal, which rounds differently from a CPU
        return images.float() / torch.full((), 65535.0, device=images.device)
    return images.float() / 255 if images.dtype == torch.uint8 else images
