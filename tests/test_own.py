"""Networks and transformations of the caller's own: what they compute, what is stored of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastle.commands.main
import fastle.training.loop
from fastle import Autoencoder, FastleError, Result, SelfTeaching, evaluate, fit, frozen
from fastle.checkpoint import read_run_config
from fastle.config import IdentityConfig, ModelConfig, ObjectiveConfig
from fastle.method.contract import own_parts
from fastle.method.model import Encoder
from fastle.presets import make_config
from fastle.training.run import RunDirectory
from tests.training.runs import assert_same, weights

PIXELS = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=Generator().manual_seed(0))
TINY: dict[str, Any] = {"size": 16, "device": "cpu", "run": "run", "steps": 2, "batch_size": 4, "slices": 8}


@pytest.fixture(autouse=True)
def small_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastle.training.loop, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(RunDirectory, "save_pictures", lambda *_: None)


def train(**more: Any) -> Result:
    return fit(data=PIXELS, **(TINY | more))


class Own(nn.Module):
    """A network with a fault, or with none: `alter` changes the features of the shallow stage and of the code."""

    def __init__(self, alter: Callable[[Tensor, Tensor], Any] = lambda shallow, code: (shallow, code)) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 6, 2, stride=2)
        self.alter = alter

    def forward(self, images: Tensor) -> Any:
        shallow = F.silu(self.first(images))
        return self.alter(shallow, self.second(shallow))


def decoder(*end: nn.Module, channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(6, channels, 8, stride=8), *(end or (nn.Sigmoid(),)))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Own(), decoder()


class Trunk(nn.Module):
    """The layers of fastle's encoder, as a network of one's own."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.encoder.norm.weight = torch.ones(())  # type: ignore[assignment]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.encoder._trunk((images,), "features")


@pytest.mark.parametrize("more", [{}, {"masked": True, "latent": 4, "judge": "ema"}])
def test_fastle_s_own_networks_compute_the_same_as_one_s_own(more: dict[str, Any]) -> None:
    shape = {"hidden": 8, "map_channels": 8, **({"latent": 4} if "latent" in more else {})}
    built_in = train(**more | shape, run="built-in")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(built_in.model.config)
    more.pop("latent", None)
    own = train(**more, model=(Trunk(model.encoder), model.decoder), run="own")
    for name in ("total", "sigreg", "effective_rank", "valid_psnr"):
        left, right = ([row[name] for row in result.metrics] for result in (built_in, own))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=0)


def test_a_run_goes_on_and_is_loaded_by_whoever_has_its_networks(capsys: pytest.CaptureFixture[str]) -> None:
    constant = {"schedule": "constant", "warmup": 0.0, "averages": (0.05,)}
    whole = train(model=pair(), steps=3, **constant)
    train(model=pair(), steps=2, **constant, run="parts")
    train(model=(Own(), decoder()), steps=3, **constant, run="parts")
    assert_same(weights(Path("run")), weights(Path("parts")))
    loaded = Autoencoder.from_pretrained("parts", model=(Own(), decoder()))
    assert loaded.encode(PIXELS).shape == (20, 6, 2, 2) and not loaded.training
    torch.testing.assert_close(loaded(PIXELS), whole.model(PIXELS))
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(PIXELS).dtype == torch.float32
    average = Autoencoder.from_pretrained("parts", weights="ema-050", model=(Own(), decoder()))
    assert not torch.equal(average(PIXELS), loaded(PIXELS))
    figures = evaluate(loaded, PIXELS)["clean"]
    mse = (loaded(PIXELS) - PIXELS / 255).square().mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(float(-10 * mse.log10().mean()), abs=1e-3)
    with pytest.raises(SystemExit, match=r"run: the model is your own \(Own, Sequential\), .*from_pretrained"):
        fastle.commands.main.main(["eval", "run"])
    capsys.readouterr()
    fastle.commands.main.main(["check", "run"])
    assert "only Python can tell whether it fits what is your own" in " ".join(capsys.readouterr().out.split())
    fastle.commands.main.main(["compare", "run", "parts"])
    assert "Own" not in capsys.readouterr().out
    fastle.commands.main.main(["report", "run", "-o", "report.html"])
    assert "model: encoder</th><td>Own</td>" in Path("report.html").read_text(encoding="utf-8")
    for more, fault in (
        ({"hidden": 8}, "run holds a run with another configuration .*model.own"),
        ({"model": (Own(), nn.Sequential(decoder(), nn.Conv2d(3, 3, 1), nn.Sigmoid()))}, "another configuration"),
    ):
        with pytest.raises(FastleError, match=fault):
            train(**more)
    with pytest.raises(FastleError, match=r"holds model\.encoder\.network\.first\.bias, of which"):
        Autoencoder.from_pretrained("run", model=(nn.Sequential(), decoder()))
    with pytest.raises(FastleError, match="cannot be saved as one of fastle's"):
        loaded.save_pretrained("saved")


