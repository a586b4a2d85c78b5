"""The exact savings of the autoencoder, against the author's plain form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastle.config import ModelConfig
from fastle.method.model import Autoencoder, Decoder, UpBlock
from fastle.training.plain_step import PlainDecoder, PlainUp
from tests.method.test_model import image_batch, preset, tiny


def plain_form(config: ModelConfig) -> Autoencoder:
    """An autoencoder whose decoder is the plain form, with seed 0's weights."""
    torch.manual_seed(0)
    model = Autoencoder(config)
    torch.manual_seed(1)
    model.decoder = PlainDecoder(config)  # type: ignore[assignment]
    return model


def backward_of(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The value, and the gradients of x and of every parameter for one random gradient of the value."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    out.backward(torch.randn(out.shape, generator=Generator().manual_seed(3), dtype=out.dtype))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()} | {"x": x.grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {"value": out.detach()} | {f"d {name}": g.clone() for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7)], ids=str)
def test_up_block_equals_its_plain_form(height: int, width: int) -> None:
    torch.manual_seed(0)
    plain, block = PlainUp(4, 3).double(), UpBlock(4, 3).double()
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    torch.testing.assert_close(backward_of(block, x), backward_of(plain, x), rtol=1e-11, atol=1e-12)


# maps of 1 and 3 pixels
@pytest.mark.parametrize(("size", "memory_format"), [(8, torch.contiguous_format), (24, torch.channels_last)], ids=str)
@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_autoencoder_equals_its_plain_form(latent: int | None, size: int, memory_format: torch.memory_format) -> None:
    config = tiny(size=size, latent=latent)
    plain = plain_form(config).double()
    model = Autoencoder(config).double()
    model.load_state_dict(plain.state_dict())
    model, plain = (m.to(memory_format=memory_format) for m in (model, plain))
    images = image_batch(config, 4).to(memory_format=memory_format)
    got, wanted = backward_of(model, images), backward_of(plain, images)
    assert len(wanted) == 2 + len(list(model.parameters()))
    # BatchNorm over a few values amplifies rounding
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_weights_stay_in_the_plain_form(latent: int | None) -> None:
    config = tiny(latent=latent)
    torch.manual_seed(7)
    decoder = Decoder(config)
    torch.manual_seed(7)
    plain = PlainDecoder(config)
    # names, order, shapes, and the initial values of a seed
    assert list(decoder.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
    assert [name for name, _ in decoder.named_parameters()] == list(plain.state_dict())
    # a checkpoint goes both ways
    trained = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    decoder.load_state_dict(trained)
    plain.load_state_dict(decoder.state_dict())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("latent", [None, 512], ids=["spatial", "pooled"])
def test_operations_of_the_celeba_decoder(latent: int | None) -> None:
    # 2 operations for each tap, counted by hand: a convolution on the small map costs 4 taps an output pixel, not 9
    config = preset("celeba", latent)
    h, c, side = config.hidden, config.map_channels, config.sides[0] // 4

    def flops(decoder: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            decoder(torch.empty(1, *config.latent_shape))
        return counter.get_total_flops()

    linear = 0 if latent is None else latent * math.prod(config.map_shape)

    def expected(taps: int, skip: float, head: int) -> float:
        blocks = [(side, c, 2 * h), (2 * side, 2 * h, h)]
        maps = sum(n**2 * o * (taps * i + 9 * o + skip * i) for n, i, o in blocks)
        return 2 * (linear + maps + taps * h * head)

    with torch.device("meta"):
        plain, decoder = PlainDecoder(config), Decoder(config)
        assert flops(plain) == expected(9, 1, (4 * side) ** 2 * config.channels)
        # the four pixels of three colours, filled up to sixteen, and one square more on each axis
        assert flops(decoder) == expected(4, 1 / 4, (2 * side + 1) ** 2 * 16)
