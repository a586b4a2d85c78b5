"""Where the images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastle.options import Checked, ConfigError, option, shown

DatasetName = Literal["shapes", "cifar10", "celeba", "folder"]
BadImages = Literal["error", "skip"]

LARGEST_SIZE = 10_000  # pixels: larger images are refused


Size = int | tuple[int, int]  # the side of square images, or (height, width) of others, pixels


def image_size(multiple_of: int | None = None) -> Any:
    """A field of the data and of the model, which alone needs sizes divisible by 8."""
    text = "height and width of the images, pixels, divisible by 8: 96 for both, or 96x128"
    return option(text, at_least=1, cap=LARGEST_SIZE, multiple_of=multiple_of, pair=True, group="data", metavar="PX")


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: Any) -> Any:
    """A size in canonical form: an int for a square, else a tuple (JSON has lists)."""
    if isinstance(size, (list, tuple)):
        return size[0] if len(size) == 2 and size[0] == size[1] else tuple(size)
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Checked):
    """Where the images come from.

    Attributes:
        dataset: The kind of source.
        root: Absolute path of the data, or a pattern of paths of shards; None for shapes, which are made.
        size: Of the images that the loader hands out, pixels: a number for a square, or (height, width).
        channels: Of these images.
        bits: How many of an image's bits are kept: 8, or 16, which reach the step as floats.
        bad_images: Whether an image file that cannot be used is an error, or is left out.
        upscale: Whether images of a folder that are smaller than `size` are enlarged; otherwise they cannot be used.
    """

    dataset: DatasetName = option("shapes are made on the fly; folder is any tree of images", group="data", default="")
    root: str | None = option(
        "the folder that holds the images, or shards: .tar, .zip, .parquet, a folder of them or a quoted pattern",
        initial=None,
        name="data",
        group="data",
        metavar="DIR",
        default="",
    )
    size: int | tuple[int, int] = image_size()
    channels: int = option("1 reads a folder's images as grey, 3 as colour", choices=(1, 3), group="data")
    bits: int = option(
        "bits kept of each value of a folder's images; 16 doubles the cache and rules out DALI",
        initial=8,
        choices=(8, 16),
        group="data",
    )
    bad_images: BadImages = option(
        "whether image files that cannot be used are an error, which names all of them, or are left out",
        initial="error",
        group="data",
    )
    upscale: bool = option(
        "enlarge a folder's images that are smaller than --size, which otherwise cannot be used",
        initial=False,
        group="data",
        default="",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", plain_size(self.size))
        # slots=True makes the class anew, and super() without arguments would mean the old one
        Checked.__post_init__(self)
        if self.root is not None and "\0" in self.root:
            raise ConfigError(f"--data must be a path, not {shown(self.root)}")
        if self.bad_images == "skip" and self.dataset in ("shapes", "cifar10"):
            raise ConfigError(f"--bad-images skip has no effect with {self.dataset}, which has no image files")
        if self.bits != 8 and self.dataset != "folder":
            raise ConfigError(f"--bits {self.bits} has no effect with {self.dataset}, whose images have 8")
        if self.upscale and self.dataset != "folder":
            raise ConfigError(f"--upscale has no effect with {self.dataset}, whose images are not resized")