def test_the_checks_leave_networks_as_they_were() -> None:
    norm = nn.BatchNorm2d(3)
    networks = Own(), decoder(norm, nn.Sigmoid())
    config = make_config("folder", data="photographs", size=16)
    own_parts(config, (), torch.device("cpu"), model=networks, judge=None, transform=None)
    assert norm.num_batches_tracked == 0 and not norm.get_buffer("running_mean").any()
    assert all(weight.grad is None for network in networks for weight in network.parameters())


def parts(*networks: nn.Module) -> dict[str, Any]:
    return {"model": networks}


class Stateful(nn.Module):
    """A transformation with a source of random numbers, and views, that are its caller's choice."""

    full_view = False

    def draw(self, shape: Sequence[int], generator: Generator) -> Tensor:
        return torch.rand(shape[0])

    def views(self, images: Sequence[Tensor], drawn: Tensor) -> list[tuple[Tensor, ...]]:
        return [(image * drawn[:, None, None, None],) for image in images]


class Constant(Stateful):
    def draw(self, shape: Sequence[int], generator: Generator) -> Tensor:
        return torch.ones(shape[0])


class Unpacked(Constant):
    def views(self, images: Sequence[Tensor], drawn: Tensor) -> Any:
        return list(images)


class Detached(Constant):
    def views(self, images: Sequence[Tensor], drawn: Tensor) -> list[tuple[Tensor, ...]]:
        return [(image.detach(),) for image in images]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (parts(Own()), r"model is 1 things: give two torch.nn.Modules, \(encoder, decoder\)"),
        (parts(Own(lambda shallow, code: {"code": code}), decoder()), "encoder Own returns a dict"),
        (parts(Own(lambda shallow, code: code), decoder()), "returns its code alone, and judge_depth"),
        (parts(Own(lambda shallow, code: (shallow, code.flatten(2))), decoder()), r"is torch.float32 \(2, 6, 4\)"),
        (parts(Own(lambda shallow, code: (shallow, code[:1])), decoder()), "the code, the last of its features, is"),
        (parts(Own(lambda shallow, code: (shallow, code / 0)), decoder()), "feature 1 of images .* is not finite"),
        (parts(Own(lambda shallow, code: (shallow, F.dropout(code))), decoder()), "other features of the same images"),
        (parts(Own(lambda shallow, code: (shallow, code - code.mean(0))), decoder()), "mixes the images of a batch"),
        (parts(nn.Sequential(Own(lambda *features: features[1]), nn.BatchNorm2d(6)), decoder()),
         r"encoder Sequential changes 1.running_mean when it is called \(BatchNorm2d at 1\): .* use GroupNorm"),
        (parts(nn.Sequential(nn.Conv2d(1, 6, 8)), decoder()), r"Sequential fails on a batch \(2, 3, 16, 16\): "),
        (parts(Own(), decoder(nn.Identity())), "decoder Sequential returns values from .* end it in a sigmoid"),
        (parts(Own(), decoder(channels=1)), r"\(2, 1, 16, 16\) for latents \(2, 6, 2, 2\), not \(2, 3"),
        (parts(Own(), decoder(nn.Dropout(), nn.Sigmoid())), "other images of the same latents each time"),
        (parts(Own(), decoder()) | {"hidden": 8}, "hidden has no effect with an encoder of your own"),
        (parts(Own(), decoder()) | {"judge_depth": "all"}, 'judge_depth="all" has no effect'),
        ({"judge": Own()}, r"judge is a Own: give fastle.frozen\(network\)"),
        ({"judge": frozen(Own()), "judge_depth": "code"}, "judge_depth has no effect with a judge of your own"),
        ({"judge": frozen(Own()), "objective": "pixel", "slices": None}, 'no effect with objective="pixel"'),
        ({"judge": frozen(Own(lambda *features: features[1].detach()))}, "judge Own passes no gradient to its images"),
        ({"transform": Own()}, "transform Own has no draw"),
        ({"transform": Stateful()}, "makes other views at each call: draw all random numbers from the generator"),
        ({"transform": Unpacked()}, "transform Unpacked: views must return a tuple"),
        ({"transform": Detached()}, "no gradient passes from its views to the images"),
        ({"transform": Constant(), "crops": 2}, "crops has no effect with a transformation of your own"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(FastleError, match=fault) as error:
        train(**given)
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_weights_that_are_not_trained() -> None:
    networks = pair()
    networks[0].unused = nn.Linear(2, 2)
    with pytest.raises(FastleError, match=r"encoder.network.unused.weight gets no gradient: take out"):
        train(model=networks)
    # what the check has done is undone
    assert all(weight.grad is None for network in networks for weight in network.parameters())
    networks[0].unused.requires_grad_(False)
    networks[0].get_submodule("first").requires_grad_(False)
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    train(model=networks, steps=1, schedule="constant", warmup=0.0)
    train(model=networks, steps=2, schedule="constant", warmup=0.0)
    changed = [name for name, value in networks[0].state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["second.weight", "second.bias"]


class Features(nn.Module):
    """A pretrained network's features, of images brought to its mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1((images - 0.45) / 0.23))))
        first = net.layer1(x)
        return first, net.fc(net.avgpool(net.layer4(net.layer3(net.layer2(first)))).flatten(1))


@pytest.mark.parametrize(("statistics", "reach"), [("own", 1.0), ("target", 1.0), ("target", 0.3)])
def test_a_frozen_judge_compares_normalised_features(statistics: Any, reach: float) -> None:
    torch.manual_seed(0)
    judge = frozen(Features().double())
    config = ObjectiveConfig(transform=IdentityConfig(), judge_statistics=statistics, judge_reach=reach, slices=8)
    model = Autoencoder(ModelConfig(size=32, channels=3, hidden=4, map_channels=4, latent=None)).double()
    objective = SelfTeaching(model, config, judge=judge)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=Generator().manual_seed(0))
    # the other modules' modes are not the judge's
    objective.train()
    losses = objective(x, objective.draw(x.shape, shared=Generator(), local=Generator()))
    xhat = model(x)
    everything = (Features().double().eval()(images) for images in (x, torch.lerp(xhat, x, reach), xhat))
    errors = []
    for target, near, view in zip(*everything, strict=True):
        dims = [d for d in range(target.ndim) if d != 1]
        of = view if statistics == "own" else target
        scale, own_scale = ((t.var(dims, correction=0, keepdim=True) + 1e-5).sqrt() for t in (target, of))
        left = (near - target.mean(dims, keepdim=True)) / scale
        errors.append((left - (view - of.mean(dims, keepdim=True)) / own_scale).square().mean())
    torch.testing.assert_close(losses.agreement, torch.stack(errors).mean() / reach**2, rtol=1e-9, atol=0)
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    losses.total.backward()
    assert_same(before, judge.state_dict())
    assert model.decoder.head.weight.grad is not None


def test_a_run_knows_its_judge_again() -> None:
    train(judge=frozen(Features()), masked=True, latent=4, hidden=8, map_channels=8)
    torch.nn.init.zeros_((other := Features()).network.fc.weight)
    for judge, fault in (
        (frozen(other), r"objective.judge.own Features [0-9a-f]+ → Features"),
        (None, "objective.judge"),
    ):
        with pytest.raises(FastleError, match=fault):
            train(judge=judge, masked=True, latent=4, hidden=8, map_channels=8)
    assert Autoencoder.from_pretrained("run").config.latent == 4


@dataclass(frozen=True)
class Rolled:
    """Each image shifted by a number of pixels of its own, and whole."""

    most: int
    full_view = True

    def draw(self, shape: Sequence[int], generator: Generator) -> Tensor:
        return torch.randint(self.most, shape[:1], generator=generator, device=generator.device)

    def views(self, images: Sequence[Tensor], drawn: Tensor) -> list[tuple[Tensor, ...]]:
        index = (torch.arange(images[0].shape[-1], device=drawn.device) + drawn[:, None]) % images[0].shape[-1]
        return [(image.gather(3, index[:, None, None].expand_as(image)),) for image in images]


def test_a_transformation_of_one_s_own() -> None:
    shape = {"hidden": 8, "map_channels": 8}
    whole = train(transform=Rolled(5), **shape)
    row = whole.metrics[-1]
    assert row["full_view"] > 0
    losses = SelfTeaching(whole.model, ObjectiveConfig(transform=IdentityConfig(), slices=8), transform=Rolled(5))
    draws = losses.draw(PIXELS.shape, shared=Generator(), local=Generator())
    (rolled,), _ = Rolled(5).views([PIXELS, PIXELS], draws.view)
    assert torch.equal(rolled[3], PIXELS[3].roll(-int(draws.view[3]), 2)) and len(set(draws.view.tolist())) > 1
    with pytest.raises(FastleError, match=r"transform.own Rolled\(most=5\) → Rolled\(most=6\)"):
        train(transform=Rolled(6), **shape)
    with pytest.raises(FastleError, match="the configuration names transform of your own: give transform too"):
        fit(read_run_config(Path("run")), data=PIXELS, run="run", device="cpu")
    assert train(transform=Rolled(5), **shape).metrics == whole.metrics
