"""The autoencoder: shapes, parameter counts and its BatchNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fastle.config import ConfigError, DatasetName, ModelConfig
from fastle.method.model import Autoencoder
from fastle.presets import make_config
from tests import oracle


def preset(dataset: DatasetName, latent: int | None) -> ModelConfig:
    return make_config(dataset, latent=latent).model


def tiny(size: int = 16, channels: int = 3, latent: int | None = None) -> ModelConfig:
    return ModelConfig(size=size, channels=channels, hidden=3, map_channels=4, latent=latent)


def image_batch(config: ModelConfig, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (batch, config.channels, *config.sides)
    return torch.rand(shape, generator=Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def settled(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Autoencoder:
    """A model with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = Autoencoder(config).to(dtype).train()
    for _ in range(2):
        model(image_batch(config, 4, dtype))
    return model


@pytest.mark.parametrize(
    ("config", "parameters", "shape", "compression"),
    [
        pytest.param(preset("celeba", None), 2_126_083, (32, 16, 16), 6, id="celeba-spatial"),
        pytest.param(preset("celeba", 128), 11_153_155, (128,), 384, id="celeba-masked-128"),
        pytest.param(preset("celeba", 512), 36_320_131, (512,), 96, id="celeba-masked-512"),
        pytest.param(preset("cifar10", None), 580_291, (32, 4, 4), 6, id="cifar10-spatial"),
        pytest.param(preset("shapes", None), 144_929, (16, 4, 4), 4, id="shapes-spatial"),
    ],
)
def test_presets(config: ModelConfig, parameters: int, shape: tuple[int, ...], compression: float) -> None:
    with torch.device("meta"):
        model = Autoencoder(config)
    assert model.parameter_count() == config.parameter_count == parameters
    assert config.latent_shape == shape
    assert config.compression == compression


