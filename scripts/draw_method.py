#!/usr/bin/env python
"""Saves the moving pictures of docs/method.md: a training on drawn shapes, and SIGReg on points of a plane.

python scripts/draw_method.py DIR    # writes DIR/training.webp and DIR/sigreg.webp, in two or three minutes
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastle.data import open_images
from fastle.kernels.sigreg import sigreg
from fastle.method.sigreg import draw_slices
from fastle.presets import make_config
from fastle.training.trainer import Trainer

SHOWN = 8  # test images
STEPS, BATCH = 300, 64
POINTS, MOVES, RATE = 600, 180, 0.2
FRAME, LAST = 120, 2500  # milliseconds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    for name, frames in (("training", training()), ("sigreg", points())):
        first, *others = frames
        path = directory / f"{name}.webp"
        times = [FRAME] * len(others) + [LAST]
        first.save(path, save_all=True, append_images=others, duration=times, loop=0, quality=45, method=6)
        print(f"{path}: {len(times)} frames, {path.stat().st_size / 1e3:.0f} kB")


def training() -> Iterator[Image.Image]:
    """Test images of drawn shapes, and below them their reconstructions after more and more steps."""
    config = make_config("shapes", steps=STEPS, batch_size=BATCH, hidden=24)
    trainer, images = Trainer(config, torch.device("cpu")), open_images(config.data, "train")
    shown = open_images(config.data, "test").batch(range(SHOWN))
    for step in range(STEPS + 1):
        if step <= 20 or step % (2 if step < 60 else 10) == 0:
            yield strip(trainer, shown, step)
        start = BATCH * (step % (len(images) // BATCH))
        trainer(images.batch(range(start, start + BATCH)))


def strip(trainer: Trainer, shown: Tensor, step: int) -> Image.Image:
    """One frame of the training."""
    trainer.model.eval()
    with torch.no_grad():
        made = trainer.model(shown)
    psnr = -10 * (made - shown / 255).square().flatten(1).mean(1).log10()
    figure = Figure(figsize=(8, 2.3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.01, 0.92, f"step {step}: {float(psnr.mean()):.1f} dB, no reconstruction loss", fontsize=11)
    for row, batch in enumerate((shown / 255, made)):
        for column, image in enumerate(batch):
            axes = figure.add_axes((0.005 + column * 0.125, 0.46 - 0.45 * row, 0.115, 0.42))
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.axis("off")
    return picture_of(canvas)


def points() -> Iterator[Image.Image]:
    """Points in two clusters and a ring, which follow the gradient of SIGReg to a standard normal distribution."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(POINTS // 3, generator=generator)
    ring = 2.6 * torch.stack((angle.cos(), angle.sin()), 1)
    noise = 0.12 * torch.randn(POINTS, 2, generator=generator)
    ends = torch.tensor([[-1.2, 0.4], [1.2, -0.4]]).repeat_interleave(POINTS // 3, 0)
    z = (torch.cat((ring, ends)) + noise).requires_grad_()
    for move in range(MOVES + 1):
        loss = sigreg(z, draw_slices(2, 64, generator))
        if move % 4 == 0:
            yield scatter(z.detach(), float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - RATE * gradient).detach().requires_grad_()


def scatter(z: Tensor, loss: float) -> Image.Image:
    """One frame of the points, with the marginal distributions beside the normal one."""
    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    plane, across, up = figure.subplots(1, 3)
    plane.scatter(*z.T, s=4, alpha=0.6)
    for radius in (1, 2):
        circle = radius * np.exp(1j * np.linspace(0, 2 * np.pi, 100))
        plane.plot(circle.real, circle.imag, color="black", linewidth=0.6)
    plane.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal", title=f"SIGReg {loss:.2f}")
    at = np.linspace(-3.5, 3.5, 100)
    for axes, values, title in ((across, z[:, 0], "first coordinate"), (up, z[:, 1], "second coordinate")):
        axes.hist(values.numpy(), bins=28, range=(-3.5, 3.5), density=True)
        axes.plot(at, np.exp(-(at**2) / 2) / math.sqrt(2 * math.pi), color="black", linewidth=1)
        axes.set(ylim=(0, 0.8), title=title, yticks=[])
    return picture_of(canvas)


def picture_of(canvas: FigureCanvasAgg) -> Image.Image:
    """A figure as an image."""
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


if __name__ == "__main__":
    main()
