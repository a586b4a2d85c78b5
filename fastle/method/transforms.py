"""The transformations T and the input hole (docs/method.md, section 3).

Each transformation has `draw`, which makes its random numbers from a generator, and `views`, a pure function of images
and that draw: an image and its reconstructions get the same draw. One call transforms all images of a step, in one
launch on a GPU for each crop. Most transformations make one view. Crop-resize makes one for each crop, and grey,
blurred ones of the whole image where they are asked for. The detail stack makes five, and the untransformed image is
compared as well, as it can be beside crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastle.config import (
    CropResizeConfig,
    DetailConfig,
    IdentityConfig,
    MaskConfig,
    NoiseConfig,
    OwnConfig,
    TransformConfig,
)
from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill, rectangle
from fastle.kernels.random_mask import WORD, check_tiling, mask_channels, mask_patches

PATCH = 4
# guards square roots and divisions whose argument can be exactly zero, as on the shapes' black ground
EPS = 1e-6
LOCAL_CONTRAST_EPS = 1e-4
# corners are remainders of integers below this: the probabilities of two positions differ by less than 1e-13
MANY = 2**62


@dataclass(frozen=True, slots=True)
class Boxes:
    """One box corner for each image: top and left, (B,) int64, in pixels.

    Where the side is drawn too, it is () int64, in pixels, the same for all images; otherwise it is None. It is the
    shorter one of boxes that are not square; see `box_size`.
    """

    top: Tensor
    left: Tensor
    side: Tensor | None = None


# what a transformation draws: boxes of one view or of several, seeds of masks, noise, or nothing
ViewDraw = Boxes | tuple[Boxes, ...] | Tensor | None
Shape = tuple[int, ...]  # (B, C, H, W)
Side = TypeVar("Side", int, Tensor)


class Transform(Protocol):
    """A transformation: anything that has these three; docs/own.md has an example.

    A resumed run recognises a dataclass by its fields, and any other class by its name.
    """

    @property
    def full_view(self) -> bool:
        """Whether the untransformed image is compared as well."""

    def draw(self, shape: Shape, generator: Generator) -> Any:
        """The random numbers for images of `shape`, (B, C, H, W).

        Args:
            shape: Of the images of one rank.
            generator: Of all random numbers, which are on its device. Another source, such as torch's global generator,
                would give a run that is continued other views than an uninterrupted one.

        Returns:
            What `views` takes: tensors, or tuples or dataclasses of them.
        """

    def views(self, images: Sequence[Tensor], drawn: Any) -> list[tuple[Tensor, ...]]:
        """The views of each of several batches, T x, T x̂, ...: a pure function, which gradients can pass.

        Args:
            images: Batches (B, C, H, W) of floats in [0, 1], all of one shape: images, and their reconstructions.
            drawn: From `draw`. Sample i of every batch goes through the same transformation.

        Returns:
            A tuple of views for each batch, (B, C, h, w) each, of sides that the judge takes.
        """


def make_transform(config: TransformConfig) -> Transform:
    """The transformation that a configuration describes.

    Raises:
        ValueError: Only the caller can make it.
    """
    match config:
        case OwnConfig():
            raise ValueError(f"the transformation {config} is the caller's own: give it as transform=")
        case CropResizeConfig():
            return CropResize(config.ratio, config.ratio_max, config.crops, config.full_view, config.blur_views)
        case MaskConfig(kind="channel"):
            return ChannelMask(config.ratio)
        case MaskConfig():
            return PatchMask(config.ratio, patch=PATCH if config.kind == "patch" else 1)
        case NoiseConfig():
            return Noise(config.std)
        case DetailConfig():
            return Detail()
        case IdentityConfig():
            return Identity()


@dataclass(frozen=True, slots=True)
class Identity:
    """T x = x."""

    full_view = False

    def draw(self, shape: Shape, generator: Generator) -> None:
        return None

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        return [(image,) for image in images]


@dataclass(frozen=True, slots=True)
class CropResize:
    """`crops` boxes of side int(ratio · min(H, W)), their corners uniform, each resized back to (H, W).

    Boxes have the proportions of the images (see `box_size`), so that resizing them distorts nothing.

    With a `ratio_max` each crop draws a side s of its own, the same for all images: a whole number of pixels from
    a = int(ratio · min(H, W)) to b = int(ratio_max · min(H, W)), both included, with the log-uniform probability
    P(s) = log((s + 1) / s) / log((b + 1) / a).

    The grey image follows for each of `blur_views`, in all channels, each pixel the mean of a box of that side around
    it.
    """

    ratio: float
    ratio_max: float | None = None
    crops: int = 1
    full_view: bool = False
    blur_views: tuple[int, ...] = ()

    def side(self, shape: Shape) -> int:
        """The shorter side of the box for images of `shape`, pixels; with a `ratio_max`, the smallest one."""
        return int(self.ratio * min(shape[-2:]))

    def draw(self, shape: Shape, generator: Generator) -> Boxes | tuple[Boxes, ...]:
        """The boxes of one crop, or a tuple of several crops' boxes."""
        boxes = tuple(draw_boxes(shape, self._draw_side(shape, generator), generator) for _ in range(self.crops))
        return boxes if self.crops > 1 else boxes[0]

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        crops = drawn if isinstance(drawn, tuple) else (drawn,)
        made = [self._crop(images, boxes) for boxes in crops]
        if self.blur_views:
            grey = [to_grey(image) for image in images]
            for side in self.blur_views:
                blurred = [box_blur(image, side) for image in grey]
                made.append(tuple(view.expand_as(image) for view, image in zip(blurred, images, strict=True)))
        return list(zip(*made, strict=True))

    def _draw_side(self, shape: Shape, generator: Generator) -> int | Tensor:
        least = self.side(shape)
        if self.ratio_max is None:
            return least
        most = int(self.ratio_max * min(shape[-2:]))
        # s stands for all of [s, s + 1), or the greatest side would hardly ever be drawn
        low, high = math.log(least), math.log(most + 1)
        share = torch.rand((), generator=generator, device=generator.device)
        # rounding can leave the range
        return (low + (high - low) * share).exp().long().clamp(least, most)

    def _crop(self, images: Sequence[Tensor], boxes: Boxes | Tensor | None) -> tuple[Tensor, ...]:
        assert isinstance(boxes, Boxes)
        shape = images[0].shape
        if boxes.side is None:
            return crop_resize(images, boxes.top, boxes.left, *box_size(self.side(shape), shape))
        return crop_resize(images, boxes.top, boxes.left, *box_size(boxes.side.expand(shape[0]), shape))


