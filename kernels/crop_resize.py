"""Crop a box out of each image and resize it, bilinear with corners aligned, no antialiasing.

    y[i, j] = Σ_rc  V_ir · x[top + r, left + c] · U_jc        V (OH, h) and U (OW, w): rows of two weights that sum to 1
    V_ir = max(0, 1 − |i·(h − 1)/(OH − 1) − r|)               output row i reads row i·(h − 1)/(OH − 1) of the box
    ∂/∂x[top + r, left + c] = Σ_ij V_ir · G_ij · U_jc         zero outside the box

    B images of (C, H, W), boxes of (h, w) at (top, left), results of (OH, OW).

Coordinates are made from integers, so that they are exact up to one rounding of the fraction, whatever the images'
dtype: made in bf16, they would put the crop off by a tenth of its spread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .images import Images, as_list, empty_like, layout, per_image, result_dtype, unfit, widened
from .impl import HAS_TRITON, Impl, choose
from .linear import linear_operator

crop_resize_triton: Any = None
if HAS_TRITON:
    from . import crop_resize_triton

Size = tuple[int, int]


@overload
def crop_resize(
    images: Tensor, top: Tensor, left: Tensor, height: int | Tensor, width: int | Tensor | None = None,
    *, out_size: int | Size | None = None, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def crop_resize(
    images: Sequence[Tensor], top: Tensor, left: Tensor, height: int | Tensor, width: int | Tensor | None = None,
    *, out_size: int | Size | None = None, impl: Impl = "auto",
) -> tuple[Tensor, ...]: ...  # fmt: skip
def crop_resize(
    images: Images,
    top: Tensor,
    left: Tensor,
    height: int | Tensor,
    width: int | Tensor | None = None,
    *,
    out_size: int | Size | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The box (top, left, height, width) of each image, resized.

    Args:
        images: (B, C, H, W), floating, or uint8, which is scaled to [0, 1] in fp32; or a sequence of such with the same
            B, H and W, all cropped by the same boxes: views of one dtype, layout and C share a launch, up to four.
        top, left: (B,) integers on the images' device, pixels.
        height, width: of the boxes in pixels, a number or (B,) integers. Without a width boxes are squares.
        out_size: of the results, (OH, OW) or one number for both; the images' own without.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.

    Returns:
        (B, C, OH, OW) in the images' dtype and layout (contiguous or channels-last), a tuple of them for a sequence.
        Differentiable with respect to floating images; the same bits every time.

    Raises:
        ValueError: arguments of the wrong shape, dtype or device; a size out of its range; and on a CPU a box that
            leaves its image. On a GPU that would wait for the device: the kernel asserts it there, which shows as a
            CUDA error at a later call and costs the process its GPU context. Torch's form on other devices does not
            look.
    """
    batches = as_list("crop_resize", images)
    like, extent = batches[0], batches[0].shape[2:]
    width = height if width is None else width
    sizes: list[Tensor | None] = []
    for name, size, limit in (("height", height, extent[0]), ("width", width, extent[1])):
        if not isinstance(size, Tensor) and not 1 <= size <= limit:
            raise ValueError(f"crop_resize: {name} {size} of the boxes is not between 1 and the images' {limit} pixels")
        sizes.append(per_image("crop_resize", name, size, like) if isinstance(size, Tensor) else None)
    top, left = per_image("crop_resize", "top", top, like), per_image("crop_resize", "left", left, like)
    out = (out_size, out_size) if isinstance(out_size, int) else tuple(extent if out_size is None else out_size)
    if len(out) != 2 or min(out) < 1:
        raise ValueError(f"crop_resize: out_size is one or two numbers from 1, not {out_size}")
    chosen = choose("crop_resize", impl, like.device, unfit(batches))
    numbers = [0 if isinstance(size, Tensor) else size for size in (height, width)]
    found = _operator(batches, top, left, *sizes, *numbers, list(extent), list(out), chosen)
    return found[0] if isinstance(images, Tensor) else tuple(found)


def _forward(images: list[Tensor], *arguments: Any) -> list[Tensor]:
    *boxes, extent, out, impl = arguments
    if boxes[0].device.type == "cpu":
        listed = _listed(*boxes)
        _check_boxes(listed, extent)
    if impl == "triton":
        return crop_resize_triton.forward(images, *boxes, out)
    with torch.autocast(boxes[0].device.type, enabled=False):
        if boxes[0].device.type == "cpu":
            return [_resize(image, listed, out) for image in images]
        return [_resize_by_masks(image, *boxes, out) for image in images]


def _adjoint(gradients: list[Tensor], *arguments: Any) -> list[Tensor]:
    *boxes, extent, _, impl = arguments
    if impl == "triton":
        return crop_resize_triton.backward(gradients, *boxes, extent)
    with torch.autocast(boxes[0].device.type, enabled=False):
        if boxes[0].device.type == "cpu":
            return [_spread(gradient, _listed(*boxes), extent) for gradient in gradients]
        return [_spread_by_masks(gradient, *boxes, extent) for gradient in gradients]


# boxes have sizes of their own (heights, widths), or one for all (height, width)
_operator = linear_operator(
    "crop_resize",
    "Tensor top, Tensor left, Tensor? heights, Tensor? widths, int height, int width, int[] size, int[] out, str impl",
    forward=_forward,
    adjoint=_adjoint,
    empty=lambda image, *arguments: empty_like(image, arguments[-2]),
    empty_adjoint=lambda gradient, *arguments: empty_like(gradient, arguments[-3]),
)


