"""Saves the picture docs/views.png: every transformation of two made-up images, as the judge sees them.

python scripts/draw_views.py FILE.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastle.config import CropResizeConfig, DetailConfig, MaskConfig, NoiseConfig, TransformConfig
from fastle.method.transforms import Boxes, cut_hole, draw_boxes, hole_side, make_transform

SIZE = 128
CROP, HOLE, MASKED, NOISE = 0.15, 0.35, 0.7, 0.1  # the masked CelebA preset's, and the masks' and noise's usual ones
DETAIL = ("blur", "colour", "edges", "texture", "contrast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = pictures(torch.stack((landscape(), still_life())))
    axes = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, (title, image, outlines) in zip(line, row, strict=False):
            ax.set_title(title, fontsize=9)
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
            for colour, (left, top, side) in outlines.items():
                corner = left - 0.5, top - 0.5
                ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.5))
    figure.savefig(path, dpi=110)


Picture = tuple[str, Tensor, dict[str, tuple[int, int, int]]]


def pictures(x: Tensor) -> list[list[Picture]]:
    """Two rows of pictures for each image: a title, (3, H, W), and squares to outline, colour → (left, top, side)."""
    generator = Generator().manual_seed(5)
    hole = draw_boxes(x.shape, hole_side(HOLE, x.shape), generator)
    views: dict[str, Tensor] = {}
    boxes: Boxes | None = None
    for title, config in transformations().items():
        transform = make_transform(config)
        drawn = transform.draw(x.shape, generator)
        boxes = drawn if isinstance(drawn, Boxes) else boxes
        ((*made,),) = transform.views([x], drawn)
        views |= dict(zip((title,) if len(made) == 1 else DETAIL, made, strict=True))
    assert boxes is not None
    holed = cut_hole(x, hole, HOLE)
    rows = []
    for b in range(len(x)):
        crop = {"red": (int(boxes.left[b]), int(boxes.top[b]), int(CROP * SIZE))}
        shown: list[Picture] = [("image, and box of the crop", x[b], crop), ("input with its hole", holed[b], {})]
        shown += [(title, images[b], {}) for title, images in views.items()]
        half = (len(shown) + 1) // 2
        rows += [shown[:half], shown[half:]]
    return rows


def transformations() -> dict[str, TransformConfig]:
    return {
        f"crop-resize {CROP}": CropResizeConfig(CROP),
        f"pixel-mask {MASKED}": MaskConfig("pixel", MASKED),
        f"patch-mask {MASKED}": MaskConfig("patch", MASKED),
        "channel-mask 0.5": MaskConfig("channel", 0.5),
        f"noise {NOISE}": NoiseConfig(NOISE),
        "detail": DetailConfig(),
    }


def landscape() -> Tensor:
    """Hills, a sun and a sky: (3, SIZE, SIZE) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    image = colour(0.35, 0.6, 0.95) * (1 - y) + colour(1.0, 0.85, 0.7) * y
    image = torch.where((x - 0.75) ** 2 + (y - 0.25) ** 2 < 0.01, colour(1.0, 0.95, 0.5), image)
    hills = (0.5, 5.0, (0.45, 0.5, 0.65)), (0.65, 8.0, (0.3, 0.5, 0.3)), (0.8, 13.0, (0.2, 0.35, 0.15))
    for height, wave, tint in hills:
        edge = height + 0.06 * torch.sin(wave * x + 10 * height) + 0.02 * torch.sin(3.1 * wave * x)
        grain = 1 + 0.15 * torch.sin(140 * x * height) * torch.sin(150 * y)
        image = torch.where(y > edge, colour(*tint) * grain, image)
    return image.clamp(0, 1)


def still_life() -> Tensor:
    """A checked cloth, a ball and a striped block: (3, SIZE, SIZE) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    image = colour(0.8, 0.75, 0.7) * (0.6 + 0.4 * x)
    checks = ((x * 12).floor() + (y * 12).floor()) % 2
    image = torch.where(y > 0.6, colour(0.85, 0.85, 0.9) * (0.55 + 0.45 * checks), image)
    distance = ((x - 0.35) ** 2 + (y - 0.55) ** 2).sqrt() / 0.22
    light = (1 - 0.8 * ((x - 0.28) ** 2 + (y - 0.46) ** 2).sqrt() / 0.22).clamp(0.15, 1)
    image = torch.where(distance < 1, colour(0.9, 0.2, 0.15) * light, image)
    block = (x > 0.62) & (x < 0.9) & (y > 0.3) & (y < 0.8)
    stripes = ((x * 40).floor() % 2) * 0.5 + 0.4
    return torch.where(block, colour(0.2, 0.5, 0.8) * stripes, image).clamp(0, 1)


def colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb)[:, None, None]


if __name__ == "__main__":
    main()
