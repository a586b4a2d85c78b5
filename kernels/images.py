"""What the operators on images share: one image batch or several, their dtypes and their layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Images = Tensor | Sequence[Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


def as_list(operator: str, images: Images) -> list[Tensor]:
    """One (B, C, H, W) batch or several of one (B, H, W), each dense: contiguous or channels-last.

    Raises:
        ValueError: no batch, or batches that are not alike or of another kind.
    """
    found = [images] if isinstance(images, Tensor) else list(images)
    if not found:
        raise ValueError(f"{operator}: an empty sequence of images")
    first = found[0]
    for image in found:
        if image.ndim != 4 or 0 in image.shape[1:]:
            raise ValueError(f"{operator}: images are (B, C, H, W), not {tuple(image.shape)}")
        if image.dtype not in DTYPES:
            raise ValueError(f"{operator}: images are floating or uint8, not {image.dtype}")
        if (len(image), image.shape[2:], image.device) != (len(first), first.shape[2:], first.device):
            raise ValueError(
                f"{operator}: the images of a sequence share batch, size and device: "
                f"{tuple(first.shape)} on {first.device} and {tuple(image.shape)} on {image.device}"
            )
    return [dense(image) for image in found]


def per_image(operator: str, name: str, values: Tensor, like: Tensor) -> Tensor:
    """Integers, one for each image of the batch `like`, on its device and next to each other.

    Raises:
        ValueError: they are not.
    """
    integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.shape != like.shape[:1] or not integers or values.device != like.device:
        raise ValueError(
            f"{operator}: {name} holds one integer for each of {len(like)} images on {like.device}, "
            f"not {values.dtype} {tuple(values.shape)} on {values.device}"
        )
    return values.contiguous()


def unfit(images: Sequence[Tensor]) -> str | None:
    """Why Triton's kernels cannot take the images, or None."""
    return "its kernels compute in fp32, and images are fp64" if torch.float64 in dtypes(images) else None


def dtypes(images: Sequence[Tensor]) -> set[torch.dtype]:
    return {image.dtype for image in images}


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is made from images: uint8 is scaled to [0, 1] in fp32."""
    return torch.float32 if dtype == torch.uint8 else dtype


def widened(image: Tensor) -> Tensor:
    """In the dtype that is computed in: fp32, fp64 for fp64; uint8 scaled to [0, 1]."""
    if image.dtype == torch.uint8:
        return image.float() * (1 / 255)
    return image if image.dtype == torch.float64 else image.float()


def dense(image: Tensor) -> Tensor:
    return image if image.is_contiguous() or is_channels_last(image) else image.contiguous()


def is_channels_last(image: Tensor) -> bool:
    """Whether channels lie together. An image that is both (of one channel, say) counts as contiguous."""
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def layout(image: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(image) else torch.contiguous_format


def empty_like(image: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Uninitialised images of an image's layout and result dtype, of another (H, W) if one is given."""
    shape = image.shape if size is None else (*image.shape[:2], *size)
    return torch.empty(shape, dtype=result_dtype(image.dtype), device=image.device, memory_format=layout(image))


def planes(image: Tensor) -> tuple[int, int]:
    """(number of planes, channels that lie together in one): (B·C, 1) contiguous, (B, C) channels-last."""
    batch, channels = image.shape[:2]
    return (batch, channels) if is_channels_last(image) else (batch * channels, 1)


def alike(images: Sequence[Tensor]) -> list[list[int]]:
    """Indices of images that can share a launch: of one shape, dtype and layout, at most `LAUNCH` at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape, image.dtype, is_channels_last(image)), []).append(index)
    return [group[i : i + LAUNCH] for group in groups.values() for i in range(0, len(group), LAUNCH)]


LAUNCH = 4  # image batches that a kernel takes


def filled_up(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as a kernel takes: the last one again for those that are missing, which no program touches."""
    return [*tensors, *[tensors[-1]] * (LAUNCH - len(tensors))]
