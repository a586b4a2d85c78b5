"""Where a name leads, what a saved model holds, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastle.checkpoint import read_run_config
from fastle.config import ModelConfig
from fastle.errors import FastleError
from fastle.method import pretrained
from fastle.method.model import Autoencoder, unit_range
from fastle.presets import make_config

CONFIG = ModelConfig(size=16, channels=1, hidden=8, map_channels=8, latent=None)
FILES = {"README.md", "config.json", "model.safetensors"}


def statistics(made: Autoencoder) -> Tensor:
    return made.get_buffer("encoder.norm.running_mean")


@pytest.fixture
def model() -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(CONFIG)
    # statistics that bf16 could not hold
    statistics(made).normal_()
    return made


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Autoencoder) -> Path:
    """A folder in the place of fastle/weights, which holds the model "toy-6x"; the working directory is empty."""
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "weights")
    model.save_pretrained(tmp_path / "weights" / "toy-6x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "weights"


def refusal(name: str | Path, **more: Any) -> str:
    with pytest.raises(FastleError) as error:
        Autoencoder.from_pretrained(name, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def equal(left: Autoencoder, right: Autoencoder) -> bool:
    states = left.state_dict(), right.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


@pytest.mark.parametrize("latent", [None, 5])
def test_a_saved_model_is_the_same_model(tmp_path: Path, latent: int | None) -> None:
    saved = Autoencoder(ModelConfig(size=16, channels=3, hidden=8, map_channels=8, latent=latent)).double().float()
    saved.save_pretrained(tmp_path / "new" / "model")
    assert {path.name for path in (tmp_path / "new" / "model").iterdir()} == FILES
    loaded = Autoencoder.from_pretrained(str(tmp_path / "new" / "model"))
    assert equal(loaded, saved) and loaded.config == saved.config and not loaded.training
    assert f"latent has the shape {saved.config.latent_shape}" in (tmp_path / "new" / "model" / "README.md").read_text()
    # anybody's safetensors reads the weights
    assert (
        safetensors.torch.load_file(tmp_path / "new" / "model" / "model.safetensors").keys()
        == saved.state_dict().keys()
    )


def test_bf16_halves_the_parameters_and_loads_as_fp32(tmp_path: Path, model: Autoencoder) -> None:
    model.save_pretrained(tmp_path / "fp32")
    model.save_pretrained(tmp_path / "bf16", bf16=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Autoencoder.from_pretrained(tmp_path / "bf16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encoder.stem.weight, model.encoder.stem.weight.bfloat16().float())
    assert torch.equal(statistics(loaded), statistics(model))


def test_a_saved_model_knows_its_hole(tmp_path: Path, model: Autoencoder) -> None:
    model.save_pretrained(tmp_path)
    assert pretrained.hole_ratio_of(tmp_path) is None
    pretrained.save_pretrained(model, tmp_path, bf16=False, card=None, hole_ratio=0.35)
    assert pretrained.hole_ratio_of(tmp_path) == 0.35 and equal(Autoencoder.from_pretrained(tmp_path), model)
    for wrong in (1.5, "0.35", True):
        values = json.loads((tmp_path / "config.json").read_text()) | {"hole_ratio": wrong}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(FastleError, match=r"config\.json cannot be used \(hole_ratio is "):
            pretrained.hole_ratio_of(tmp_path)


def test_a_shipped_name_and_what_comes_before_it(shipped: Path, model: Autoencoder) -> None:
    assert equal(Autoencoder.from_pretrained("toy-6x"), model)
    other = Autoencoder(CONFIG)
    other.save_pretrained("toy-6x")
    assert equal(Autoencoder.from_pretrained("toy-6x"), other)
    # a path is a path
    shutil.rmtree("toy-6x")
    assert "missing is here" in refusal(Path("missing"))
    assert "holds no ema-050" in refusal(shipped / "toy-6x", weights="ema-050")


@pytest.mark.parametrize(("name", "hint"), [("toy-6", "did you mean toy-6x?"), ("../elsewhere/x", '"user/model"')])
def test_an_unknown_name_lists_those_that_ship(shipped: Path, name: str, hint: str) -> None:
    text = refusal(name)
    assert "(toy-6x)" in text and hint in text


def test_a_model_is_not_saved_over_something_else(tmp_path: Path, model: Autoencoder) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"format": "fastle run"}')
    with pytest.raises(FastleError, match=r"run holds config\.json of something else"):
        model.save_pretrained(run)
    assert [path.name for path in run.iterdir()] == ["config.json"]
    with pytest.raises(FastleError, match="is a file"):
        model.save_pretrained(run / "config.json")
    model.encoder.stem.weight.data[0] = float("nan")
    with pytest.raises(FastleError, match=r"encoder\.stem\.weight is not finite"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_saved_model_is_no_run(tmp_path: Path, model: Autoencoder) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(FastleError, match="a saved model without its run"):
        read_run_config(tmp_path)
    # but it may be replaced
    Autoencoder(CONFIG).save_pretrained(tmp_path)
    assert not equal(Autoencoder.from_pretrained(tmp_path), model)


def changed_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    return damage


def changed_config(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["model"] |= values
        (folder / "config.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (changed_weights(lambda tensors: tensors.pop("decoder.head.bias")), "holds no decoder.head.bias"),
        (changed_weights(lambda tensors: tensors.update(other=torch.ones(1))), "holds other, which is no weight"),
        (changed_weights(lambda tensors: tensors["decoder.head.bias"].fill_(torch.inf)), "head.bias is not finite"),
        (changed_config(hidden=16), "of shape"),
        (changed_config(latent=2**31), "holds no"),
        (changed_config(size=17), "divisible by 8"),
        (changed_config(depth=3), "unknown field depth"),
        (lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"model": {', '"bits": 12, "model": {')
        ), "bits is 12"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "truncated"),
        (lambda folder: (folder / "config.json").write_text('{"format": "fastle model"}'), "lacks model"),
    ],
)  # fmt: skip
def test_a_damaged_saved_model(tmp_path: Path, model: Autoencoder, damage: Callable[[Path], None], fault: str) -> None:
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    text = refusal(tmp_path)
    assert text.startswith(str(tmp_path)) and fault in text and "fetch the folder again" in text


class Hub:
    """A stand-in for huggingface_hub: its functions, with the names of the real ones' arguments, over a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.fault: Exception | None = None

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str] | str | None = None) -> str:
        if self.fault is not None:
            raise self.fault
        snapshot = self.root / "snapshots" / repo_id
        snapshot.mkdir(parents=True)
        for name in allow_patterns or ():
            shutil.copy(self.root / repo_id / name, snapshot)
        return str(snapshot)

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> str:
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        self.private[repo_id] = bool(private)
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, commit_message: str | None = None) -> object:
        if self.fault is not None:
            raise self.fault
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return object()


