"""The test protocol against metrics computed by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastle.config import ModelConfig
from fastle.data.images import ArrayImages
from fastle.method.model import Autoencoder
from fastle.method.transforms import cut_hole
from fastle.training.evaluate import evaluate, evenly_spaced, fixed_holes, reconstruction_rows, validation_psnr

CPU = torch.device("cpu")
SIZE = 16


class Shifted(nn.Module):
    """Stands in for an autoencoder: image i comes back with a constant error."""

    config = ModelConfig(size=SIZE, channels=3, hidden=8, map_channels=8, latent=None)

    def __init__(self, errors: Sequence[float]) -> None:
        super().__init__()
        self.errors = torch.tensor(errors)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.errors.view(-1, 1, 1, 1)


def pictures(count: int) -> ArrayImages:
    generator = torch.Generator().manual_seed(0)
    return ArrayImages(torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8))


def test_psnr_is_the_mean_over_images() -> None:
    figures = evaluate(Shifted([0.1, 0.01]), pictures(2), hole_ratio=None, device=CPU)  # type: ignore[arg-type]
    assert figures.keys() == {"clean"}
    assert figures["clean"]["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert figures["clean"]["psnr_of_mean_mse"] == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2), abs=1e-3)


def test_a_perfect_reconstruction_has_finite_metrics() -> None:
    figures = evaluate(Shifted([0.0, 0.0]), pictures(2), hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert figures["ssim"] == pytest.approx(1)
    assert figures["psnr"] == pytest.approx(100)


def test_ssim_is_the_published_formula() -> None:
    """Wang et al. 2004 with a Gaussian window of 11 and σ 1.5, at one pixel far from the border, in float64."""
    torch.manual_seed(0)
    x, y = torch.rand(1, 1, SIZE, SIZE, dtype=torch.float64), torch.rand(1, 1, SIZE, SIZE, dtype=torch.float64)
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, full = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", return_full_image=True)
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window[:, None] * window / (window.sum() ** 2)
    a, b = x[0, 0, 3:14, 3:14], y[0, 0, 3:14, 3:14]
    ma, mb = (window * a).sum(), (window * b).sum()
    va, vb, cov = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2, (window * a * b).sum() - ma * mb
    expected = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert float(full[0, 0, 8, 8]) == pytest.approx(float(expected), rel=1e-6)


class Repainted(nn.Module):
    """Stands in for an autoencoder of one image, (3, H, W), and returns another."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.config = ModelConfig(size=SIZE, channels=len(image), hidden=8, map_channels=8, latent=None)
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        return self.image.expand_as(x)


def test_luma_and_chroma_are_those_of_bt_601() -> None:
    """Against the whole conversion of both images, from the standard's two weights, in float64."""
    x, y = pictures(2).batch([0, 1]).double() / 255

    def ycbcr(image: Tensor) -> Tensor:
        kr, kb = 0.299, 0.114
        matrix = torch.tensor(
            [
                [kr, 1 - kr - kb, kb],
                [-kr / (2 * (1 - kb)), -(1 - kr - kb) / (2 * (1 - kb)), 0.5],
                [0.5, -(1 - kr - kb) / (2 * (1 - kr)), -kb / (2 * (1 - kr))],
            ],
            dtype=torch.float64,
        )
        return torch.einsum("oc,chw->ohw", matrix, image) + torch.tensor([0, 0.5, 0.5])[:, None, None]

    error = (ycbcr(x) - ycbcr(y)).square()
    model = Repainted(y.float())
    figures = evaluate(model, ArrayImages(pictures(1).batch([0])), hole_ratio=0.35, device=CPU)  # type: ignore[arg-type]
    for kind in ("clean", "masked"):
        assert figures[kind]["psnr_luma"] == pytest.approx(-10 * math.log10(error[0].mean()), abs=1e-4)
        assert figures[kind]["psnr_chroma"] == pytest.approx(-10 * math.log10(error[1:].mean()), abs=1e-4)


