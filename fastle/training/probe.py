"""Probes: how well the classes of labelled images can be read from a frozen encoder's latents.

linear  logistic regression on latents standardised with the training images' statistics; it minimises
        |W|²/2 + C · (sum of the cross entropies), C = 0.01, as scikit-learn's does
k-NN    the vote of the 20 nearest training images by the cosine of their latents

Two lower lines stand beside the trained encoder: the same encoder with random weights, and the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastle.data.labelled import Labelled
from fastle.method.model import Autoencoder, unit_range

C = 0.01
NEIGHBOURS = 20
BATCH = 250
MOST_PIXELS = 4096  # numbers of an image, which is shrunk until it has no more
ITERATIONS = 200
RANDOM_SEED = 0


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Shares of the test images, in [0, 1], that are given their class from `features` numbers of each."""

    features: int
    linear: float
    knn: float


@torch.no_grad()
def probe(
    model: Autoencoder,
    train: Labelled,
    test: Labelled,
    *,
    device: torch.device,
    progress: Callable[[int], object] = lambda seen: None,
) -> dict[str, Accuracies]:
    """Measures what can be read from a model's latents, beside the two lower lines.

    Args:
        model: On `device`.
        train, test: Images with the same classes, at least two.
        device: The device of the model.
        progress: Called with the number of images after each batch.

    Returns:
        Accuracies of the "encoder", of a "random encoder" and of "pixels".
    """
    sides = {
        "encoder": model.eval().encode,
        "random encoder": _random_encoder(model).encode,
        "pixels": _pixels,
    }
    numbers, test_numbers = (_numbers(sides, split, device, progress) for split in (train, test))
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return {
        name: Accuracies(
            numbers[name].shape[1],
            linear_accuracy(numbers[name], train.labels, test_numbers[name], test.labels, classes),
            nearest_accuracy(numbers[name], train.labels, test_numbers[name], test.labels, classes),
        )
        for name in sides
    }


def _random_encoder(model: Autoencoder) -> Autoencoder:
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return Autoencoder(model.config).to(device).eval()


def _pixels(images: Tensor) -> Tensor:
    """Images, shrunk by a whole factor until each has at most `MOST_PIXELS` numbers."""
    factor = 1
    while images[0].numel() > MOST_PIXELS * factor**2:
        factor *= 2
    return F.avg_pool2d(images, factor) if factor > 1 else images


def _numbers(
    sides: Mapping[str, Callable[[Tensor], Tensor]],
    split: Labelled,
    device: torch.device,
    progress: Callable[[int], object],
) -> dict[str, Tensor]:
    """What each side makes of the images: (N, numbers of an image), on the CPU."""
    parts: dict[str, list[Tensor]] = {name: [] for name in sides}
    count = len(split.images)
    for start in range(0, count, BATCH):
        images = unit_range(split.images.batch(range(start, min(start + BATCH, count))).to(device))
        for name, side in sides.items():
            parts[name].append(side(images).flatten(1).float().cpu())
        progress(len(images))
    return {name: torch.cat(batches) for name, batches in parts.items()}


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """The share of the test images (M, numbers) to which logistic regression on (N, numbers) gives their class."""
    std, mean = torch.std_mean(train, 0, correction=0)
    # a number that never varies says nothing
    std = torch.where(std > 0, std, 1)
    x, y = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            # divided by the number of images, so that the tolerance means the same for any
            error = F.cross_entropy(F.linear(x, weight, bias), labels) + weight.square().sum() / (2 * C * len(x))
        error.backward()
        return error

    optimizer.step(loss)
    return float((F.linear(y, weight, bias).argmax(1) == test_labels).double().mean())


def nearest_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """The share of the test images (M, numbers) to which their neighbours among (N, numbers) vote their class."""
    train, test = F.normalize(train), F.normalize(test)
    votes = []
    for part in test.split(BATCH):
        nearest = (part @ train.T).topk(min(NEIGHBOURS, len(train))).indices
        votes.append(F.one_hot(labels[nearest], classes).sum(1).argmax(1))
    return float((torch.cat(votes) == test_labels).double().mean())