@dataclass(frozen=True, slots=True)
class PatchMask:
    """Exactly int(ratio · number of patches) patches set to zero in all channels; a patch of 1 is the pixel mask."""

    ratio: float
    patch: int
    full_view = False

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        """(B,) seeds of masks."""
        check_tiling(shape[-2:], self.patch)
        return _draw_seeds(shape, generator)

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        assert isinstance(drawn, Tensor)
        return [(view,) for view in mask_patches(images, drawn, ratio=self.ratio, patch=self.patch)]


@dataclass(frozen=True, slots=True)
class ChannelMask:
    """Each channel of each image set to zero with probability `ratio`, independently."""

    ratio: float
    full_view = False

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        """(B,) seeds of masks."""
        return _draw_seeds(shape, generator)

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        assert isinstance(drawn, Tensor)
        return [(view,) for view in mask_channels(images, drawn, ratio=self.ratio)]


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian noise of standard deviation `std`, the same on both sides, not clamped."""

    std: float
    full_view = False

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        """(B, C, H, W)."""
        return self.std * torch.randn(shape, generator=generator, device=generator.device)

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        assert isinstance(drawn, Tensor)
        return [(image + drawn.to(image.dtype),) for image in images]


@dataclass(frozen=True, slots=True)
class Detail:
    """The five-view detail stack, all in [0, 1]; nothing is random.

    blur:       box 11
    colour:     saturation 1.8 about the grey image, then contrast 1.4 about the mean over pixels and channels
    edges:      Sobel magnitude of the grey image over its maximum
    texture:    |x − box 5 of x| over its maximum
    contrast:   (g − box 5 of g) / sqrt(box 5 of (g − box 5 of g)² + 1e-4) for grey g, stretched to [0, 1]

    Grey is Rec. 601 luma for three channels and the mean otherwise; grey views fill all channels. Boxes average the
    pixels inside the image only; Sobel repeats the border. Maxima are taken for each image.
    """

    full_view = True

    def draw(self, shape: Shape, generator: Generator) -> None:
        return None

    def views(self, images: Sequence[Tensor], drawn: ViewDraw) -> list[tuple[Tensor, ...]]:
        return [self._stack(image) for image in images]

    def _stack(self, images: Tensor) -> tuple[Tensor, ...]:
        grey = to_grey(images)
        vivid = grey + 1.8 * (images - grey)
        mean = vivid.mean(dim=(1, 2, 3), keepdim=True)
        views = (
            box_blur(images, 11),
            mean + 1.4 * (vivid - mean),
            _over_maximum(sobel_magnitude(grey)),
            _over_maximum((images - box_blur(images, 5)).abs()),
            _stretch(local_contrast(grey)),
        )
        return tuple(view.clamp(0, 1).expand_as(images) for view in views)


def draw_boxes(shape: Shape, side: int | Tensor, generator: Generator) -> Boxes:
    """Corners of boxes of `side`, uniform over all positions inside images of `shape`.

    Args:
        shape: (B, C, H, W).
        side: The shorter one, pixels, from 1 to min(H, W). A tensor, () int64 on the generator's device, goes into the
            boxes.
        generator: Of the corners, which are on its device.
    """

    def integers(below: int) -> Tensor:
        return torch.randint(below, shape[:1], generator=generator, device=generator.device)

    if isinstance(side, Tensor):
        # `randint` takes no tensor as its bound, and reading the side would wait for the device
        free = [extent - length + 1 for extent, length in zip(shape[-2:], box_size(side, shape), strict=True)]
        top, left = (integers(MANY) % positions for positions in free)
        return Boxes(top, left, side)
    top, left = (integers(e - length + 1) for e, length in zip(shape[-2:], box_size(side, shape), strict=True))
    return Boxes(top, left)


def box_size(side: Side, shape: Shape) -> tuple[Side, Side]:
    """(height, width) of boxes with the proportions of the images, whole pixels.

    Args:
        side: The shorter one, pixels; a number, or a tensor of any shape.
        shape: (B, C, H, W).

    Returns:
        `side` for the shorter side of the images, and side · longer / shorter, rounded, for the longer one.
    """
    short, long = sorted(shape[-2:])
    if short == long:
        return side, side
    longer = (side * long + short // 2) // short
    return (side, longer) if shape[-2] == short else (longer, side)


def _draw_seeds(shape: Shape, generator: Generator) -> Tensor:
    return torch.randint(WORD, shape[:1], generator=generator, device=generator.device)


def hole_side(ratio: float, shape: Shape) -> int:
    """The shorter side of the input hole, pixels: round(√ratio · min(H, W))."""
    return round(math.sqrt(ratio) * min(shape[-2:]))


def cut_hole(images: Tensor, boxes: Boxes, ratio: float) -> Tensor:
    """y: the images with their hole filled by each image's own per-channel mean."""
    height, width = box_size(hole_side(ratio, images.shape), images.shape)
    return mask_fill(images, boxes.top, boxes.left, height, width)