def test_a_wrong_grey_is_in_luma_alone_and_a_wrong_tint_in_chroma_alone() -> None:
    x = torch.full((3, SIZE, SIZE), 128, dtype=torch.uint8)
    tint = torch.tensor([0.114, 0.0, -0.299])[:, None, None]  # of luma 0
    for change, exact, wrong in ((torch.tensor(0.1), "psnr_chroma", "psnr_luma"), (tint, "psnr_luma", "psnr_chroma")):
        model = Repainted(x / 255 + change)
        figures = evaluate(model, ArrayImages(x[None]), hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
        assert figures[exact] > 99 and figures[wrong] < 25


def test_grey_images_have_neither_luma_nor_chroma() -> None:
    x = pictures(1).batch([0])[:, :1]
    figures = evaluate(Repainted(x[0] / 255), ArrayImages(x), hole_ratio=0.35, device=CPU)  # type: ignore[arg-type]
    assert figures["clean"].keys() == {
        "psnr", "psnr_of_mean_mse", "ssim", "contrast", "sharpness", "spectral_peak"
    }  # fmt: skip
    assert not {"psnr_luma", "psnr_chroma"} & figures["masked"].keys()


def test_sharpness_is_the_gradient_of_luma_over_the_images() -> None:
    # an edge that comes back half as high
    x = torch.full((1, 3, SIZE, SIZE), 102, dtype=torch.uint8)
    x[:, :, :, 8:] = 204
    faded = 0.4 + (x[0] / 255 - 0.4) / 2
    figures = evaluate(Repainted(faded), ArrayImages(x), hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert figures["sharpness"] == pytest.approx(0.5, rel=1e-4)
    # the same values elsewhere have the same contrast, and every other column is an edge
    stripes = torch.where(torch.arange(SIZE) % 2 == 0, 0.4, 0.8).expand(3, SIZE, SIZE)
    figures = evaluate(Repainted(stripes), ArrayImages(x), hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert figures["contrast"] == pytest.approx(1, rel=1e-4)
    # Sobel's central difference sees nothing between two stripes of one colour, but at the border, which is repeated
    assert figures["sharpness"] == pytest.approx(1, rel=1e-4)


def test_the_spectral_peak_is_the_strongest_pattern_over_the_images() -> None:
    class Striped(Shifted):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x + 0.25 * (torch.arange(SIZE) * math.tau * 5 / SIZE).cos()

    x = pictures(8).batch(range(8))
    spectrum = torch.fft.fft2(x.double() / 255)
    power = spectrum.abs().square().sum((0, 1))
    striped = 0.5 * spectrum
    striped[..., 0, [5, SIZE - 5]] += 0.25 * SIZE**2 / 2
    expected = striped[..., 0, 5].abs().square().sum() / power[0, 5]
    assert expected > 10
    peaks = {}
    for count in (8, 251):  # more than a batch
        images = ArrayImages(x[torch.arange(count) % 8])
        figures = evaluate(Striped([]), images, hole_ratio=0.35, device=CPU)  # type: ignore[arg-type]
        peaks[count] = figures["clean"]["spectral_peak"]
    assert peaks[8] == pytest.approx(float(expected), rel=1e-4)
    assert peaks[251] == pytest.approx(peaks[8], rel=0.1) and figures["masked"]["spectral_peak"] > 10


def test_the_spectral_peak_of_what_comes_back_unchanged_or_paler_is_at_most_1() -> None:
    x = pictures(2)
    same = evaluate(Shifted([0.0, 0.1]), x, hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert same["spectral_peak"] == pytest.approx(1)
    # grey images that are not square, of which the second half of the spectrum is left out
    grey = ArrayImages(pictures(2).batch([0, 1])[:, :1, :, 1:10])
    figures = evaluate(Shifted([0.0, 0.1]), grey, hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert figures["spectral_peak"] == pytest.approx(1)
    # one colour has no power, and less than rounding adds is none either
    flat = ArrayImages(torch.full((1, 3, SIZE, SIZE), 128, dtype=torch.uint8))
    faint = torch.full((3, SIZE, SIZE), 0.5)
    faint[:, ::2] += 1e-3
    figures = evaluate(Repainted(faint), flat, hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    assert figures["spectral_peak"] == pytest.approx(SIZE**2 * (1e-3 / 2) ** 2 * 255**2 * 12, rel=1e-3)


def test_contrast_is_that_of_luma_over_the_images() -> None:
    luma = [0.299, 0.587, 0.114]
    x = pictures(2)
    whole = x.batch([0, 1]).double() / 255
    paler = 0.5 + (whole[:1] - 0.5) * 0.25  # of both images the first one's, paler
    figures = evaluate(Repainted(paler[0].float()), x, hole_ratio=None, device=CPU)["clean"]  # type: ignore[arg-type]
    grey = (whole * torch.tensor(luma, dtype=torch.float64)[:, None, None]).sum(1)
    deviations = grey.flatten(1).std(1, correction=0)
    assert figures["contrast"] == pytest.approx(float(0.25 * deviations[0] / deviations.mean()), rel=1e-5)
    flat = ArrayImages(torch.full((1, 3, SIZE, SIZE), 9, dtype=torch.uint8))
    same = Repainted(flat.batch([0])[0] / 255)
    assert evaluate(same, flat, hole_ratio=None, device=CPU)["clean"]["contrast"] < 1  # type: ignore[arg-type]


class Filler(nn.Module):
    """Returns what it is given: the error is then the hole's filling, and nothing outside."""

    config = Shifted.config

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_inside_and_outside_of_the_hole() -> None:
    images = pictures(3)
    figures = evaluate(Filler(), images, hole_ratio=0.35, device=CPU)["masked"]  # type: ignore[arg-type]
    assert figures["psnr_outside"] == pytest.approx(100)
    holes, x = fixed_holes(3, (SIZE, SIZE), 0.35), images.batch(range(3)) / 255
    side = round(math.sqrt(0.35) * SIZE)
    expected = []
    for i in range(3):
        top, left = int(holes.top[i]), int(holes.left[i])
        patch = x[i, :, top : top + side, left : left + side]
        mse = (patch - x[i].mean((1, 2))[:, None, None]).square().mean()
        expected.append(-10 * math.log10(mse))
    assert figures["psnr_inside"] == pytest.approx(sum(expected) / 3, abs=1e-3)
    assert figures["ssim_inside"] < figures["ssim_outside"]


def test_holes_do_not_depend_on_the_count_and_lie_inside() -> None:
    few, many = fixed_holes(5, (32, 32), 0.35), fixed_holes(300, (32, 32), 0.35)
    assert torch.equal(few.top, many.top[:5]) and torch.equal(few.left, many.left[:5])
    assert many.top.min() == 0 and many.top.max() == 32 - 19


def test_the_batch_size_does_not_change_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Autoencoder(Shifted.config).eval()
    whole = evaluate(model, pictures(7), hole_ratio=0.35, device=CPU)
    monkeypatch.setattr("fastle.training.evaluate.BATCH", 3)
    seen: list[int] = []
    parts = evaluate(model, pictures(7), hole_ratio=0.35, device=CPU, progress=seen.append)
    assert seen == [3, 6, 7]
    for kind, figures in whole.items():
        assert parts[kind] == pytest.approx(figures, rel=1e-5)


def test_evaluation_leaves_no_trace_in_the_model() -> None:
    model = Autoencoder(Shifted.config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, pictures(3), hole_ratio=None, device=CPU)
    validation_psnr(model, pictures(3), limit=2, device=CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_validation_takes_images_from_all_over_the_split() -> None:
    assert evenly_spaced(9, 3) == [0, 3, 6] and evenly_spaced(2, 5) == [0, 1]
    assert validation_psnr(Shifted([0.1]), pictures(9), limit=1, device=CPU) == pytest.approx(20, abs=1e-3)  # type: ignore[arg-type]


def test_rows_of_a_grid() -> None:
    model, x = Autoencoder(Shifted.config), pictures(2).batch([0, 1])
    rows = dict(reconstruction_rows(model, x, 0.35))
    assert list(rows) == ["input", "reconstruction", "masked input", "its reconstruction"]
    assert torch.equal(rows["masked input"], cut_hole(x / 255, fixed_holes(2, (SIZE, SIZE), 0.35), 0.35))
    assert torch.equal(rows["its reconstruction"], model.eval()(rows["masked input"]))
    assert list(dict(reconstruction_rows(model, x, None))) == ["input", "reconstruction"]
