"""The test protocol: PSNR and SSIM of reconstructions in evaluation mode, over a whole split.

PSNR is 10·log10(1 / mse) of each image on [0, 1], averaged over images; `psnr_of_mean_mse` puts the split's mean
squared error in place of each image's, and is the lower of the two. SSIM is torchmetrics' (Gaussian window 11, σ 1.5).

Contrast is the RMS contrast of the reconstructions, each image's standard deviation of luma, over that of the images:
1 where none is lost.

Of colour images also the PSNR of luma and that of chroma, the two planes together, in full-range BT.601 YCbCr:

    Y  =  0.299    R + 0.587    G + 0.114    B
    Cb = -0.168736 R - 0.331264 G + 0.5      B + 0.5     that is 0.5 + (B - Y) / 1.772
    Cr =  0.5      R - 0.418688 G - 0.081312 B + 0.5               0.5 + (R - Y) / 1.402
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from fastle.data import Images
from fastle.method.model import Autoencoder, unit_range
from fastle.method.transforms import Boxes, cut_hole, draw_boxes, hole_mask, hole_side, to_grey

HOLE_SEED = 0
BATCH = 250
# an exact reconstruction would have an infinite PSNR; 100 dB is far above 8 bits' own 59
LEAST_MSE = 1e-10
LEAST_CONTRAST = 1e-6  # of images that have none

Figures = dict[str, float]


@torch.no_grad()
def evaluate(
    model: Autoencoder,
    images: Images,
    *,
    hole_ratio: float | None,
    device: torch.device,
    progress: Callable[[int], None] = lambda seen: None,
) -> dict[str, Figures]:
    """The quality of a model's reconstructions of a split.

    Args:
        model: on `device`; evaluated with its running statistics.
        images: the split.
        hole_ratio: of the masked setting, or None. The hole of image i is the same for every model.
        progress: told the number of images after each batch.

    Returns:
        "clean": psnr, psnr_of_mean_mse, ssim and contrast on the images as they are, of colour images psnr_luma and
        psnr_chroma too; with a hole also "masked": the same on images with a hole, against the whole image, and psnr
        and ssim inside and outside of the hole.
    """
    model.eval()
    holes = None if hole_ratio is None else fixed_holes(len(images), model.config.size, hole_ratio)
    kinds = ("clean",) if hole_ratio is None else ("clean", "masked")
    per_image: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in kinds}
    seen = 0
    for batch in _batches(images, range(len(images)), device):
        x = unit_range(batch)
        per_image["clean"].append(_quality(model(x), x))
        if holes is not None and hole_ratio is not None:
            span = slice(seen, seen + len(x))
            boxes = Boxes(holes.top[span].to(device), holes.left[span].to(device))
            inside = hole_mask(x.shape, boxes, hole_ratio)
            per_image["masked"].append(_quality(model(cut_hole(x, boxes, hole_ratio)), x, inside))
        seen += len(x)
        progress(seen)
    return {kind: _figures(parts) for kind, parts in per_image.items()}


def fixed_holes(count: int, size: int, hole_ratio: float) -> Boxes:
    """The holes of images 0 to count − 1 of a split, on the CPU. Those of the first do not depend on the count."""
    # one draw for each image, so that a longer split does not shift the earlier ones
    generator = Generator().manual_seed(HOLE_SEED)
    side = hole_side(hole_ratio, (1, 1, size, size))
    boxes = [draw_boxes((1, 1, size, size), side, generator) for _ in range(count)]
    return Boxes(torch.cat([box.top for box in boxes]), torch.cat([box.left for box in boxes]))


@torch.no_grad()
def validation_psnr(model: Autoencoder, images: Images, *, limit: int, device: torch.device) -> float:
    """Mean PSNR over at most `limit` images, spread evenly over the split, without a hole, dB."""
    model.eval()
    parts = []
    for batch in _batches(images, spread(len(images), limit), device):
        x = unit_range(batch)
        parts.append(_psnr((model(x) - x).square().mean((1, 2, 3))))
    return float(torch.cat(parts).mean())


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spaced: neighbours in a folder are often of one kind."""
    shown = min(limit, count)
    return [i * count // shown for i in range(shown)]


@torch.no_grad()
def reconstruction_rows(model: Autoencoder, x: Tensor, hole_ratio: float | None) -> list[tuple[str, Tensor]]:
    """What a grid shows, named: images and reconstructions, and the same with fixed holes in the masked setting.

    Args:
        model: on the images' device.
        x: (B, C, size, size), uint8 or in [0, 1].
        hole_ratio: of the masked setting, or None.
    """
    model.eval()
    x = unit_range(x)
    rows = [("input", x), ("reconstruction", model(x))]
    if hole_ratio is not None:
        holes = fixed_holes(len(x), model.config.size, hole_ratio)
        holed = cut_hole(x, Boxes(holes.top.to(x.device), holes.left.to(x.device)), hole_ratio)
        rows += [("masked input", holed), ("its reconstruction", model(holed))]
    return rows


def _batches(images: Images, indices: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(indices), BATCH):
        yield images.batch(indices[start : start + BATCH]).to(device)


def _quality(xhat: Tensor, x: Tensor, inside: Tensor | None = None) -> dict[str, Tensor]:
    """Figures of each image, (B,) each; inside and outside of a hole where (B, 1, H, W) `inside` is given."""
    difference = xhat - x
    error = difference.square()
    _, similarity = ssim(xhat, x, data_range=1.0, reduction="none", return_full_image=True)
    mse = error.mean((1, 2, 3))
    deviation, whole = (to_grey(images).std((1, 2, 3), correction=0) for images in (xhat, x))
    figures = {
        "mse": mse,
        "psnr": _psnr(mse),
        "ssim": similarity.mean((1, 2, 3)),
        "contrast": deviation,
        "whole_contrast": whole,
    }
    if x.shape[1] == 3:
        luma, chroma = _luma_and_chroma(difference)
        figures["psnr_luma"] = _psnr(luma.square().mean((1, 2, 3)))
        figures["psnr_chroma"] = _psnr(chroma.square().mean((1, 2, 3)))
    if inside is not None:
        for name, where in (("inside", inside), ("outside", ~inside)):
            weight = where.expand_as(x).to(x.dtype)
            weight = weight / weight.sum((1, 2, 3), keepdim=True)
            figures[f"psnr_{name}"] = _psnr((error * weight).sum((1, 2, 3)))
            figures[f"ssim_{name}"] = (similarity * weight).sum((1, 2, 3))
    return figures


def _luma_and_chroma(difference: Tensor) -> tuple[Tensor, Tensor]:
    """The difference of two images in Y, (B, 1, H, W), and (Cb, Cr), (B, 2, H, W), from that in RGB, (B, 3, H, W)."""
    luma = to_grey(difference)
    return luma, torch.cat(((difference[:, 2:] - luma) / 1.772, (difference[:, :1] - luma) / 1.402), dim=1)


def _figures(parts: list[dict[str, Tensor]]) -> Figures:
    means = {name: float(torch.cat([part[name] for part in parts]).double().mean()) for name in parts[0]}
    mean_mse = torch.tensor(means.pop("mse"))
    means["contrast"] /= max(means.pop("whole_contrast"), LEAST_CONTRAST)
    return {"psnr": means.pop("psnr"), "psnr_of_mean_mse": float(_psnr(mean_mse)), **means}


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(LEAST_MSE).log10()
