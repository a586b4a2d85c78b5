"""Whether a judge likes patterns that repeat with the grid of its own strides.

    python scripts/grid_patterns.py RUN... [--data DIR] [--json PATH]

For the newest checkpoint of each run, the judge compares 500 test images x with their reconstructions x̂, and with x̂
without its patterns of 4 pixels and of 2: the frequencies next to multiples of size / 4, on either axis. In the masked
setting x̂ is made of images with a hole. The figure is

    mse(J(T x), J(T x̂ without)) / mse(J(T x), J(T x̂))

Above 1, the judge finds the reconstruction better with the pattern; what else those frequencies hold raises it too. So
compare T: the whole image; both moved by 1 to 4 pixels, so that the strides fall elsewhere, by 4 only for the coarsest;
and crops. Judge, features and statistics are those of the run; whatever its reach, images themselves are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Generator, Tensor

# this checkout comes first, so that the results name the commit of what they measure
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.figures import make_parser, measure_runs, parse, write_report
from fastle.commands.cli import one_line_errors
from fastle.config import ObjectiveConfig
from fastle.kernels.crop_resize import crop_resize
from fastle.method.judge import compare, make_judge
from fastle.method.model import Autoencoder
from fastle.method.transforms import Boxes, cut_hole, draw_boxes
from fastle.training.evaluate import fixed_holes

IMAGES = 500
SHIFTS = (1, 2, 3, 4)  # pixels
CROPS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # sides over the image's


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("grid_patterns.py"):
        parser = make_parser("grid_patterns.py", str(__doc__))
        parser.add_argument("--data", metavar="DIR", type=Path, help="images in place of each run's test split")
        flags = parse(parser, argv)
        rows = measure_runs(
            flags, IMAGES, "view", lambda run: view_figures(run.model, run.config.objective, run.images)
        )
        print(f"{'run':<24}{'step':>7}  {'view':<12}{'with':>8}{'without':>9}{'ratio':>7}")
        for row in rows:
            figures = f"{row['with']:>8.4f}{row['without']:>9.4f}{row['without'] / row['with']:>7.3f}"
            print(f"{row['run']:<24}{row['step']:>7}  {row['view']:<12}{figures}")
        write_report(flags, "grid_patterns.py", argv, rows)


def view_figures(model: Autoencoder, objective: ObjectiveConfig, x: Tensor) -> dict[str, dict[str, float]]:
    """What the judge makes of reconstructions "with" and "without" the patterns, by the view; x (B, C, H, W)."""
    y = x
    if objective.hole_ratio is not None:
        y = cut_hole(x, fixed_holes(len(x), model.config.sides, objective.hole_ratio), objective.hole_ratio)
    xhat = model.eval()(y)
    without = without_patterns(xhat)
    judge = make_judge("step-frozen", model.encoder)

    def distances(views: list[Tensor]) -> dict[str, float]:
        target, *branches = judge.features(views, objective.judge_depth)
        made = compare(judge, [target], [[branch] for branch in branches], objective.judge_statistics)
        return {name: float(error) for name, (error,) in zip(("with", "without"), made, strict=True)}

    whole = [x, xhat, without]
    figures = {"whole": distances(whole)}
    for shift in SHIFTS:
        figures[f"moved by {shift}"] = distances([image.roll((shift, shift), (2, 3)) for image in whole])
    generator = Generator().manual_seed(0)
    for ratio in CROPS:
        side = int(ratio * min(x.shape[2:]))
        boxes: Boxes = draw_boxes(x.shape, side, generator)
        figures[f"crop {ratio}"] = distances(list(crop_resize(whole, boxes.top, boxes.left, side)))
    return figures


def without_patterns(images: Tensor) -> Tensor:
    """Images (B, C, H, W) without the frequencies within 1 of H / 4 and H / 2, or of W / 4 and W / 2."""
    spectrum = torch.fft.fft2(images)
    for axis in (-2, -1):
        size = images.shape[axis]
        distance = torch.fft.fftfreq(size).abs() * size
        pattern = ((distance - size / 4).abs() <= 1) | ((distance - size / 2).abs() <= 1)
        spectrum = spectrum.masked_fill(pattern[:, None] if axis == -2 else pattern, 0)
    return torch.fft.ifft2(spectrum).real


if __name__ == "__main__":
    main()
