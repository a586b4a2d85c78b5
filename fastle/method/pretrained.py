"""Trained models: where a name leads, and the folder in which a model is saved and shared.

A saved model is a folder of three files. model.safetensors holds the state dict, its parameters in fp32 or bf16.
config.json says "format": "fastle model", and "model" holds the fields of `ModelConfig`; "hole_ratio" is there if the
model was trained with holes, and "bits" if with images of 16. README.md is the model's card.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastle.checkpoint import (
    MODEL_FORMAT,
    NAME,
    Checkpoint,
    CheckpointError,
    check_identity,
    check_sections,
    load_checkpoint,
    newest_good_checkpoint,
    not_finite,
    read_run_config,
)
from fastle.config import ConfigError, ModelConfig, RunConfig
from fastle.files import one_line, open_regular, read_header, read_json, read_tensor, write_atomic
from fastle.hub import HUB_ID, download_folder, upload_folder
from fastle.options import check_names, from_fields, shown

from .model import Autoencoder, made_in_python
from .own import OwnAutoencoder

SHIPPED = Path(__file__).parents[1] / "weights"  # a folder for each model that ships with fastle
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
WAY_OUT = "fetch the folder again, or save the model again"


# an encoder and a decoder of the caller's own
Networks = tuple[nn.Module, nn.Module]


def load_pretrained(
    name: str | Path, device: str | torch.device, weights: str = "model", networks: Networks | None = None
) -> Autoencoder:
    """See `Autoencoder.from_pretrained`."""
    path = find_model(name)
    if path.is_file():
        return _model_of_checkpoint(path, device, weights, networks)
    if is_saved_model(path):
        if networks is not None:
            raise CheckpointError(f"{path} holds a model of fastle's: leave model out")
        if weights != "model":
            raise CheckpointError(f"{path} holds no {weights}: a saved model has one set of weights; leave it out")
        return _model_of_folder(path, device)
    model, _, remark = model_of_run(path, device, weights, networks)
    if remark:
        warnings.warn(remark, stacklevel=3)
    return model


def model_of_run(
    run: Path, device: str | torch.device, weights: str = "model", networks: Networks | None = None
) -> tuple[Autoencoder, Checkpoint, str | None]:
    """The model of a run's newest good checkpoint, that checkpoint, and a line to show if newer ones are damaged.

    Raises:
        FastleError: See `Autoencoder.from_pretrained`.
    """
    config = read_run_config(run)
    _check_networks(run, config.model, networks)
    check = partial(check_model, config, weights=weights, networks=networks)
    checkpoint, remark = newest_good_checkpoint(run, check, (weights,))
    model = _build(config.model, checkpoint.section(weights), device, networks, bits=config.data.bits)
    return model, checkpoint, remark


def check_model(
    config: RunConfig, checkpoint: Checkpoint, *, weights: str = "model", networks: Networks | None = None
) -> None:
    """Raises CheckpointError if a checkpoint does not hold these weights of a configuration. It makes no model."""
    check_identity(checkpoint, config)
    held = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(f"{weights}.")}
    check_sections(replace(checkpoint, tensors=held), {weights: _state_of(config.model, networks)})


def _check_networks(path: Path, config: ModelConfig, networks: Networks | None) -> None:
    """Raises ConfigError if networks of the caller's own are missing, or are given for a model of fastle's."""
    if config.own is not None and networks is None:
        raise ConfigError(f"{path}: {made_in_python(config.own)}")
    if config.own is None and networks is not None:
        raise ConfigError(f"{path} holds a model of fastle's: leave model out")


def find_model(name: str | Path) -> Path:
    """The run directory, the checkpoint or the saved model that a name leads to; one on the hub is fetched.

    Raises:
        FastleError: It leads nowhere.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in shipped_models():
        return SHIPPED / name
    if isinstance(name, str) and re.fullmatch(HUB_ID, name):
        return download_folder(name, (CONFIG, WEIGHTS))
    shipped = shipped_models()
    close = difflib.get_close_matches(str(name), shipped, n=1)
    raise CheckpointError(
        f"no run, checkpoint or saved model {name} is here, and no model of that name ships with fastle "
        f"({', '.join(shipped) or 'none does'})"
        + (f": did you mean {close[0]}?" if close else '; a model on the Hugging Face hub is "user/model"')
    )


