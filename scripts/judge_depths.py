"""How near to pixels each stage of an encoder is, as a judge of reconstructions.

    python scripts/judge_depths.py RUN... [--data DIR] [--json PATH]

For the newest checkpoint of each run, and for each stage that a judge may compare, figures over 64 test images x and
their reconstructions x̂:

    cosine      the mean over images of the cosine between the stage's gradient to x̂ and that of the pixels' squared
                error, x̂ − x. 1 if both pull the reconstruction the same way
    flatness    (tr G)² / (n · tr G²), with G = JᵀJ for the Jacobian J of the stage's features at x, an n×n matrix for
                the n numbers of an image. 1 if the stage weighs all changes of the image alike, as the squared error
                does, and 1/n if it sees one kind of change only
    weights     the mean square change of the features for small changes of x of one size but of several kinds, over
                the mean of all kinds. Slow changes are random grids of one number for 8 pixels each way, enlarged;
                fine ones are noise less its mean over boxes of 5 pixels. Brightness is the same in all channels, and
                colour has a mean of 0 over them. The last is slow brightness in a blurred view (--blur-views 3)

The features are scaled as the judge scales them, each channel by the standard deviation of the batch. The traces are
Hutchinson's estimates, from 16 probes for each image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# this checkout comes first, so that the results name the commit of what they measure
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.figures import make_parser, measure_runs, parse, write_report
from fastle.commands.cli import one_line_errors
from fastle.method.model import Autoencoder
from fastle.method.transforms import box_blur, to_grey

IMAGES, PROBES = 64, 16
# size of a change of an image: its root mean square
SMALL = 1e-3


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("judge_depths.py"):
        parser = make_parser("judge_depths.py", str(__doc__))
        parser.add_argument("--data", metavar="DIR", type=Path, help="images in place of each run's test split")
        flags = parse(parser, argv)
        rows = measure_runs(flags, IMAGES, "stage", lambda run: stage_figures(run.model, run.images))
        print(f"{'run':<24}{'step':>7}  {'stage':<8}{'cosine':>8}{'flatness':>10}  weights")
        for row in rows:
            weights = ", ".join(f"{kind} {weight:.2f}" for kind, weight in row["weights"].items())
            print(
                f"{row['run']:<24}{row['step']:>7}  {row['stage']:<8}{row['cosine']:>8.3f}{row['flatness']:>10.3f}"
                f"  {weights}"
            )
        write_report(flags, "judge_depths.py", argv, rows)


def stage_figures(model: Autoencoder, x: Tensor) -> dict[str, dict[str, Any]]:
    """Cosine, flatness and weights of each stage by name, from shallow to deep; x (B, C, H, W) in [0, 1]."""
    with torch.no_grad():
        xhat = model(x)
        count = len(model.encoder.features((x,), "all")[0])
    names = ["stem", "block 1", "block 2", "pooled"][:count]
    generator = Generator().manual_seed(0)
    return {
        name: {
            "cosine": _cosine(model, x, xhat, stage),
            "flatness": _flatness(model, x, stage, generator),
            "weights": _weights(model, x, stage),
        }
        for stage, name in enumerate(names)
    }


def _scaled(model: Autoencoder, images: Tensor, stage: int, like: Tensor) -> Tensor:
    """One stage's features of images, each channel divided by its standard deviation in the batch `like`."""
    (features,), (target,) = model.encoder.features((images,), "all"), model.encoder.features((like,), "all")
    axes = [axis for axis in range(target[stage].ndim) if axis != 1]
    deviation = target[stage].detach().std(axes, keepdim=True, correction=0)
    return features[stage] / (deviation.square() + model.encoder.norm.eps).sqrt()


def _cosine(model: Autoencoder, x: Tensor, xhat: Tensor, stage: int) -> float:
    difference, xhat = xhat - x, xhat.detach().requires_grad_()
    error = (_scaled(model, xhat, stage, x) - _scaled(model, x, stage, x).detach()).square().mean()
    (gradient,) = torch.autograd.grad(error, xhat)
    return float(torch.cosine_similarity(gradient.flatten(1), difference.flatten(1)).mean())


def _flatness(model: Autoencoder, x: Tensor, stage: int, generator: Generator) -> float:
    x = x.detach().requires_grad_()
    features = _scaled(model, x, stage, x.detach())
    # Jᵀu is linear in u, and its own gradient to u is what J makes of a direction
    u = torch.zeros_like(features, requires_grad=True)
    (pulled,) = torch.autograd.grad(features, x, u, create_graph=True)
    trace, trace_of_square = torch.zeros(len(x)), torch.zeros(len(x))
    for _ in range(PROBES):
        direction = torch.randn(x.shape, generator=generator)
        (pushed,) = torch.autograd.grad(pulled, u, direction, retain_graph=True)
        (both,) = torch.autograd.grad(features, x, pushed, retain_graph=True)
        trace += pushed.flatten(1).square().sum(1) / PROBES
        trace_of_square += both.flatten(1).square().sum(1) / PROBES
    return float((trace.square() / trace_of_square).mean() / x[0].numel())


@torch.no_grad()
def _weights(model: Autoencoder, x: Tensor, stage: int) -> dict[str, float]:
    height, width = x.shape[2:]
    generator = Generator().manual_seed(0)
    grid = torch.randn((*x.shape[:2], -(-height // 8), -(-width // 8)), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    kinds = {}
    for pace, change in {
        "slow": F.interpolate(grid, (height, width), mode="bilinear"),
        "fine": noise - box_blur(noise, 5),
    }.items():
        kinds[f"{pace} brightness"] = brightness = change.mean(1, keepdim=True).expand_as(x)
        if x.shape[1] > 1:
            kinds[f"{pace} colour"] = change - brightness

    def seen(change: Tensor, view: Callable[[Tensor], Tensor]) -> float:
        small = SMALL * change / change.square().mean().sqrt()
        scaled = [_scaled(model, view(image), stage, view(x)) for image in (x + small, x)]
        return float((scaled[0] - scaled[1]).square().mean())

    weights = {kind: seen(change, lambda image: image) for kind, change in kinds.items()}
    mean = sum(weights.values()) / len(weights)
    weights["slow brightness, blurred"] = seen(
        kinds["slow brightness"], lambda image: box_blur(to_grey(image), 3).expand_as(image)
    )
    return {kind: weight / mean for kind, weight in weights.items()}


if __name__ == "__main__":
    main()
