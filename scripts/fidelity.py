"""Whether a classifier of photographs sees the same in reconstructions as in the images.

    python scripts/fidelity.py --data cifar10-jpeg --classifier FILE RUN... [--json FILE]

--data holds train/ and test/, each with one folder of photographs for each class. The classifier is a small residual
network. It is trained on the training photographs, which takes a quarter of an hour on a CPU, and kept in the file of
--classifier; if that exists, it is read. For the newest checkpoint of each run, over all test photographs:

    agreement   the share of reconstructions that get the class that their image gets
    accuracy    the share of reconstructions that get the right class
    fréchet     the distance |μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½) between normal distributions fitted to the classifier's
                features of the images and of the reconstructions (the formula of the FID, with another network)

The first line is that of the images themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

# this checkout comes first, so that the results name the commit of what they measure
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.figures import make_parser, parse, write_report
from fastle.checkpoint import read_run_config
from fastle.commands.cli import one_line_errors
from fastle.commands.outputs import check_output
from fastle.config import ConfigError, DataConfig
from fastle.data import open_images
from fastle.data.order import batch_indices
from fastle.folders import Split, split_paths
from fastle.lengths import steps_per_epoch
from fastle.method.model import Autoencoder, unit_range

EPOCHS, BATCH, RATE, WEIGHT_DECAY = 12, 128, 0.01, 0.05
WIDTHS = (32, 64, 128)
FEATURES = WIDTHS[-1]
SHIFT = 3  # pixels by which training images are moved
SEED = 0


@dataclass(frozen=True, slots=True)
class Photographs:
    """Photographs (N, C, H, W), uint8, and the numbers of their classes (N,)."""

    images: Tensor
    labels: Tensor


class Residual(nn.Module):
    """(B, C, H, W) → the same, x + f(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(channels, channels), *_conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Classifier(nn.Module):
    """(B, C, H, W) in [0, 1] → (B, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *WIDTHS), WIDTHS, strict=False):
            layers += [*_conv(before, width), nn.MaxPool2d(2), Residual(width)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 128) that the last layer classifies."""
        pooled: Tensor = self.body(2 * x - 1).mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x))
        return scores


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.SiLU()]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("fidelity.py"):
        parser = make_parser("fidelity.py", str(__doc__))
        parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="train/ and test/, with classes")
        parser.add_argument(
            "--classifier", metavar="FILE", type=Path, required=True, help="written, or read if it exists"
        )
        flags = parse(parser, argv)
        configs = [read_run_config(run).data for run in flags.runs]
        if len({(config.size, config.channels) for config in configs}) > 1:
            raise ConfigError("the runs have images of several sizes or channels: measure them apart")
        data = replace(configs[0], dataset="folder", root=str(flags.data.absolute()))
        classes = class_names(data)
        tested = labelled(data, "test", classes)
        rows = measure(load_classifier(flags.classifier, data, classes), flags.runs, tested)
        print(f"{'run':<32}{'agreement':>10}{'accuracy':>10}{'fréchet':>10}")
        for row in rows:
            print(f"{row['run']:<32}{row['agreement']:>10.4f}{row['accuracy']:>10.4f}{row['frechet']:>10.4f}")
        write_report(flags, "fidelity.py", argv, rows)


def class_names(data: DataConfig) -> list[str]:
    """The names of the folders of the training photographs.

    Raises:
        ConfigError: There are fewer than two.
    """
    names = sorted({path.parent.name for path in split_paths(Path(str(data.root)), "train")})
    if len(names) < 2:
        raise ConfigError(f"--data {data.root}: train/ has photographs of one class; give it a folder for each of them")
    return names


def labelled(data: DataConfig, split: Split, classes: list[str]) -> Photographs:
    """The photographs of a split, with their classes.

    Raises:
        ConfigError: A photograph lies in a folder that the training photographs do not have.
    """
    images = open_images(data, split)
    names = [path.parent.name for path in split_paths(Path(str(data.root)), split)]
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ConfigError(f"--data {data.root}: no training photograph is in a folder {unknown[0]!r}, as in {split}")
    pixels = torch.cat([images.batch(list(part)) for part in _parts(len(images))])
    return Photographs(pixels, torch.tensor([classes.index(name) for name in names]))