def config_of(path: Path) -> RunConfig | None:
    """The configuration of the run behind a path that `find_model` returned; None for a saved model, which has none.

    Raises:
        FastleError: The run or the checkpoint cannot be read.
    """
    if path.is_file():
        _check_name(path)
        return _config_of_checkpoint(load_checkpoint(path, ()))
    return None if is_saved_model(path) else read_run_config(path)


def hole_ratio_of(path: Path) -> float | None:
    """The share of the input that a hole covered in the training of what `find_model` returned; None without holes.

    Raises:
        FastleError: The configuration cannot be read.
    """
    config = config_of(path)
    if config is not None:
        return config.objective.hole_ratio
    ratio = _saved_values(path).get("hole_ratio")
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise CheckpointError(f"{path / CONFIG} cannot be used (hole_ratio is {shown(ratio)}): {WAY_OUT}")
    return ratio


def shipped_models() -> list[str]:
    """The names of the models that ship with fastle."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def is_saved_model(folder: Path) -> bool:
    """Whether the config.json of a folder says that it holds a saved model."""
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == MODEL_FORMAT


def save_pretrained(
    model: Autoencoder, folder: Path, *, bf16: bool, card: str | None, hole_ratio: float | None = None
) -> None:
    """See `Autoencoder.save_pretrained`; also the hole's share of the input in training."""
    _check_can_be_shared(model)
    check_folder(folder)
    # by name: the parameters of an average need no gradient
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16 if bf16 and name in parameters else None).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if fault := not_finite("model", tensors):
        raise CheckpointError(f"{folder} is not written: {fault}")
    config: dict[str, Any] = {"format": MODEL_FORMAT, "model": model.config.to_dict()}
    if hole_ratio is not None:
        config["hole_ratio"] = hole_ratio
    if model.bits != 8:
        config["bits"] = model.bits
    text = plain_card(model.config, folder.resolve().name, bf16=bf16) if card is None else card
    # the configuration last: without it the folder is no model
    for name, content in (
        (WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"})),
        (CARD, text.encode()),
        (CONFIG, json.dumps(config, indent=2).encode() + b"\n"),
    ):
        write_atomic(folder / name, content, "make room or give another folder")


def push_to_hub(model: Autoencoder, repo_id: str, *, private: bool, bf16: bool, card: str | None) -> str:
    """See `Autoencoder.push_to_hub`."""
    if not re.fullmatch(HUB_ID, repo_id):
        raise CheckpointError(f'{repo_id} is no id of the Hugging Face hub: give "user/model"')
    _check_can_be_shared(model)
    text = plain_card(model.config, repo_id, bf16=bf16) if card is None else card
    with tempfile.TemporaryDirectory(prefix="fastle-") as folder:
        save_pretrained(model, Path(folder), bf16=bf16, card=text)
        return upload_folder(Path(folder), repo_id, private=private)


def _check_can_be_shared(model: Autoencoder) -> None:
    if model.config.own is not None:
        raise CheckpointError(
            "a model with an encoder of your own cannot be saved as one of fastle's, which from_pretrained makes: save "
            "model.state_dict(), and share it with your code"
        )


def check_folder(folder: Path) -> None:
    """Raises CheckpointError if a model cannot be saved to a folder, because files of something else are there."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder for the model")
    there = [name for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists()]
    if there and not is_saved_model(folder):
        raise CheckpointError(f"{folder} holds {', '.join(there)} of something else: give another folder for the model")


def plain_card(config: ModelConfig, name: str, *, bf16: bool, license_name: str | None = None) -> str:
    """The beginning of a model's card: what the model is, and how to load it.

    Args:
        config: The model.
        name: Its name, or its id on the hub.
        bf16: Whether its parameters are saved in bf16.
        license_name: The licence of the weights, as the hub names it: "apache-2.0".
    """
    count = config.parameter_count
    images = f"(B, {config.channels}, {config.sides[0]}, {config.sides[1]})"
    head = ["library_name: fastle", *([f"license: {license_name}"] if license_name else [])]
    tags = "\n".join(f"- {tag}" for tag in ("fastle", "autoencoder", "image-feature-extraction"))
    newline = "\n"
    return f"""---
{newline.join(head)}
tags:
{tags}
---

# {name}

An autoencoder of images, trained with fastle. A latent has the shape {config.latent_shape}, one number for
{config.compression:g} of the image. The model has {count:,} parameters, saved in {"bf16" if bf16 else "fp32"}.

```python
from fastle import Autoencoder

model = Autoencoder.from_pretrained("{name}")  # or the path of the folder that holds these files
z = model.encode(images)  # {images}, uint8 or floats in [0, 1]
reconstructions = model.decode(z)  # floats in [0, 1]
```
"""


def _model_of_checkpoint(
    path: Path, device: str | torch.device, weights: str, networks: Networks | None
) -> Autoencoder:
    _check_name(path)
    checkpoint = load_checkpoint(path, (weights,))
    config = _config_of_checkpoint(checkpoint)
    _check_networks(path, config.model, networks)
    check_model(config, checkpoint, weights=weights, networks=networks)
    return _build(config.model, checkpoint.section(weights), device, networks, bits=config.data.bits)


def _check_name(checkpoint: Path) -> None:
    if not re.fullmatch(NAME, checkpoint.name):
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a run, step-NUMBER.safetensors: give the folder of a model"
        )


def _config_of_checkpoint(checkpoint: Checkpoint) -> RunConfig:
    # a checkpoint of fastle 0.1 does not know its configuration
    known = checkpoint.metadata.get("config")
    return read_run_config(checkpoint.path.absolute().parents[1]) if known is None else RunConfig.from_dict(known)


def _saved_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        values: dict[str, Any] = read_json(path)
        check_names("a saved model", values, required=("format", "model"))
        check_names("model", values["model"])
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be used ({one_line(error)}): {WAY_OUT}") from None
    return values


def _model_of_folder(folder: Path, device: str | torch.device) -> Autoencoder:
    values = _saved_values(folder)
    bits = values.get("bits", 8)
    if bits not in (8, 16):
        raise CheckpointError(f"{folder / CONFIG} cannot be used (bits is {shown(bits)}): {WAY_OUT}")
    try:
        config = from_fields(ModelConfig, values["model"])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used ({one_line(error)}): {WAY_OUT}") from None
    path = folder / WEIGHTS
    try:
        tensors = _read_weights(path, _state_of(config))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used ({one_line(error)}): {WAY_OUT}") from None
    return _build(config, tensors, device, bits=bits)


def _read_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which are those wanted. Raises ValueError, with the fault alone, for other ones."""
    with open_regular(path) as file:
        entries = read_header(file).entries
        if missing := wanted.keys() - entries.keys():
            raise ValueError(f"it holds no {min(missing)}")
        if unknown := entries.keys() - wanted.keys():
            raise ValueError(f"it holds {min(unknown)}, which is no weight of the model")
        for name, entry in entries.items():
            if entry.shape != wanted[name].shape:
                raise ValueError(f"it holds {name} of shape {entry.shape}, not {tuple(wanted[name].shape)}")
            if entry.dtype.is_floating_point != wanted[name].is_floating_point():
                raise ValueError(f"it holds {name} as {entry.dtype}")
        tensors = {name: read_tensor(file, entry) for name, entry in entries.items()}
    if fault := not_finite("model", tensors):
        raise ValueError(fault)
    return tensors


def _build(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    device: str | torch.device,
    networks: Networks | None = None,
    *,
    bits: int,
) -> Autoencoder:
    model = Autoencoder(config) if networks is None else OwnAutoencoder(*networks, config)
    model.bits = bits
    model.load_state_dict(tensors)
    return model.to(device).eval()


def _state_of(config: ModelConfig, networks: Networks | None = None) -> dict[str, Tensor]:
    """The names, shapes and types of a model's state, without its memory."""
    if networks is not None:
        return OwnAutoencoder(*networks, config).state_dict()
    with torch.device("meta"):
        return Autoencoder(config).state_dict()
