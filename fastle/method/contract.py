"""Checks of what the caller of `fastle.fit` made, on two images and before the first step: one error for each fault.

A step must be a pure function of weights, images and draws, or a run that is continued would not compute what an
uninterrupted one does. No layer before the latent's BatchNorm may mix the images of a batch, since a judge sees
views of several kinds in one pass, and none may keep statistics, which those views would spoil.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastle.config import (
    TRANSFORM_OPTIONS,
    ConfigError,
    ModelConfig,
    ObjectiveConfig,
    OwnConfig,
    OwnNetworks,
    RunConfig,
)

from .judge import FrozenJudge
from .model import Features
from .objective import Objective, make_objective
from .own import OwnAutoencoder, OwnParts
from .transforms import Transform

CHECKED = 2  # images
TOLERANCE = 1e-2  # share of the largest value: rounding changes far less, BatchNorm or dropout far more
MIXING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MODEL_SETTINGS = ("hidden", "map_channels", "latent")


def own_parts(
    config: RunConfig,
    settings: Collection[str],
    device: torch.device,
    *,
    model: tuple[nn.Module, nn.Module] | None,
    judge: FrozenJudge | None,
    transform: Transform | None,
) -> tuple[RunConfig, OwnParts]:
    """Checks the caller's parts and moves them to the device; returns them with the configuration that names them.

    Args:
        config: With fastle's own parts in their places.
        settings: The names of the settings that the caller gave; one without effect beside an own part is an error.
        device: Of the run.
        model, judge, transform: See `fastle.fit`; None for the configuration's.

    Raises:
        ConfigError: One of them cannot be used.
    """
    _check_settings(config, settings, model=model, judge=judge, transform=transform)
    objective = config.objective
    if judge is not None:
        _check_judge(judge.to(device), _images(config.model, device))
        objective = replace(objective, judge=OwnConfig(judge.name()), judge_depth="code")
    if transform is not None:
        _check_transform(transform, config.model, device)
        objective = replace(objective, transform=OwnConfig(_name(transform)))
    made = None
    if model is not None:
        made = _own_model(model, objective, config.model, device)
        config = replace(config, model=made.config)
    config = replace(config, objective=objective)
    given = {"model": model, "judge": judge, "transform": transform}
    if missing := [name for name in config.own() if given[name] is None]:
        raise ConfigError(f"the configuration names {missing[0]} of your own: give {missing[0]} too")
    if made is not None:
        _check_step(make_objective(made, objective, judge=judge, transform=transform), made)
    return config, OwnParts(model=made, judge=judge, transform=transform)


def _check_settings(config: RunConfig, settings: Collection[str], *, model: Any, judge: Any, transform: Any) -> None:
    """Raises ConfigError if something that the caller gave has no effect beside something else."""
    own = {"an encoder": model, "a judge": judge, "a transformation": transform}
    without: dict[str, Collection[str]] = {
        "an encoder": MODEL_SETTINGS, "a judge": ("judge_depth",), "a transformation": TRANSFORM_OPTIONS
    }  # fmt: skip
    for what, names in without.items():
        if own[what] is not None and (unused := [name for name in settings if name in names]):
            raise ConfigError(f"{unused[0]} has no effect with {what} of your own: leave it out")
    if config.objective.name == "pixel" and (judge is not None or transform is not None):
        raise ConfigError('judge and transform have no effect with objective="pixel": leave them out')
    if config.objective.judge_depth == "all" and model is not None and judge is None:
        raise ConfigError(
            'judge_depth="all" has no effect with an encoder of your own: "features" compares all that it returns'
        )
    if judge is not None and not isinstance(judge, FrozenJudge):
        raise ConfigError(f"judge is a {type(judge).__name__}: give fastle.frozen(network)")


def _own_model(
    networks: tuple[nn.Module, nn.Module],
    objective: ObjectiveConfig,
    fastles: ModelConfig,
    device: torch.device,
) -> OwnAutoencoder:
    """An autoencoder of two modules, which are moved to the device, for the images of fastle's model."""
    given: object = networks
    if not isinstance(given, tuple) or [isinstance(network, nn.Module) for network in given] != [True, True]:
        raise ConfigError(f"model is {_described(given)}: give two torch.nn.Modules, (encoder, decoder)")
    encoder, decoder = (network.to(device).train() for network in networks)
    images, names = _images(fastles, device), (type(encoder).__name__, type(decoder).__name__)
    *shallow, code = _check_network(f"encoder {names[0]}", encoder, images)
    if not shallow and objective.judge_depth == "features" and objective.name != "pixel":
        raise ConfigError(
            f'encoder {names[0]} returns its code alone, and judge_depth="features" compares features too: return them '
            'from shallow to deep, the code last, or give judge_depth="code"'
        )
    weights = [p.numel() for network in (encoder, decoder) for p in network.parameters()]
    own = OwnNetworks(
        encoder=names[0], decoder=names[1], latent_shape=tuple(code.shape[1:]),
        parameter_count=sum(weights) + 2 * code.shape[1],
    )  # fmt: skip
    made = OwnAutoencoder(encoder, decoder, ModelConfig.of_own(own, size=fastles.size, channels=fastles.channels))
    model: OwnAutoencoder = made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check_state(model)
    z = torch.randn(code.shape, generator=Generator().manual_seed(0)).to(device)
    _check_decoder(f"decoder {names[1]}", decoder, z, images)
    return model