def _weights(pixel: Tensor, size: Tensor | int, out: int, dtype: torch.dtype) -> Tensor:
    """V of the module's formula at pixels (…, n) of boxes of `size`: (…, out, n), 0 for pixels outside."""
    steps = max(out - 1, 1)
    row = torch.arange(out, device=pixel.device)[:, None]
    return (steps - (row * (size - 1) - pixel[..., None, :] * steps).abs()).clamp_min(0).to(dtype) / steps


# on a CPU: two small products for all boxes of one size

Box = tuple[int, int, int, int]  # top, left, height, width


def _listed(
    top: Tensor, left: Tensor, heights: Tensor | None, widths: Tensor | None, height: int, width: int
) -> list[Box]:
    sizes = (
        [number] * len(top) if several is None else several.tolist()
        for several, number in ((heights, height), (widths, width))
    )
    return list(zip(top.tolist(), left.tolist(), *sizes, strict=True))


def _check_boxes(boxes: list[Box], extent: Sequence[int]) -> None:
    for sample, (top, left, height, width) in enumerate(boxes):
        inside = 0 <= top <= extent[0] - height and 0 <= left <= extent[1] - width
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"crop_resize: the box of sample {sample} (top {top}, left {left}, height {height}, width {width}) "
                f"leaves the {extent[0]}x{extent[1]} image"
            )


def _of_one_size(boxes: list[Box]) -> dict[Size, list[int]]:
    """The samples of each size of box."""
    found: dict[Size, list[int]] = {}
    for sample, (_, _, height, width) in enumerate(boxes):
        found.setdefault((height, width), []).append(sample)
    return found


def _resize(image: Tensor, boxes: list[Box], out: Sequence[int]) -> Tensor:
    groups = _of_one_size(boxes)
    found = None if len(groups) == 1 else empty_like(image, out)
    for (h, w), samples in groups.items():
        index = _places(image, boxes, samples, h, w)
        crop = widened(_flat(image).index_select(0, index.flatten()).view(index.shape))  # [b, C, h, w]
        vertical, horizontal = _box_weights(h, w, tuple(out), crop.dtype)
        across = (crop.flatten(0, 2) @ horizontal.T).view(*crop.shape[:3], -1)  # [b, C, h, OW]
        resized = vertical @ across
        if found is None:
            return resized.to(result_dtype(image.dtype), memory_format=layout(image))
        found[samples] = resized.to(found.dtype)
    assert found is not None
    return found


def _spread(gradient: Tensor, boxes: list[Box], extent: Sequence[int]) -> Tensor:
    found = empty_like(gradient, extent).zero_()
    for (h, w), samples in _of_one_size(boxes).items():
        part = widened(gradient if len(samples) == len(gradient) else gradient[samples]).contiguous()
        vertical, horizontal = _box_weights(h, w, tuple(part.shape[2:]), part.dtype)
        # rows first: of a long and narrow product and many small ones, this way makes the large one the faster
        down = vertical.T @ part  # [b, C, h, OW]
        spread = (down.flatten(0, 2) @ horizontal).view(*down.shape[:3], w)
        _flat(found)[_places(found, boxes, samples, h, w)] = spread.to(found.dtype)
    return found


def _flat(image: Tensor) -> Tensor:
    """The numbers of a dense image in the order of memory."""
    return image.as_strided((image.numel(),), (1,))


def _places(image: Tensor, boxes: list[Box], samples: list[int], height: int, width: int) -> Tensor:
    """Where `_flat` has the pixels of boxes of one size: (b, C, height, width)."""
    sample, channel, row, column = image.stride()
    corners = torch.tensor([b * sample + boxes[b][0] * row + boxes[b][1] * column for b in samples])
    return corners[:, None, None, None] + _box_offsets((image.shape[1], height, width), (channel, row, column))


@functools.lru_cache(maxsize=64)
def _box_offsets(shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Tensor:
    channel, row, column = (torch.arange(n) * stride for n, stride in zip(shape, strides, strict=True))
    return channel[:, None, None] + row[:, None] + column


@functools.lru_cache(maxsize=64)
def _box_weights(height: int, width: int, out: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    vertical = _weights(torch.arange(height), height, out[0], dtype)
    return vertical, _weights(torch.arange(width), width, out[1], dtype)


# elsewhere: two products with matrices as large as the image, which wait for no box to be read


def _resize_by_masks(image: Tensor, *boxes_and_out: Any) -> Tensor:
    *boxes, out = boxes_and_out
    vertical, horizontal = _image_weights(widened(image), image.shape[2:], out, *boxes)
    # what is not read may hold anything: 0 · NaN is NaN
    read = vertical.any(1)[:, None, :, None] & horizontal.any(1)[:, None, None, :]
    pixels = torch.where(read, widened(image), 0)
    resized = vertical[:, None] @ pixels @ horizontal[:, None].mT
    return resized.to(result_dtype(image.dtype), memory_format=layout(image))


def _spread_by_masks(gradient: Tensor, *boxes_and_extent: Any) -> Tensor:
    *boxes, extent = boxes_and_extent
    vertical, horizontal = _image_weights(widened(gradient), extent, gradient.shape[2:], *boxes)
    spread = vertical[:, None].mT @ widened(gradient) @ horizontal[:, None]
    return spread.to(gradient.dtype, memory_format=layout(gradient))


def _image_weights(
    like: Tensor,
    extent: Sequence[int],
    out: Sequence[int],
    top: Tensor,
    left: Tensor,
    heights: Tensor | None,
    widths: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """V (B, OH, H) and U (B, OW, W) at the images' own pixels."""
    found = []
    for start, several, number, pixels, count in (
        (top, heights, height, extent[0], out[0]),
        (left, widths, width, extent[1], out[1]),
    ):
        pixel = torch.arange(pixels, device=like.device) - start[:, None]
        size = number if several is None else several[:, None, None]
        found.append(_weights(pixel, size, count, like.dtype))
    return found[0], found[1]