class HTTPError(Exception): ...


class HfHubHTTPError(HTTPError, OSError): ...


class HFValidationError(ValueError): ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: Path) -> Hub:
    made = Hub(tmp_path / "hub")
    module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    for name in ("snapshot_download", "create_repo", "upload_folder"):
        setattr(module, name, getattr(made, name))
    for error in (HfHubHTTPError, HFValidationError):
        setattr(errors, error.__name__, error)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return made


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, model: Autoencoder) -> None:
    assert model.push_to_hub("user/model", private=True, bf16=True) == "https://hub.example/user/model"
    assert {path.name for path in (hub.root / "user" / "model").iterdir()} == FILES
    assert 'from_pretrained("user/model")' in (hub.root / "user" / "model" / "README.md").read_text()
    assert hub.private == {"user/model": True}
    loaded = Autoencoder.from_pretrained("user/model")
    assert torch.equal(loaded.encoder.stem.weight, model.encoder.stem.weight.bfloat16().float())


@pytest.mark.parametrize("fault", [HTTPError("refused"), HfHubHTTPError("not\nfound"), HFValidationError("no id")])
def test_what_the_hub_refuses_is_one_line(hub: Hub, model: Autoencoder, fault: Exception) -> None:
    hub.fault = fault
    said = " ".join(str(fault).split())
    text = refusal("runs/mine")
    assert text == f"no folder runs/mine is here, and the Hugging Face hub does not give it ({said})"
    with pytest.raises(FastleError, match=rf"does not take user/model \({said}\)"):
        model.push_to_hub("user/model")
    with pytest.raises(FastleError, match='give "user/model"'):
        model.push_to_hub("model")


def test_without_huggingface_hub_the_extra_is_named(
    shipped: Path, model: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "fastle[hub]"' in refusal("user/model")
    with pytest.raises(FastleError, match=r'pip install "fastle\[hub\]"'):
        model.push_to_hub("user/model")


def test_the_stand_in_is_like_huggingface_hub() -> None:
    real = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    for name in ("snapshot_download", "create_repo", "upload_folder"):
        there = inspect.signature(getattr(real, name)).parameters
        for argument, parameter in list(inspect.signature(getattr(Hub, name)).parameters.items())[1:]:
            assert there[argument].kind is parameter.kind
    assert issubclass(errors.HfHubHTTPError, OSError) and issubclass(errors.HFValidationError, ValueError)


@pytest.mark.parametrize("name", pretrained.shipped_models())
def test_what_ships_can_be_loaded(name: str) -> None:
    assert {path.name for path in (pretrained.SHIPPED / name).iterdir()} == FILES
    loaded = Autoencoder.from_pretrained(name)
    assert not loaded.training
    if name.startswith("shapes"):
        data = pytest.importorskip("fastle.data", reason='drawing shapes takes the extra "train"')
        images = unit_range(data.open_images(make_config("shapes").data, "test").batch(range(8)))
    else:
        # soft waves of all colours, which no random weights reconstruct
        across = torch.linspace(0, 2, loaded.config.sides[0])
        waves = [torch.sin(3 * across[:, None] + k + across) * torch.cos(k * across) for k in range(6)]
        images = 0.5 + 0.4 * torch.stack(waves).unflatten(0, (-1, loaded.config.channels))
    bound = 0.003 if loaded.config.latent is None else 0.025
    assert (loaded(images) - images).square().mean() < bound < images.var() / 1.5