def _check_network(what: str, network: nn.Module, images: Tensor) -> Features:
    """The features of two images, if the network that makes them can be a judge."""
    with _buffers_kept(network) as before:
        features = _features(what, network, images)
        changed = [name for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise ConfigError(
            f"{what} changes {changed[0]} when it is called{_mixing_layer(network)}: the judge's views would spoil it; "
            "use GroupNorm, or torchvision's FrozenBatchNorm2d"
        )
    if not all(map(_close, features, _features(what, network, images))):
        raise ConfigError(f"{what} makes other features of the same images each time: leave out dropout and noise")
    others = _features(what, network, torch.stack((images[0], 1 - images[1])))
    if not all(_close(one[0], other[0]) for one, other in zip(features, others, strict=True)):
        raise ConfigError(
            f"{what} mixes the images of a batch{_mixing_layer(network)}: use GroupNorm, or torchvision's "
            "FrozenBatchNorm2d"
        )
    return features


def _check_judge(judge: FrozenJudge, images: Tensor) -> None:
    what = f"judge {type(judge.network).__name__}"
    _check_network(what, judge.network, images)
    with_gradient = images.clone().requires_grad_()
    if not all(feature.requires_grad for (feature,) in zip(*judge.features((with_gradient,)), strict=True)):
        raise ConfigError(f"{what} passes no gradient to its images: call it without no_grad and detach")


def _features(what: str, network: nn.Module, images: Tensor) -> Features:
    made = _call(what, network, images)
    features = (made,) if isinstance(made, Tensor) else made
    if not isinstance(features, (tuple, list)) or not features or not all(isinstance(f, Tensor) for f in features):
        raise ConfigError(f"{what} returns {_described(made)}: it must return a tensor, or a tuple or list of tensors")
    for index, feature in enumerate(features):
        last = index == len(features) - 1
        ndims, form = ((2, 4), "(B, D) or (B, c, h, w)") if last else (range(2, 6), "(B, c, ...)")
        if feature.ndim not in ndims or len(feature) != len(images) or not feature.is_floating_point():
            name = "the code, the last of its features," if last else f"feature {index}"
            raise ConfigError(
                f"{what}: {name} is {_described(feature)} for {len(images)} images: it must be floats {form}"
            )
        if not feature.isfinite().all():
            raise ConfigError(f"{what}: feature {index} of images in [0, 1] is not finite")
    return tuple(features)


def _check_decoder(what: str, decoder: nn.Module, z: Tensor, images: Tensor) -> None:
    with _buffers_kept(decoder):
        first, second = (_call(what, decoder, z) for _ in range(2))
    if not isinstance(first, Tensor) or first.shape != images.shape:
        raise ConfigError(f"{what} returns {_described(first)} for latents {tuple(z.shape)}, not {tuple(images.shape)}")
    if not _close(first, second):
        raise ConfigError(f"{what} makes other images of the same latents each time: leave out dropout and noise")
    low, high = (float(bound) for bound in first.aminmax())
    if not (low >= 0 and high <= 1):
        raise ConfigError(f"{what} returns values from {low:.3g} to {high:.3g}, not in [0, 1]: end it in a sigmoid")


def _check_state(model: nn.Module) -> None:
    """Raises ConfigError if a checkpoint cannot hold the state of a model."""
    seen: dict[int, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} in the state dict is {_described(value)}: a checkpoint holds tensors alone")
        if value.numel() and (other := seen.setdefault(value.data_ptr(), name)) != name:
            raise ConfigError(f"{other} and {name} share memory, which a checkpoint cannot hold: copy one of them")


def _check_transform(transform: Transform, config: ModelConfig, device: torch.device) -> None:
    what, shape = f"transform {type(transform).__name__}", (CHECKED, config.channels, *config.sides)
    for name in ("draw", "views", "full_view"):
        if not hasattr(transform, name):
            raise ConfigError(f"{what} has no {name}: a transformation has draw, views and full_view")
    images = [_images(config, device), _images(config, device).flip(0).requires_grad_()]

    def views() -> list[tuple[Tensor, ...]]:
        return transform.views(images, transform.draw(shape, Generator(device).manual_seed(0)))

    first, second = (_call(what, views) for _ in range(2))
    form = "views must return a tuple of views (B, C, h, w) for each batch"
    if not isinstance(first, (list, tuple)) or len(first) != len(images):
        raise ConfigError(f"{what}: {form}, not {_described(first)}")
    for seen in first:
        if not isinstance(seen, tuple) or not seen or len(seen) != len(first[0]):
            raise ConfigError(f"{what}: {form}, as many for each, not {_described(seen)}")
        for view in seen:
            if not isinstance(view, Tensor) or view.ndim != 4 or view.shape[:2] != shape[:2]:
                raise ConfigError(f"{what}: {form}, not {_described(view)} for batches {shape}")
    if not all(all(map(_close, one, other)) for one, other in zip(first, second, strict=True)):
        raise ConfigError(f"{what} makes other views at each call: draw all random numbers from the generator of draw")
    if not all(view.requires_grad for view in first[1]):
        raise ConfigError(f"{what}: no gradient passes from its views to the images: views must be differentiable")


def _check_step(objective: Objective, model: OwnAutoencoder) -> None:
    """Raises ConfigError if a weight gets no gradient. The model is left as it was."""
    device, config = model.encoder.norm.weight.device, model.config
    generators = [Generator(device).manual_seed(0) for _ in range(2)]
    images = _images(config, device)

    def loss() -> None:
        draws = objective.draw(images.shape, shared=generators[0], local=generators[1])
        objective.train()(images, draws).total.backward()

    with _buffers_kept(model):
        _call("a step", loss)
    lacking = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    model.zero_grad()
    if lacking:
        raise ConfigError(
            f"{lacking[0]} gets no gradient: take out what is not used (network.fc = torch.nn.Identity()), call "
            "requires_grad_(False) on what is to stay as it is, and detach nothing"
        )


def _call(what: str, function: Callable[..., Any], *arguments: Tensor) -> Any:
    """What a function of the caller's returns."""
    inputs = ", ".join(str(tuple(argument.shape)) for argument in arguments)
    try:
        with torch.set_grad_enabled(not arguments):
            return function(*arguments)
    except Exception as error:  # the caller's code may fail in any way, and the error names it with its cause
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{what} fails{f' on a batch {inputs}' if inputs else ''}: {reason}") from error


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gives a module's buffers, and puts them back where a call has changed them."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


def _images(config: ModelConfig, device: torch.device) -> Tensor:
    return torch.rand(CHECKED, config.channels, *config.sides, generator=Generator().manual_seed(0)).to(device)


def _close(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().float(), other.detach().float()
    return one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def _mixing_layer(network: nn.Module) -> str:
    """The first layer of a kind that mixes images, for a message: " (BatchNorm2d at bn1)", or "" if there is none."""
    names = [name for name, module in network.named_modules() if isinstance(module, MIXING)]
    return f" ({type(network.get_submodule(names[0])).__name__} at {names[0]})" if names else ""


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}" if not isinstance(value, (tuple, list)) else f"{len(value)} things"


def _name(transform: Any) -> str:
    """The name of a transformation: a dataclass's with its fields; the repr of another class may hold an address."""
    return repr(transform) if hasattr(transform, "__dataclass_fields__") else type(transform).__name__
