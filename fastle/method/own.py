"""An encoder and a decoder of the caller's own, as an autoencoder that the method can train.

An encoder is any module that maps images (B, C, H, W) in [0, 1] to its features, from shallow to deep: a tensor, or
several in a tuple or a list, as timm's `features_only=True` gives them. The last is the code, (B, D) or (B, c, h, w).
What the method adds to a code (the BatchNorm, own and target statistics) is fastle's, so that an encoder need not know
of it. A decoder is any module that maps latents, shaped as the codes, to images in [0, 1]. `fastle.method.contract`
checks all this before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastle.config import JudgeDepth, ModelConfig

from .judge import FrozenJudge, network_features
from .model import Autoencoder, Decoder, Encoder
from .transforms import Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnParts:
    """What the caller of `fastle.fit` made, on the device of the run; None for what the configuration describes."""

    model: Autoencoder | None = None
    judge: FrozenJudge | None = None
    transform: Transform | None = None


class OwnEncoder(Encoder):
    """A network of the caller's own in place of an encoder's layers before the BatchNorm."""

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        # without the layers of the class above
        nn.Module.__init__(self)
        self.config, self.network = config, network
        self.norm = nn.BatchNorm1d(config.latent_shape[0])

    def _trunk(self, batches: Sequence[Tensor], depth: JudgeDepth) -> list[Tensor]:
        for images in batches:
            if images.ndim != 4 or images.shape[1] != self.config.channels:
                raise ValueError(f"images must be (B, {self.config.channels}, H, W), not {tuple(images.shape)}")
        *shallow, code = network_features(self.network, batches)
        return [*(shallow if depth != "code" else ()), code.to(self.norm.weight.dtype)]


class OwnDecoder(Decoder):
    """A network of the caller's own in place of a decoder's layers."""

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.network = config, network

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.network(z)
        # under autocast the network may give bf16
        return images.to(z.dtype)


class OwnAutoencoder(Autoencoder):
    """An encoder and a decoder of the caller's own, around the modules that were given.

    Args:
        encoder: Maps images to features.
        decoder: Maps latents to images in [0, 1].
        config: With an `own` that describes both.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.encoder, self.decoder = OwnEncoder(encoder, config), OwnDecoder(decoder, config)


def frozen(network: nn.Module) -> FrozenJudge:
    """A judge of one's own: a fixed network, such as a pretrained one, in place of the encoder.

    The network maps images (B, C, H, W) in [0, 1] to features, from shallow to deep: a tensor (B, D) or (B, c, h, w),
    or several in a tuple or a list. It must itself bring the images to the mean, the variance and the size that it was
    trained with. The loss is the mean over the features of their mean squared errors, after each channel of a feature
    is normalised by the mean and variance of the batch that `judge_statistics` names.

    Example:
        >>> fit(data=images, judge=frozen(Features()), steps=2000)

    Args:
        network: Is put into evaluation mode, and none of its parameters will need a gradient.
    """
    return FrozenJudge(network)
