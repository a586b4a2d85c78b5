"""Crop a box out of each image and resize it, bilinear with corners aligned, no antialiasing.

    y[i, j] = Σ_rc  V_ir · x[top + r, left + c] · U_jc        V (OH, h), U (OW, w): rows of two weights with sum 1
    V_ir = max(0, 1 − |i·(h − 1)/(OH − 1) − r|)               output row i reads row i·(h − 1)/(OH − 1) of the box
    ∂/∂x[top + r, left + c] = Σ_ij V_ir · G_ij · U_jc         zero outside the box

    B images of (C, H, W), boxes of (h, w) at (top, left), results of (OH, OW).

Coordinates are computed from integers, so that they are exact up to one rounding of the fraction, whatever the images'
dtype. Computed in bf16, they would change the crop by a tenth of its standard deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .images import Images, as_list, empty_like, layout, per_image, result_dtype, to_compute_dtype, why_not_triton
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
    """The box (top, left, height, width) of each image, resized to `out_size`.

    Args:
        images: (B, C, H, W), floating, or uint8, which is scaled to [0, 1] in fp32; or a sequence of such batches with
            the same B, H and W, all cropped with the same boxes. Up to four of one dtype, layout and C share a launch.
        top, left: (B,) integers on the images' device, in pixels.
        height, width: Size of the boxes in pixels, a number or (B,) integers. Without a width, boxes are squares.
        out_size: (OH, OW) of the results, or one number for both; by default the images' own.
        impl: "triton" (CUDA and ROCm tensors), "torch", or "auto": Triton where it runs, torch elsewhere and for fp64.

    Returns:
        (B, C, OH, OW) in the images' dtype and layout (contiguous or channels-last); a tuple of them for a sequence.
        Differentiable with respect to floating images. The same input gives the same bits every time.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, a size is out of range, or `impl` cannot run here.
            On a CPU also: a box leaves its image. On a GPU, checking that would wait for the device, so the kernel
            asserts it: the process gets a CUDA error at a later call and loses its GPU context. The torch
            implementation on other devices does not check.
    """
    batches = as_list("crop_resize", images)
    like, extent = batches[0], batches[0].shape[2:]
    width = height if width is None else width
    sizes: list[Tensor | None] = []
    for name, size, limit in (("height", height, extent[0]), ("width", width, extent[1])):
        if not isinstance(size, Tensor) and not 1 <= size <= limit:
            raise ValueError(
                f"crop_resize: {name} of the boxes must be from 1 to the images' {limit} pixels, not {size}"
            )
        sizes.append(per_image("crop_resize", name, size, like) if isinstance(size, Tensor) else None)
    top, left = per_image("crop_resize", "top", top, like), per_image("crop_resize", "left", left, like)
    out = (out_size, out_size) if isinstance(out_size, int) else tuple(extent if out_size is None else out_size)
    if len(out) != 2 or min(out) < 1:
        raise ValueError(f"crop_resize: out_size must be one or two numbers of at least 1, not {out_size}")
    chosen = choose("crop_resize", impl, like.device, why_not_triton(batches))
    numbers = [0 if isinstance(size, Tensor) else size for size in (height, width)]
    resized = _operator(batches, top, left, *sizes, *numbers, list(extent), list(out), chosen)
    return resized[0] if isinstance(images, Tensor) else tuple(resized)


def _forward(images: list[Tensor], *arguments: Any) -> list[Tensor]:
    *boxes, extent, out, impl = arguments
    if boxes[0].device.type == "cpu":
        box_list = _box_list(*boxes)
        _check_boxes(box_list, extent)
    if impl == "triton":
        return crop_resize_triton.forward(images, *boxes, out)
    with torch.autocast(boxes[0].device.type, enabled=False):
        if boxes[0].device.type == "cpu":
            return [_resize(image, box_list, out) for image in images]
        return [_resize_dense(image, *boxes, out) for image in images]


def _adjoint(gradients: list[Tensor], *arguments: Any) -> list[Tensor]:
    *boxes, extent, _, impl = arguments
    if impl == "triton":
        return crop_resize_triton.backward(gradients, *boxes, extent)
    with torch.autocast(boxes[0].device.type, enabled=False):
        if boxes[0].device.type == "cpu":
            return [_resize_adjoint(gradient, _box_list(*boxes), extent) for gradient in gradients]
        return [_resize_dense_adjoint(gradient, *boxes, extent) for gradient in gradients]


# either each box has its own size (heights, widths) or all have the same (height, width)
_operator = linear_operator(
    "crop_resize",
    "Tensor top, Tensor left, Tensor? heights, Tensor? widths, int height, int width, int[] size, int[] out, str impl",
    forward=_forward,
    adjoint=_adjoint,
    empty=lambda image, *arguments: empty_like(image, arguments[-2]),
    empty_adjoint=lambda gradient, *arguments: empty_like(gradient, arguments[-3]),
)


def _weights(pixel: Tensor, size: Tensor | int, out: int, dtype: torch.dtype) -> Tensor:
    """V of the module's formula, (…, out, n), at pixels (…, n) of boxes of `size`; 0 at pixels outside the box."""
    steps = max(out - 1, 1)
    row = torch.arange(out, device=pixel.device)[:, None]
    return (steps - (row * (size - 1) - pixel[..., None, :] * steps).abs()).clamp_min(0).to(dtype) / steps


