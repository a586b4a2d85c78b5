"""The transformations and the input hole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastle.config import CropResizeConfig, DetailConfig, IdentityConfig, MaskConfig, NoiseConfig

if TYPE_CHECKING:
    from fastle.config import TransformConfig
    from fastle.method.transforms import ViewDraw


def resize_crops(images: Tensor, top: Tensor, left: Tensor, box: tuple[int, int]) -> Tensor:
    """The box of each image back to (H, W): bilinear, corners aligned, from four gathered neighbours."""
    height, width = box
    crops = torch.stack(
        [images[b, :, top[b] : top[b] + height, left[b] : left[b] + width] for b in range(images.shape[0])]
    )

    def neighbours(out: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(out, dtype=images.dtype) * (side - 1) / max(out - 1, 1)
        low = position.floor().long().clamp(0, side - 1)
        return low, (low + 1).clamp(max=side - 1), position - low

    y0, y1, fy = neighbours(images.shape[2], height)
    x0, x1, fx = neighbours(images.shape[3], width)
    fy = fy[:, None]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return crops[:, :, rows[:, None], columns[None, :]]

    above = at(y0, x0) * (1 - fx) + at(y0, x1) * fx
    below = at(y1, x0) * (1 - fx) + at(y1, x1) * fx
    return above * (1 - fy) + below * fy


def box_of(side: int, x: Tensor) -> tuple[int, int]:
    """A box with the proportions of the images, to the nearest pixel."""
    height, width = (int(side * extent / min(x.shape[2:]) + 0.5) for extent in x.shape[2:])
    return height, width


def fill_rectangle(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """A rectangle of each image replaced by the image's own mean of each channel."""
    filled = []
    for b in range(images.shape[0]):
        rows = torch.zeros(images.shape[2], dtype=torch.bool)
        columns = torch.zeros(images.shape[3], dtype=torch.bool)
        rows[max(int(top[b]), 0) : max(int(top[b]) + height, 0)] = True
        columns[max(int(left[b]), 0) : max(int(left[b]) + width, 0)] = True
        inside = rows[:, None] & columns[None, :]
        channels = [torch.where(inside, channel.sum() / channel.numel(), channel) for channel in images[b]]
        filled.append(torch.stack(channels))
    return torch.stack(filled)


def box_mean(x: Tensor, size: int) -> Tensor:
    """The mean over the pixels of the size x size square that lie in the image."""

    def near(length: int) -> Tensor:
        i = torch.arange(length)
        return ((i[:, None] - i).abs() <= size // 2).to(x.dtype)

    rows, columns = near(x.shape[2]), near(x.shape[3])
    return rows @ x @ columns / (rows.sum(1)[:, None] * columns.sum(1))


def grey(x: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    if x.shape[1] == 3:
        return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
    return x.mean(1, keepdim=True)


def vivid(x: Tensor) -> Tensor:
    """Saturation 1.8, then contrast 1.4 about each image's mean."""
    saturated = grey(x) + 1.8 * (x - grey(x))
    mean = torch.stack([image.mean() for image in saturated])[:, None, None, None]
    return mean + 1.4 * (saturated - mean)


def sobel(g: Tensor) -> Tensor:
    """Gradient magnitude of (B, 1, H, W), its border repeated."""
    height, width = g.shape[-2:]

    def shifted(dy: int, dx: int) -> Tensor:
        rows = (torch.arange(height) + dy).clamp(0, height - 1)
        columns = (torch.arange(width) + dx).clamp(0, width - 1)
        return g[:, :, rows][:, :, :, columns]

    smooth = {-1: 1, 0: 2, 1: 1}
    gx = sum((w * (shifted(d, 1) - shifted(d, -1)) for d, w in smooth.items()), torch.zeros_like(g))
    gy = sum((w * (shifted(1, d) - shifted(-1, d)) for d, w in smooth.items()), torch.zeros_like(g))
    return torch.sqrt(gx**2 + gy**2 + 1e-12) - 1e-6


def per_image(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for each image, shaped to broadcast over it."""
    return torch.stack([reduce(image) for image in x])[:, None, None, None]


def detail_views(x: Tensor) -> list[Tensor]:
    """The five views of the detail stack."""
    g = grey(x)
    edges = sobel(g)
    texture = (x - box_mean(x, 5)).abs()
    deviation = g - box_mean(g, 5)
    contrast = deviation / torch.sqrt(box_mean(deviation**2, 5) + 1e-4)
    low, high = per_image(contrast, torch.min), per_image(contrast, torch.max)
    views = [
        box_mean(x, 11),
        vivid(x),
        edges / per_image(edges, torch.max).clamp(min=1e-6),
        texture / per_image(texture, torch.max).clamp(min=1e-6),
        (contrast - low) / (high - low).clamp(min=1e-6),
    ]
    return [view.expand_as(x).clamp(0, 1) for view in views]


def hash32(x: int) -> int:
    for _ in range(2):
        x ^= x >> 16
        x = x * 0x045D9F3B % 2**32
    return x ^ x >> 16


def keyed(seed: int, index: int) -> int:
    return hash32((hash32(seed) + (index + 1) * 0x9E3779B9) % 2**32)


def permuted(seed: int, number: int, count: int) -> int:
    """π of `fastle.kernels.random_mask`: a Feistel network of 8 rounds, walked until the number is below `count`."""
    bits = max(6, (count - 1).bit_length())
    low_bits = bits // 2
    while True:
        high, low = divmod(number, 2**low_bits)
        for r in range(0, 8, 2):
            high ^= hash32(low ^ keyed(seed, r)) % 2 ** (bits - low_bits)
            low ^= hash32(high ^ keyed(seed, r + 1)) % 2**low_bits
        number = high * 2**low_bits + low
        if number < count:
            return number


def kept(config: TransformConfig | None, x: Tensor, seeds: Tensor) -> Tensor:
    """1 where a random mask keeps a value of x and 0 elsewhere, in the shape of x."""
    assert isinstance(config, MaskConfig)
    keep = torch.ones_like(x)
    batch, channels, height, width = x.shape
    for b, seed in zip(range(batch), seeds.tolist(), strict=True):
        if config.kind == "channel":
            for c in range(channels):
                keep[b, c] = float(keyed(seed, c) >= config.ratio * 2**32)
            continue
        side = 4 if config.kind == "patch" else 1
        count, across = (height // side) * (width // side), width // side
        for p in range(count):
            if permuted(seed, p, count) < int(config.ratio * count):
                row, column = p // across * side, p % across * side
                keep[b, :, row : row + side, column : column + side] = 0
    return keep


def views(config: TransformConfig | None, x: Tensor, drawn: ViewDraw) -> list[Tensor]:
    """The views of x under the transformation whose random numbers are `drawn`."""
    if isinstance(config, DetailConfig):
        return detail_views(x)
    if isinstance(config, IdentityConfig) or drawn is None:
        return [x]
    if isinstance(drawn, Tensor):
        return [x + drawn] if isinstance(config, NoiseConfig) else [x * kept(config, x, drawn)]
    assert isinstance(config, CropResizeConfig)
    fixed = int(config.ratio * min(x.shape[2:]))
    crops = drawn if isinstance(drawn, tuple) else (drawn,)
    sides = [fixed if box.side is None else int(box.side) for box in crops]
    made = [resize_crops(x, box.top, box.left, box_of(side, x)) for box, side in zip(crops, sides, strict=True)]
    return made + [box_mean(grey(x), side).expand_as(x) for side in config.blur_views]
