"""Checks, dtypes and memory layouts of image batches, for all operators on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .impl import device_guard

Images = Tensor | Sequence[Tensor]
MAX_VIEWS = 4  # image batches that one launch takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


def as_list(operator: str, images: Images) -> list[Tensor]:
    """One (B, C, H, W) batch, or several with the same B, H and W, as a list of dense batches.

    Dense means contiguous or channels-last; a batch in another layout is copied.

    Raises:
        ValueError: The sequence is empty, a batch has the wrong rank or dtype, or batches differ in B, H, W or device.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not batches:
        raise ValueError(f"{operator}: the sequence of images is empty")
    first = batches[0]
    for image in batches:
        if image.ndim != 4 or 0 in image.shape[1:]:
            raise ValueError(f"{operator}: images must be (B, C, H, W), not {tuple(image.shape)}")
        if image.dtype not in DTYPES:
            raise ValueError(f"{operator}: images must be floating or uint8, not {image.dtype}")
        if (len(image), image.shape[2:], image.device) != (len(first), first.shape[2:], first.device):
            raise ValueError(
                f"{operator}: all images of a sequence must have the same B, H, W and device, not "
                f"{tuple(first.shape)} on {first.device} and {tuple(image.shape)} on {image.device}"
            )
    return [dense(image) for image in batches]


def per_image(operator: str, name: str, values: Tensor, like: Tensor) -> Tensor:
    """`values` contiguous, after checking that they are integers (B,) on the device of the batch `like`.

    Raises:
        ValueError: Wrong shape, dtype or device, or no tensor.
    """
    if not isinstance(values, Tensor):
        # a caller without type checker may give one number for all images
        raise ValueError(
            f"{operator}: {name} must be a tensor with one integer for each of the {len(like)} images, not {values!r}"
        )
    integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.shape != like.shape[:1] or not integers or values.device != like.device:
        raise ValueError(
            f"{operator}: {name} must hold one integer for each of the {len(like)} images, on {like.device}, "
            f"not {values.dtype} {tuple(values.shape)} on {values.device}"
        )
    return values.contiguous()


def why_not_triton(images: Sequence[Tensor]) -> str | None:
    """The reason why Triton's kernels cannot take the images, or None."""
    fp64 = any(image.dtype == torch.float64 for image in images)
    return "its kernels compute in fp32, and images are fp64" if fp64 else None


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an operator's result: fp32 for uint8, which is scaled to [0, 1]; otherwise the images' own."""
    return torch.float32 if dtype == torch.uint8 else dtype


def scale(image: Tensor) -> float:
    """What the values of an image are multiplied by: 1/255 for uint8, which becomes [0, 1], and 1 for all others."""
    return 1 / 255 if image.dtype == torch.uint8 else 1.0


def to_compute_dtype(image: Tensor) -> Tensor:
    """The image in fp32, or fp64 if it is fp64; uint8 is scaled to [0, 1]."""
    if image.dtype == torch.uint8:
        return image.float() * scale(image)
    return image if image.dtype == torch.float64 else image.float()


def dense(image: Tensor) -> Tensor:
    return image if image.is_contiguous() or is_channels_last(image) else image.contiguous()


def is_channels_last(image: Tensor) -> bool:
    """Whether an image is channels-last and not contiguous. With one channel, say, it is both: then False."""
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def layout(image: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(image) else torch.contiguous_format


def empty_like(image: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Uninitialised images in the layout and result dtype of `image`; `size` (H, W) replaces the image's own."""
    shape = image.shape if size is None else (*image.shape[:2], *size)
    return torch.empty(shape, dtype=result_dtype(image.dtype), device=image.device, memory_format=layout(image))


def planes(image: Tensor) -> tuple[int, int]:
    """(number of planes, interleaved channels of each): (B·C, 1) if contiguous, (B, C) if channels-last."""
    batch, channels = image.shape[:2]
    return (batch, channels) if is_channels_last(image) else (batch * channels, 1)


def _launch_groups(images: Sequence[Tensor]) -> list[list[int]]:
    """Indices of batches that share a launch: same shape, dtype and layout, at most MAX_VIEWS in each group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape, image.dtype, is_channels_last(image)), []).append(index)
    return [group[i : i + MAX_VIEWS] for group in groups.values() for i in range(0, len(group), MAX_VIEWS)]


def launches(**batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The launches of a kernel on image batches, none for empty ones; meanwhile, the batches' device is current.

    Args:
        batches: What the kernel reads and writes, by its name for them. Those named first are grouped.

    Yields:
        The first batch of a group, and arguments of the kernel: for each name, say x, the pointers x0_ptr to x3_ptr;
        and VIEWS, the number of batches. Missing pointers repeat the last one, and no program follows them.
    """
    grouped = next(iter(batches.values()))
    with device_guard(grouped[0].device):
        for group in _launch_groups(grouped):
            if len(grouped[group[0]]):
                places = [*group, *[group[-1]] * (MAX_VIEWS - len(group))]
                pointers = {f"{name}{i}_ptr": of[k] for name, of in batches.items() for i, k in enumerate(places)}
                yield grouped[group[0]], pointers | {"VIEWS": len(group)}