def load_classifier(path: Path, data: DataConfig, classes: list[str]) -> Classifier:
    """The classifier of a file, which is trained and written if there is none.

    Raises:
        ConfigError: The file holds something else, or cannot be written.
    """
    model = Classifier(data.channels, len(classes))
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                known = json.loads((file.metadata() or {})["classes"])
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
            raise ConfigError(f"--classifier {path} holds no such classifier: give another file") from None
        if known != classes:
            raise ConfigError(f"--classifier {path} knows other classes than {data.root}: give another file")
    else:
        check_output(path, flag="--classifier")
        train_classifier(model, labelled(data, "train", classes), print)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata={"classes": json.dumps(classes)})
    return model.eval()


def train_classifier(model: Classifier, data: Photographs, say: Callable[[str], None]) -> None:
    """Trains by AdamW with a rate that rises and falls, on mirrored and shifted images."""
    generator = Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
    count = steps_per_epoch(len(data.images), min(BATCH, len(data.images)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * count)
    model.to(memory_format=torch.channels_last).train()
    for step in range(EPOCHS * count):
        chosen = batch_indices(
            len(data.images), step=step, batch_size=min(BATCH, len(data.images)), seed=SEED, rank=0, world_size=1
        )
        loss = F.cross_entropy(model(augmented(data.images[chosen], generator)), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % count == 0:
            say(f"classifier: epoch {(step + 1) // count} of {EPOCHS}, loss {loss.item():.3f}")


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Images (B, C, H, W), uint8, in [0, 1]; half of them mirrored, all shifted by the same few pixels."""
    x = unit_range(images)
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    padded = F.pad(x, (SHIFT,) * 4, mode="reflect")
    height, width = x.shape[2:]
    return padded[:, :, SHIFT + down : SHIFT + down + height, SHIFT + right : SHIFT + right + width]


@torch.no_grad()
def measure(classifier: Classifier, runs: list[Path], data: Photographs) -> list[dict[str, Any]]:
    """The figures of the images themselves, then those of each run."""
    features, classes = describe(classifier, data.images, lambda x: x)
    models = {str(run): Autoencoder.from_pretrained(run, "cpu") for run in runs}
    rows = [_row("the images", features, classes, features, classes, data.labels)]
    for name, model in models.items():
        rows.append(_row(name, features, classes, *describe(classifier, data.images, model.eval()), data.labels))
    return rows


def describe(classifier: Classifier, images: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The features (N, 128), float64, and classes (N,) of images after a change, in [0, 1] before and after."""
    parts = [classifier.features(change(unit_range(images[list(part)]))) for part in _parts(len(images))]
    features = torch.cat(parts)
    return features.double(), classifier.head(features).argmax(1)


def _row(
    name: str, wanted: Tensor, wanted_classes: Tensor, features: Tensor, classes: Tensor, labels: Tensor
) -> dict[str, Any]:
    return {
        "run": name,
        "agreement": float((classes == wanted_classes).double().mean()),
        "accuracy": float((classes == labels).double().mean()),
        "frechet": frechet_distance(wanted, features),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between the normal distributions of two sets of features, (N, D) and (M, D), float64."""
    means, covariances = (a.mean(0), b.mean(0)), (a.T.cov(), b.T.cov())
    # the square root's trace is the sum of the roots of the product's eigenvalues, which are real and not negative
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    squares = (means[0] - means[1]).square().sum()
    return max(float(squares + covariances[0].trace() + covariances[1].trace() - 2 * roots), 0.0)


def _parts(count: int) -> list[range]:
    return [range(start, min(start + 500, count)) for start in range(0, count, 500)]


if __name__ == "__main__":
    main()
