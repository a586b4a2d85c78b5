"""What the bench of views compares: ours, and what people run today.

    fastle                  the operator, impl="auto"
    grid_sample             coordinates made of the boxes in each call, in fp32; a call for each view
    roi_align               torchvision's, of boxes that put its samples where aligned corners are; a call for each view
    kornia                  its crop_and_resize, where it is installed; a call for each view
    eager                   for holes and pixels: the tensor operations that one would write
    … compiled              the same under torch.compile, static shapes

Peers that would compute in bf16, or know no bf16, get such images cast to fp32, and their results are cast back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from fastle.kernels.crop_resize import crop_resize
from fastle.kernels.mask_fill import mask_fill
from fastle.kernels.random_mask import mask_patches

Images: TypeAlias = tuple[Tensor, ...]
Size: TypeAlias = tuple[int, int]  # rows, columns
# from images and corners
Views: TypeAlias = Callable[[Images, Tensor, Tensor], Images]

# what a side needs besides torch and torchvision
PACKAGES = {"kornia": "kornia", "kornia compiled": "kornia"}


def make_sides(operator: str, amount: Size | float, out: Size) -> dict[str, Views]:
    """What makes the views of a shape, by each side's name, ours first."""
    if isinstance(amount, float):
        eager: Views = partial(eager_pixels, ratio=amount)
        return {"fastle": partial(our_pixels, ratio=amount), "eager": eager, "compiled": compiled(eager)}
    if operator == "hole":
        eager = partial(eager_holes, hole=amount)
        return {"fastle": partial(our_holes, hole=amount), "eager": eager, "compiled": compiled(eager)}
    # here, since an import is nothing that torch.compile should meet
    kornia = importlib.import_module("kornia.geometry.transform") if find_spec("kornia") else None
    peers: dict[str, Callable[..., Images]] = {
        "grid_sample": grid_crops,
        "roi_align": roi_crops,
        "kornia": partial(kornia_crops, kornia=kornia),
    }
    sides: dict[str, Views] = {"fastle": partial(our_crops, box=amount, out=out)}
    for name, peer in peers.items():
        crops: Views = partial(peer, box=amount, out=out)
        sides |= {name: crops, f"{name} compiled": compiled(crops)}
    return sides


def compiled(views: Views) -> Views:
    # with the whole graph or an error: a silent fallback would be timed as if it were compiled
    return torch.compile(views, dynamic=False, fullgraph=True)


def our_crops(images: Images, top: Tensor, left: Tensor, *, box: Size, out: Size) -> Images:
    return _tuple(crop_resize(_argument(images), top, left, *box, out_size=out))


def our_holes(images: Images, top: Tensor, left: Tensor, *, hole: Size) -> Images:
    return _tuple(mask_fill(_argument(images), top, left, *hole))


def our_pixels(images: Images, top: Tensor, left: Tensor, *, ratio: float) -> Images:
    # drawing belongs to what is compared: eager draws too
    seeds = torch.randint(2**32, top.shape, device=top.device)
    return _tuple(mask_patches(_argument(images), seeds, ratio=ratio))


def _argument(images: Images) -> Tensor | Images:
    """A single view as people pass it."""
    return images[0] if len(images) == 1 else images


def _tuple(views: Tensor | Sequence[Tensor]) -> Images:
    return (views,) if isinstance(views, Tensor) else tuple(views)


def grid_crops(images: Images, top: Tensor, left: Tensor, *, box: Size, out: Size) -> Images:
    """What a box of each image shows, by grid_sample; the grid is made anew for each view, as eager code does."""
    views = []
    for x in images:
        grid = _grid(x, top, left, box, out)
        # a coordinate that rounding puts past the image reads its border, not zero
        view = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=True)
        views.append(view.to(x.dtype))
    return tuple(views)


def _grid(image: Tensor, top: Tensor, left: Tensor, box: Size, out: Size) -> Tensor:
    """Where to sample, (B, rows, columns, 2), −1 and 1 being the centres of the image's first and last pixel."""
    y, x = (
        # the last pixel of an image of one pixel is its first
        (corner[:, None] + torch.linspace(0, side - 1, n, device=image.device)) * (2 / max(extent - 1, 1)) - 1
        for corner, side, n, extent in zip((top, left), box, out, image.shape[2:], strict=True)
    )
    size = (len(top), *out)
    return torch.stack((x[:, None, :].expand(size), y[:, :, None].expand(size)), dim=-1)


def roi_crops(images: Images, top: Tensor, left: Tensor, *, box: Size, out: Size) -> Images:
    """The same by torchvision's roi_align, one sample in each bin."""
    regions = align_corners_regions(top, left, box, out)
    return tuple(roi_align(x.float(), regions, out, sampling_ratio=1, aligned=True).to(x.dtype) for x in images)


def align_corners_regions(top: Tensor, left: Tensor, box: Size, out: Size) -> Tensor:
    """(B, 5) regions (sample, x, y, x, y) of which roi_align reads what a crop with aligned corners reads.

    roi_align takes n bins of equal size from `low` to `high`, reads each at its centre, and counts from half a pixel
    before the first centre. So a bin is as large as the step (side − 1)/(n − 1), and half of one and half a pixel lie
    before the first sample:

        low = corner + 1/2 − step/2        high = low + n·step
    """
    step = [(side - 1) / max(n - 1, 1) for side, n in zip(box, out, strict=True)]
    y, x = (corner + 0.5 - s / 2 for corner, s in zip((top, left), step, strict=True))
    return torch.stack(
        (torch.arange(len(top), device=top.device), x, y, x + out[1] * step[1], y + out[0] * step[0]), dim=1
    )


def kornia_crops(images: Images, top: Tensor, left: Tensor, *, kornia: Any, box: Size, out: Size) -> Images:
    """The same by kornia's crop_and_resize; `kornia` is the module that holds it."""
    bottom, right = top + box[0] - 1, left + box[1] - 1
    # clockwise, from the top left
    corners = torch.stack((left, top, right, top, right, bottom, left, bottom), dim=1).view(-1, 4, 2).float()
    return tuple(kornia.crop_and_resize(x.float(), corners, out).to(x.dtype) for x in images)


def eager_holes(images: Images, top: Tensor, left: Tensor, *, hole: Size) -> Images:
    inside = _inside(top, left, hole, images[0])
    return tuple(torch.where(inside, x.mean(dim=(2, 3), keepdim=True), x) for x in images)


def _inside(top: Tensor, left: Tensor, hole: Size, x: Tensor) -> Tensor:
    """(B, 1, H, W) bool."""
    rows, columns = (
        (line >= corner[:, None]) & (line < corner[:, None] + side)
        for corner, side, line in zip(
            (top, left), hole, (torch.arange(n, device=x.device) for n in x.shape[2:]), strict=True
        )
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def eager_pixels(images: Images, top: Tensor, left: Tensor, *, ratio: float) -> Images:
    batch, _, height, width = images[0].shape
    order = torch.rand(batch, height * width, device=top.device).argsort(1)
    keep = (order >= int(ratio * height * width)).view(batch, 1, height, width)
    return tuple(x * keep for x in images)
