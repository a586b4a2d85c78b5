"""The test protocol: PSNR and SSIM of a model's reconstructions over a whole split, in evaluation mode.

PSNR is 10·log10(1 / mse) of each image in [0, 1], averaged over the images. `psnr_of_mean_mse` is the PSNR of the
split's mean squared error, and is never higher. SSIM is torchmetrics' (Gaussian window of 11, σ 1.5).

Contrast is the RMS contrast of the reconstructions (the mean over images of the standard deviation of luma), divided by
that of the images: 1 if no contrast is lost. Sharpness is the same ratio for the mean magnitude of luma's Sobel
gradient: below 1 edges are blurred or lost, above 1 there are edges that the images do not have. The spectral peak is
such a ratio for the mean power of all channels at one frequency, the greatest of all but the frequency 0: far above 1
there is a pattern, such as stripes, that the images do not have.

Colour images also have a PSNR of luma and one of chroma (Cb and Cr together), in full-range BT.601 YCbCr:

    Y  =  0.299    R + 0.587    G + 0.114    B
    Cb = -0.168736 R - 0.331264 G + 0.5      B + 0.5     that is 0.5 + (B - Y) / 1.772
    Cr =  0.5      R - 0.418688 G - 0.081312 B + 0.5               0.5 + (R - Y) / 1.402
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from fastle.data import Images
from fastle.method.model import Autoencoder, unit_range
from fastle.method.transforms import Boxes, cut_hole, draw_boxes, hole_mask, hole_side, sobel_magnitude, to_grey

from .perceptual import Perceptual
from .report import GRID_ROWS
from .spectrum import Spectrum

HOLE_SEED = 0
BATCH = 250
# keeps the PSNR of an exact reconstruction finite; the 100 dB it gives are far above the 59 dB of 8-bit rounding
MIN_MSE = 1e-10
MIN_CONTRAST = 1e-6  # avoids a division by zero for images without contrast or edges

Metrics = dict[str, float]


@torch.no_grad()
def evaluate(
    model: Autoencoder,
    images: Images,
    *,
    hole_ratio: float | None,
    device: torch.device,
    perceptual: bool = False,
    progress: Callable[[int], None] = lambda seen: None,
) -> dict[str, Metrics]:
    """Measures the quality of a model's reconstructions of a split.

    Args:
        model: The model, on `device`. It is evaluated with its running statistics.
        images: The split.
        hole_ratio: The hole's share of the image in the masked setting, or None. The hole of image i is the same for
            every model.
        device: The device of the model.
        perceptual: Whether LPIPS and FID are measured too.
        progress: Called after each batch with the number of images seen so far.

    Returns:
        "clean" holds psnr, psnr_of_mean_mse, ssim, contrast, sharpness and spectral_peak of the reconstructed images;
        for colour images, also psnr_luma and psnr_chroma. With a hole, "masked" holds the same of images reconstructed
        from input with a hole, compared with the whole image, and psnr and ssim inside and outside of the hole. Where
        they were asked for, each also holds lpips and, of several images, fid.

    Raises:
        TooSmall, NoWeights, MissingExtra: `perceptual` asks for what cannot be had, see `Perceptual`.
    """
    model.eval()
    holes = None if hole_ratio is None else fixed_holes(len(images), model.config.sides, hole_ratio)
    settings = ("clean",) if hole_ratio is None else ("clean", "masked")
    per_image: dict[str, list[dict[str, Tensor]]] = {setting: [] for setting in settings}
    spectra = {setting: Spectrum() for setting in settings}
    judges = {setting: Perceptual(min(model.config.sides), device) for setting in settings} if perceptual else {}
    seen = 0
    for batch in _batches(images, range(len(images)), device):
        x = unit_range(batch)
        outputs = {"clean": model(x)}
        per_image["clean"].append(_quality(outputs["clean"], x))
        if holes is not None and hole_ratio is not None:
            span = slice(seen, seen + len(x))
            boxes = Boxes(holes.top[span].to(device), holes.left[span].to(device))
            inside = hole_mask(x.shape, boxes, hole_ratio)
            outputs["masked"] = model(cut_hole(x, boxes, hole_ratio))
            per_image["masked"].append(_quality(outputs["masked"], x, inside))
        for setting, spectrum in spectra.items():
            spectrum.update(outputs[setting], x)
        for setting, judge in judges.items():
            judge.update(outputs[setting], x)
        seen += len(x)
        progress(seen)
    further = {setting: judge.figures() for setting, judge in judges.items()}
    return {
        setting: _means(batches) | {"spectral_peak": spectra[setting].peak()} | further.get(setting, {})
        for setting, batches in per_image.items()
    }


def fixed_holes(count: int, sides: tuple[int, int], hole_ratio: float) -> Boxes:
    """The holes of the first `count` images of a split, on the CPU. The hole of image i does not depend on `count`.

    Args:
        count: Of the images.
        sides: (height, width) of the images, pixels.
        hole_ratio: The hole's share of an image.
    """
    # drawn image by image, so that a longer split does not change the earlier holes
    generator = Generator().manual_seed(HOLE_SEED)
    shape = (1, 1, *sides)
    boxes = [draw_boxes(shape, hole_side(hole_ratio, shape), generator) for _ in range(count)]
    return Boxes(torch.cat([box.top for box in boxes]), torch.cat([box.left for box in boxes]))


@torch.no_grad()
def validation_psnr(model: Autoencoder, images: Images, *, limit: int, device: torch.device) -> float:
    """The mean PSNR in dB, without a hole, of at most `limit` evenly spaced images of a split."""
    model.eval()
    per_batch = []
    for batch in _batches(images, evenly_spaced(len(images), limit), device):
        x = unit_range(batch)
        per_batch.append(_psnr((model(x) - x).square().mean((1, 2, 3))))
    return float(torch.cat(per_batch).mean())


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most `limit` evenly spaced indices below `count`. Neighbours in a folder would often be alike."""
    chosen = min(limit, count)
    return [i * count // chosen for i in range(chosen)]


@torch.no_grad()
def reconstruction_rows(model: Autoencoder, x: Tensor, hole_ratio: float | None) -> list[tuple[str, Tensor]]:
    """The named rows of a grid: images and reconstructions and, in the masked setting, the same with fixed holes.

    Args:
        model: The model, on the device of the images.
        x: (B, C, H, W), uint8 or in [0, 1].
        hole_ratio: The hole's share of the image in the masked setting, or None.
    """
    model.eval()
    x = unit_range(x)
    images = [x, model(x)]
    if hole_ratio is not None:
        holes = fixed_holes(len(x), model.config.sides, hole_ratio)
        holed = cut_hole(x, Boxes(holes.top.to(x.device), holes.left.to(x.device)), hole_ratio)
        images += [holed, model(holed)]
    return list(zip(GRID_ROWS, images, strict=False))


def _batches(images: Images, indices: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(indices), BATCH):
        yield images.batch(indices[start : start + BATCH]).to(device)


def _quality(xhat: Tensor, x: Tensor, inside: Tensor | None = None) -> dict[str, Tensor]:
    """The metrics of each image, (B,) each.

    Args:
        xhat, x: Reconstructions and images, (B, C, H, W).
        inside: The mask of the hole, (B, 1, H, W), if there is one.
    """
    # importing it takes seconds
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    difference = xhat - x
    error = difference.square()
    _, similarity = ssim(xhat, x, data_range=1.0, reduction="none", return_full_image=True)
    mse = error.mean((1, 2, 3))
    greys = [to_grey(images) for images in (xhat, x)]
    deviation, true_deviation = (grey.std((1, 2, 3), correction=0) for grey in greys)
    gradient, true_gradient = (sobel_magnitude(grey).mean((1, 2, 3)) for grey in greys)
    metrics = {
        "mse": mse,
        "psnr": _psnr(mse),
        "ssim": similarity.mean((1, 2, 3)),
        "contrast": deviation,
        "true_contrast": true_deviation,
        "sharpness": gradient,
        "true_sharpness": true_gradient,
    }
    if x.shape[1] == 3:
        luma, chroma = _luma_and_chroma(difference)
        metrics["psnr_luma"] = _psnr(luma.square().mean((1, 2, 3)))
        metrics["psnr_chroma"] = _psnr(chroma.square().mean((1, 2, 3)))
    if inside is not None:
        for name, mask in (("inside", inside), ("outside", ~inside)):
            weight = mask.expand_as(x).to(x.dtype)
            weight = weight / weight.sum((1, 2, 3), keepdim=True)
            metrics[f"psnr_{name}"] = _psnr((error * weight).sum((1, 2, 3)))
            metrics[f"ssim_{name}"] = (similarity * weight).sum((1, 2, 3))
    return metrics


def _luma_and_chroma(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Converts a difference of RGB images, (B, 3, H, W), to one in Y, (B, 1, H, W), and in (Cb, Cr), (B, 2, H, W)."""
    luma = to_grey(difference)
    return luma, torch.cat(((difference[:, 2:] - luma) / 1.772, (difference[:, :1] - luma) / 1.402), dim=1)


def _means(batches: list[dict[str, Tensor]]) -> Metrics:
    # on the CPU, since Apple's GPUs have no fp64
    means = {name: float(torch.cat([batch[name] for batch in batches]).cpu().double().mean()) for name in batches[0]}
    mean_mse = torch.tensor(means.pop("mse"))
    for name in ("contrast", "sharpness"):
        means[name] /= max(means.pop(f"true_{name}"), MIN_CONTRAST)
    return {"psnr": means.pop("psnr"), "psnr_of_mean_mse": float(_psnr(mean_mse)), **means}


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MIN_MSE).log10()
