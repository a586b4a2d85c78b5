"""What a spatial model makes of photographs larger than those that it was trained on.

    python scripts/photographs.py IMAGE... --size 256 -o docs/photographs.jpg --json bench/results/photographs.json

The shipped model learnt on 32 px, but all its layers are convolutions. Each photograph is cut to the largest square in
its middle. The figures are those of `fastle eval`, for each photograph at 32 px, at twice that, and so up to --size.
The picture shows them at --size: the photographs above, their reconstructions below.

The committed picture is of NASA's portrait of Eileen Collins (public domain), Chelsea the cat by Stéfan van der Walt, a
cup of coffee by Rachel Michetti and a rocket by SpaceX (all CC0): astronaut.png, chelsea.png, coffee.png and rocket.jpg
in the folder skimage/data of scikit-image 0.26.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# this checkout comes first, so that the results name the commit of what they measure
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.figures import write_report
from fastle.commands.cli import Parser, one_line_errors
from fastle.commands.outputs import check_output
from fastle.config import ConfigError
from fastle.data.images import ArrayImages
from fastle.files import write_atomic
from fastle.method.model import Autoencoder
from fastle.training.evaluate import evaluate

PROGRAM = "photographs.py"
MODEL = "cifar10-6x"
SMALLEST = 32
GAP = 8  # pixels between the tiles of the picture
QUALITY = 92


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="photographs")
    parser.add_argument("--model", default=MODEL, help="as `from_pretrained` takes it (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="the largest side, 8 times some integer (default: 256)")
    parser.add_argument("-o", "--output", metavar="FILE.jpg", type=Path, help="where the picture goes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the figures go")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    flags = make_parser().parse_args(argv)
    if flags.output is not None:
        check_output(flags.output)
    if flags.json is not None:
        check_output(flags.json, flag="--json")
    if flags.size < SMALLEST or flags.size % 8:
        raise ConfigError(f"--size must be divisible by 8 and at least {SMALLEST}, not {flags.size}")
    photographs = [_read(path, flags.size) for path in flags.images]
    model = Autoencoder.from_pretrained(flags.model)
    if model.config.latent is not None or model.config.channels != 3:
        raise ConfigError(f"--model {flags.model} has a pooled latent or other channels: it takes one size only")
    rows: list[dict[str, Any]] = []
    for path, photograph in zip(flags.images, photographs, strict=True):
        side = SMALLEST
        while side <= flags.size:
            figures = evaluate(
                model, ArrayImages(_tensor(photograph, side)), hole_ratio=None, device=torch.device("cpu")
            )
            rows.append({"image": path.name, "size": side, **figures["clean"]})
            print(f"{path.name:20} {side:5} px  {rows[-1]['psnr']:.2f} dB  SSIM {rows[-1]['ssim']:.3f}")
            side = flags.size if side < flags.size < 2 * side else 2 * side
    write_report(flags, PROGRAM, argv, rows)
    if flags.output is not None:
        _save(flags.output, model, torch.cat([_tensor(photograph, flags.size) for photograph in photographs]))


def _read(path: Path, size: int) -> Image.Image:
    """The largest square in the middle of an image."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path}: {error}") from error
    side = min(image.size)
    if side < size:
        raise ConfigError(f"{path} is {image.width}×{image.height}, too small for --size {size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _tensor(image: Image.Image, side: int) -> Tensor:
    """(1, 3, side, side), uint8."""
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].contiguous()


@torch.inference_mode()
def _save(path: Path, model: Autoencoder, images: Tensor) -> None:
    reconstructions = (255 * model(images)).round().byte()
    side = images.shape[-1]
    canvas = Image.new("RGB", (len(images) * (side + GAP) - GAP, 2 * side + GAP), "white")
    for row, batch in enumerate((images, reconstructions)):
        for column, image in enumerate(batch):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            canvas.paste(tile, (column * (side + GAP), row * (side + GAP)))
    encoded = io.BytesIO()
    canvas.save(encoded, "JPEG", quality=QUALITY)
    write_atomic(path, encoded.getvalue())


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main()