# on a CPU: two small matrix products for all boxes of the same size

Box = tuple[int, int, int, int]  # top, left, height, width


def _box_list(
    top: Tensor, left: Tensor, heights: Tensor | None, widths: Tensor | None, height: int, width: int
) -> list[Box]:
    sizes = (
        [size] * len(top) if per_box is None else per_box.tolist()
        for per_box, size in ((heights, height), (widths, width))
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


def _samples_by_size(boxes: list[Box]) -> dict[Size, list[int]]:
    """The samples that have boxes of each size (height, width)."""
    samples: dict[Size, list[int]] = {}
    for sample, (_, _, height, width) in enumerate(boxes):
        samples.setdefault((height, width), []).append(sample)
    return samples


def _resize(image: Tensor, boxes: list[Box], out: Sequence[int]) -> Tensor:
    groups = _samples_by_size(boxes)
    result = None if len(groups) == 1 else empty_like(image, out)
    for (h, w), samples in groups.items():
        index = _pixel_indices(image, boxes, samples, h, w)
        crop = to_compute_dtype(_flat(image).index_select(0, index.flatten()).view(index.shape))  # [b, C, h, w]
        vertical, horizontal = _box_weights(h, w, tuple(out), crop.dtype)
        across = (crop.flatten(0, 2) @ horizontal.T).view(*crop.shape[:3], -1)  # [b, C, h, OW]
        resized = vertical @ across
        if result is None:
            return resized.to(result_dtype(image.dtype), memory_format=layout(image))
        result[samples] = resized.to(result.dtype)
    assert result is not None
    return result


def _resize_adjoint(gradient: Tensor, boxes: list[Box], extent: Sequence[int]) -> Tensor:
    result = empty_like(gradient, extent).zero_()
    for (h, w), samples in _samples_by_size(boxes).items():
        part = to_compute_dtype(gradient if len(samples) == len(gradient) else gradient[samples]).contiguous()
        vertical, horizontal = _box_weights(h, w, tuple(part.shape[2:]), part.dtype)
        # rows first: the larger product is then the batched one, which is faster here than one long, narrow product
        down = vertical.T @ part  # [b, C, h, OW]
        crop = (down.flatten(0, 2) @ horizontal).view(*down.shape[:3], w)
        _flat(result)[_pixel_indices(result, boxes, samples, h, w)] = crop.to(result.dtype)
    return result


def _flat(image: Tensor) -> Tensor:
    """The values of a dense image in the order of memory, as a view."""
    return image.as_strided((image.numel(),), (1,))


def _pixel_indices(image: Tensor, boxes: list[Box], samples: list[int], height: int, width: int) -> Tensor:
    """Indices into `_flat(image)` of the boxes of `samples`, all of one size: (len(samples), C, height, width)."""
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


# on other devices: two products with matrices as large as the image, so that the host need not read the boxes


def _resize_dense(image: Tensor, *boxes_and_out: Any) -> Tensor:
    *boxes, out = boxes_and_out
    vertical, horizontal = _image_weights(to_compute_dtype(image), image.shape[2:], out, *boxes)
    # pixels outside the box must not reach the products: 0 · NaN is NaN
    read = vertical.any(1)[:, None, :, None] & horizontal.any(1)[:, None, None, :]
    pixels = torch.where(read, to_compute_dtype(image), 0)
    resized = vertical[:, None] @ pixels @ horizontal[:, None].mT
    return resized.to(result_dtype(image.dtype), memory_format=layout(image))


def _resize_dense_adjoint(gradient: Tensor, *boxes_and_extent: Any) -> Tensor:
    *boxes, extent = boxes_and_extent
    vertical, horizontal = _image_weights(to_compute_dtype(gradient), extent, gradient.shape[2:], *boxes)
    result = vertical[:, None].mT @ to_compute_dtype(gradient) @ horizontal[:, None]
    return result.to(gradient.dtype, memory_format=layout(gradient))


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
    """V (B, OH, H) and U (B, OW, W) at all pixels of the images."""
    weights = []
    for start, per_box, one_size, pixels, count in (
        (top, heights, height, extent[0], out[0]),
        (left, widths, width, extent[1], out[1]),
    ):
        pixel = torch.arange(pixels, device=like.device) - start[:, None]
        size = one_size if per_box is None else per_box[:, None, None]
        weights.append(_weights(pixel, size, count, like.dtype))
    return weights[0], weights[1]
