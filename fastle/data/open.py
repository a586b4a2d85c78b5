"""Opens the images of a configuration: picks the source, the decoder and the cache, and reports unusable files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastle.errors import DataError

from . import celeba, cifar10, folder, shapes
from .cache import Packing, packed
from .check import find_faults
from .dali import DaliDecoder
from .decode import BadFiles, Decoder, DiskFile, TorchvisionDecoder
from .images import ArrayImages, EncodedImages, Images, Split, check_split
from .loading import Loading, make_decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fastle.config import DataConfig

NAMED = 5  # skipped files that a line names
# never encoded, or decoded at once
IN_MEMORY = ("shapes", "cifar10")


def open_images(config: DataConfig, split: Split, loading: Loading | None = None) -> Images:
    """The images of a split, uint8 (C, size, size) each.

    Args:
        loading: by default images are decoded when asked for, or held in the host's memory, and nothing is said.

    Raises:
        DataError: they are not there, not complete or not of that size; the message says what to do. BadFiles with
            every image that cannot be used, unless they are to be skipped.
    """
    loading = loading or Loading(cache="host" if config.dataset in IN_MEMORY else "none")
    images, faults = _open(config, split, loading, _decoder(config, loading))
    _judge({split: faults}, config, loading)
    return _not_empty(images, split)


def open_training(config: DataConfig, loading: Loading) -> tuple[Images, Images]:
    """The training and the validation split; only the former is cached.

    Raises:
        DataError: see `open_images`; one error for the bad files of both.
    """
    decoder = _decoder(config, loading)
    train, faults = _open(config, "train", loading, decoder)
    if isinstance(train, EncodedImages):
        how = "DALI" if isinstance(decoder, DaliDecoder) else "torchvision"
        loading.say(f"cache: none: every epoch decodes all images again, by {how}")
    # the latter is looked at now and then, a part of it
    in_place = replace(loading, cache="host" if config.dataset in IN_MEMORY else "none")
    valid, more = _open(config, "valid", in_place, decoder)
    _judge({"train": faults, "valid": more}, config, loading)
    return _not_empty(train, "train"), _not_empty(valid, "valid")


def open_tree(config: DataConfig, root: Path, loading: Loading | None = None) -> Images:
    """Every image below a folder, cut to size as the dataset's own are.

    Raises:
        DataError: there is no such folder, or no image in it. BadFiles: see `open_images`.
    """
    loading = loading or Loading()
    decoder = make_decoder(loading, size=config.size, channels=config.channels, resize=_resizes(config))
    images, faults = _checked(folder.open_folder(root, None, decoder), config, loading)
    _judge({str(root): faults}, config, loading)
    return _not_empty(images, str(root))


def decode_files(config: DataConfig, paths: Sequence[Path]) -> Tensor:
    """uint8 (B, C, size, size) of image files, cut to size as the dataset's own are.

    Raises:
        DataError: a file cannot be used; the message names it.
    """
    # a handful: DALI would take longer to begin
    decoder = TorchvisionDecoder(config.size, config.channels, _resizes(config))
    return decoder([DiskFile(str(path)) for path in paths])


def train_size(config: DataConfig) -> int | None:
    """How many training images there are, told without reading one; None for a folder that is not there.

    Raises:
        DataError: the folder is there, but cannot be split.
    """
    if config.dataset == "folder":
        root = None if config.root is None else Path(config.root)
        return len(folder.split_paths(root, "train")) if root is not None and root.exists() else None
    return {"shapes": shapes.SIZES["train"], "cifar10": cifar10.TRAIN, "celeba": celeba.TRAIN}[config.dataset]


def _open(config: DataConfig, split: Split, loading: Loading, decoder: Decoder | None) -> tuple[Images, list[str]]:
    """The images of a split that can be used, and what is wrong with the others, as far as that is known."""
    check_split(split)
    if decoder is None:
        return _placed(_arrays(config, split), config, loading), []
    root = _root(config)
    opened = celeba.open_celeba if config.dataset == "celeba" else folder.open_folder
    images = opened(root, split, decoder)
    if loading.cache == "none":
        return _checked(images, config, loading)
    packing = Packing(
        name=f"{config.dataset}-{split}-{config.size}",
        root=str(root),
        size=config.size,
        channels=config.channels,
        resize=_resizes(config),
        pixels="gpu" if loading.decoder == "dali-gpu" else "cpu",
    )
    found, faults = packed(images, packing, loading)
    return _checked(images, config, loading) if found is images else (found, faults)


def _arrays(config: DataConfig, split: Split) -> ArrayImages:
    if config.dataset == "shapes":
        return shapes.make_shapes(split, config.size)
    if config.size != cifar10.SIZE:
        raise DataError(f"--size {config.size} cannot be: the images of CIFAR-10 are 32x32, and are not resized")
    return cifar10.open_cifar10(_root(config), split)


def _placed(images: ArrayImages, config: DataConfig, loading: Loading) -> ArrayImages:
    """On the device, if that is asked for or there is a GPU."""
    if loading.decoder != "auto":
        raise DataError(f"--decoder {loading.decoder} has no effect with {config.dataset}, which is not encoded")
    if loading.cache in ("disk", "none"):
        raise DataError(
            f"--cache {loading.cache} has no effect with {config.dataset}, which is held in memory: use host or device"
        )
    if loading.cache == "device" and loading.device.type != "cuda":
        raise DataError(f"--cache device needs a CUDA GPU, not a {loading.device.type}: use host")
    if loading.device.type != "cuda" or loading.cache == "host":
        return images
    # small beside any GPU's memory
    return ArrayImages(images.images.to(loading.device))


def _checked(images: EncodedImages, config: DataConfig, loading: Loading) -> tuple[EncodedImages, list[str]]:
    faults = find_faults(images.files, images.decoder, loading, size=config.size)
    return (images.without(faults) if faults else images), list(faults.values())


def _judge(faults: dict[str, list[str]], config: DataConfig, loading: Loading) -> None:
    """Raises BadFiles for bad files, or says that they are skipped."""
    every = [fault for found in faults.values() for fault in found]
    if not every:
        return
    if config.bad_images == "error":
        raise BadFiles(dict(enumerate(every)), "mend or remove them, or leave them out with --bad-images skip")
    counts = ", ".join(f"{len(found)} of {name}" for name, found in faults.items() if found)
    named = "".join(f"\n  {fault}" for fault in every[:NAMED])
    rest = f"\n  and {len(every) - NAMED} more" if len(every) > NAMED else ""
    loading.say(f"skipped {len(every)} images that cannot be used ({counts}):{named}{rest}")


def _resizes(config: DataConfig) -> bool:
    # CelebA's images have one size, and the method crops them; the sizes elsewhere are anyone's
    return config.dataset != "celeba"


def _not_empty(images: Images, of: str) -> Images:
    if not len(images):
        raise DataError(f"{of}: no image is left when those that cannot be used are skipped")
    return images


def _decoder(config: DataConfig, loading: Loading) -> Decoder | None:
    """None for what is not encoded."""
    if config.dataset in IN_MEMORY:
        return None
    return make_decoder(loading, size=config.size, channels=config.channels, resize=_resizes(config))


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise DataError(f"{config.dataset} needs --data, the folder that holds it")
    return Path(config.root)