def hole_mask(shape: Shape, boxes: Boxes, ratio: float) -> Tensor:
    """(B, 1, H, W) bool: True inside each image's hole."""
    height, width = box_size(hole_side(ratio, shape), shape)
    return rectangle(boxes.top, boxes.left, height, width, shape[-2:])


def to_grey(images: Tensor) -> Tensor:
    """(B, 1, H, W): Rec. 601 luma of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def box_blur(images: Tensor, size: int) -> Tensor:
    """The mean over a size x size square around each pixel, of the pixels inside the image."""
    return F.avg_pool2d(images, size, stride=1, padding=size // 2, count_include_pad=False)


def sobel_magnitude(grey: Tensor) -> Tensor:
    """(B, 1, H, W) → √(gx² + gy² + ε²) − ε, the border repeated; ε = 1e-6 gives flat regions a gradient."""
    # slices rather than F.pad, whose replicating backward is not deterministic on CUDA
    x = torch.cat((grey[..., :1], grey, grey[..., -1:]), dim=-1)
    x = torch.cat((x[..., :1, :], x, x[..., -1:, :]), dim=-2)
    smooth_rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    smooth_columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx = smooth_rows[..., 2:] - smooth_rows[..., :-2]
    gy = smooth_columns[..., 2:, :] - smooth_columns[..., :-2, :]
    return (gx.square() + gy.square() + EPS**2).sqrt() - EPS


def local_contrast(grey: Tensor) -> Tensor:
    """Deviation from the local mean over the local standard deviation (box 5)."""
    deviation = grey - box_blur(grey, 5)
    return deviation / (box_blur(deviation.square(), 5) + LOCAL_CONTRAST_EPS).sqrt()


def _over_maximum(images: Tensor) -> Tensor:
    return images / images.amax(dim=(1, 2, 3), keepdim=True).clamp_min(EPS)


def _stretch(images: Tensor) -> Tensor:
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(EPS)