@pytest.mark.parametrize("size", [8, 24, 136])
@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_sizes_divisible_by_eight_work(size: int, latent: int | None) -> None:
    config = ModelConfig(size=size, channels=1, hidden=1, map_channels=2, latent=latent)
    model = Autoencoder(config)
    images = image_batch(config, 2, torch.float32)
    z = model.encode(images)
    assert z.shape == (2, *config.latent_shape)
    assert config.latent_shape == ((2, size // 8, size // 8) if latent is None else (5,))
    assert model.decode(z).shape == images.shape


@pytest.mark.parametrize("size", [-8, 0, 4, 28])
def test_other_sizes_are_refused_in_one_line(size: int) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(size=size)
    message = str(error.value)
    assert "size" in message and str(size) in message and "\n" not in message


@pytest.mark.parametrize("field", ["channels", "hidden", "map_channels", "latent"])
def test_nothing_is_zero_wide(field: str) -> None:
    values: dict[str, Any] = {"size": 16, "channels": 3, "hidden": 3, "map_channels": 4, "latent": 5, field: 0}
    with pytest.raises(ConfigError):
        ModelConfig(**values)


def test_map_channels_must_divide_the_unshuffled_skip() -> None:
    with pytest.raises(ConfigError, match="--map-channels 5 must divide 8 times --hidden"):
        ModelConfig(size=16, channels=3, hidden=3, map_channels=5, latent=None)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_any_number_of_channels(channels: int, latent: int | None) -> None:
    config = tiny(channels=channels, latent=latent)
    model = settled(config)
    images = image_batch(config, 3)
    reconstructions = model(images).detach()
    assert reconstructions.shape == images.shape
    assert float(reconstructions.min()) > 0 and float(reconstructions.max()) < 1


def test_a_spatial_model_takes_images_of_other_sizes() -> None:
    """Far from the border a reconstruction depends on the pixels around it alone, whatever the size of the image."""
    model = settled(tiny(latent=None)).eval()
    images = torch.rand(1, 3, 96, 160, generator=Generator().manual_seed(2), dtype=torch.float64)
    z = model.encode(images)
    assert z.shape == (1, model.config.map_channels, 12, 20)
    reconstructions = model.decode(z)
    assert reconstructions.shape == images.shape
    part = model(images[:, :, 8:, 16:152])
    torch.testing.assert_close(part[:, :, 40:48, 64:72], reconstructions[:, :, 48:56, 80:88])


WRONG = [(2, 3, 16, 12), (2, 3, 0, 16), (2, 1, 16, 16), (3, 16, 16)]


@pytest.mark.parametrize("shape", WRONG, ids=lambda shape: "x".join(map(str, shape)))
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = Autoencoder(tiny())
    for call in (model.encode, lambda x: model.encoder.features([x])[0][-1], model):
        with pytest.raises(ValueError, match="images must be"):
            call(torch.rand(shape))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\)"):
        Autoencoder(tiny(latent=5)).encode(torch.rand(2, 3, 24, 24))


@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_latents_of_another_shape_are_refused(latent: int | None) -> None:
    model = Autoencoder(tiny(latent=latent))
    for shape in ((2, 4), (2, 5, 2, 2), (4, 2, 2), (2, 4, 0, 2), *([] if latent is None else [(2, 4, 2, 2)])):
        with pytest.raises(ValueError, match="latents must be"):
            model.decode(torch.rand(shape))


@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_evaluation_uses_the_running_statistics(latent: int | None) -> None:
    config = tiny(latent=latent)
    model = settled(config).eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    images = image_batch(config, 5)
    state = {name: t.detach() for name, t in model.state_dict().items()}
    z = model.encode(images)
    torch.testing.assert_close(z, oracle.encode_eval(state, images), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(images), oracle.decode(state, z), rtol=1e-10, atol=1e-12)
    for i in range(5):
        torch.testing.assert_close(model.encode(images[i : i + 1])[0], z[i], rtol=1e-11, atol=1e-12)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_judge_uses_a_batch_and_leaves_no_trace(latent: int | None, training: bool) -> None:
    config = tiny(latent=latent)
    model = settled(config).train(training)
    before = {name: b.clone() for name, b in model.named_buffers()}
    images = image_batch(config, 5)
    state = {name: t.detach() for name, t in model.state_dict().items()}
    others = image_batch(config, 5).square()
    (mine,), (theirs,) = model.encoder.features([images, others])
    judged, judged_like = model.encoder.normalize(mine), model.encoder.normalize(mine, statistics_of=theirs)
    torch.testing.assert_close(judged, oracle.judge(state, images), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(judged_like, oracle.judge(state, images, others), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(judged, judged_like, atol=0.1)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    # training itself does leave one
    model.train().encode(images)
    assert all(not torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_pixel_unshuffle_skip_averages_neighbouring_channels() -> None:
    # with zero convolutions the block is its skip
    block = Autoencoder(ModelConfig(size=8, channels=1, hidden=1, map_channels=2, latent=None)).encoder.down[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    x = torch.tensor([[[[1.0, 2.0], [30.0, 40.0]]]])
    expected = torch.nn.functional.silu(torch.tensor([[[[1.5]], [[35.0]]]]))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_bf16_autocast_keeps_code_and_reconstruction_in_fp32(latent: int | None) -> None:
    config = tiny(latent=latent)
    model = settled(config, torch.float32)
    images = image_batch(config, 4, torch.float32)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.encode(images)
        reconstructions = model.decode(z)
        ((features,),) = model.encoder.features([images])
        assert features.dtype == model.encoder.normalize(features, statistics_of=features).dtype == torch.float32
    assert z.dtype == reconstructions.dtype == torch.float32
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if n.startswith("running"))
    torch.testing.assert_close(reconstructions, exact, rtol=0, atol=0.02)


def test_uint8_images() -> None:
    config = tiny()
    model = settled(config, torch.float32).eval()
    raw = torch.arange(2 * 3 * 16 * 16).remainder(256).to(torch.uint8).view(2, 3, 16, 16)
    deep = (raw.int() * 257).to(torch.uint16)
    for call in (model.encode, lambda x: model.encoder.features([x])[0][-1], model):
        assert torch.equal(call(raw), call(raw.float() / 255)) and torch.equal(call(raw), call(deep))


@pytest.mark.parametrize("latent", [None, 5], ids=["spatial", "pooled"])
def test_the_decoder_keeps_channels_last(latent: int | None) -> None:
    config = tiny(latent=latent)
    decoder = settled(config, torch.float32).decoder.to(memory_format=torch.channels_last)
    maps: list[Tensor] = []
    for block in decoder.up:
        block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    z = torch.randn((3, *config.latent_shape))
    images = decoder(z if z.ndim == 2 else z.to(memory_format=torch.channels_last))
    assert len(maps) == 2 and all(t.is_contiguous(memory_format=torch.channels_last) for t in [*maps, images])
