"""Opens the images of a configuration: chooses the source, the decoder and the cache, and reports unusable files."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastle.errors import DataError
from fastle.folders import Split
from fastle.options import pair_text

from . import celeba, cifar10, folder, shapes
from .bits import unit
from .cache import CacheKey, open_cached
from .check import find_faults
from .dali import DaliDecoder
from .decode import BadFiles, Decoder, DiskFile, ImageFile, TorchvisionDecoder
from .identity import Identity, identify
from .images import ArrayImages, EncodedImages, Images, check_split
from .loading import Loading, make_decoder
from .shard_index import known_faults
from .shards import ShardFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fastle.config import DataConfig

MAX_LISTED = 5  # skipped files that a message names
MEND = "mend or remove them"
# datasets that are held in memory, because they are generated or decoded as a whole
IN_MEMORY = ("shapes", "cifar10")


def open_images(config: DataConfig, split: Split, loading: Loading | None = None) -> Images:
    """Opens the images of a split, (C, H, W) each, of the configuration's size.

    Args:
        config: The dataset, where it lies, and the size of its images.
        split: The split.
        loading: How images are loaded. By default they are decoded on request or, if the dataset is one of `IN_MEMORY`,
            held in the host's memory, without any messages.

    Raises:
        DataError: The images are missing, incomplete or of another size. The message says what to do.
        BadFiles: Images cannot be used, and `config` does not say to skip them. The error lists every one.
    """
    loading = loading or Loading(cache="host" if config.dataset in IN_MEMORY else "none")
    images, faults, _ = _open(config, split, loading, _decoder(config, loading))
    _report_faults({split: faults}, config, loading)
    _say_remarks(config, loading)
    return _not_empty(images, split)


def open_training(config: DataConfig, loading: Loading) -> tuple[Images, Images, Identity]:
    """Opens the training and the validation split, and identifies the first. Only the training split is cached.

    Raises:
        DataError: See `open_images`. One error lists the bad files of both splits.
    """
    decoder = _decoder(config, loading)
    train, faults, files = _open(config, "train", loading, decoder)
    if isinstance(train, EncodedImages):
        how = "DALI" if isinstance(decoder, DaliDecoder) else "torchvision"
        loading.say(f"cache: none: every epoch decodes all images again, by {how}")
    # a validation reads only a part of its split, and only now and then
    uncached = replace(loading, cache="host" if config.dataset in IN_MEMORY else "none")
    valid, valid_faults, _ = _open(config, "valid", uncached, decoder)
    _report_faults({"train": faults, "valid": valid_faults}, config, loading)
    _say_remarks(config, loading)
    if isinstance(files, ShardFiles):
        identity = replace(files.identity(), count=len(train))
    else:
        identity = Identity(len(train), config.dataset) if files is None else identify(_usable(files, faults))
    return _not_empty(train, "train"), _not_empty(valid, "valid"), identity


def open_tree(config: DataConfig, root: Path, loading: Loading | None = None) -> EncodedImages:
    """Opens every image below a folder, or of shards, resized and cropped as the images of the dataset are.

    Raises:
        DataError: There is no such folder, or it holds no image.
        BadFiles: See `open_images`.
    """
    loading = loading or Loading()
    decoder = _file_decoder(config, loading)
    return _open_encoded(config, folder.open_folder(root, None, decoder, loading), loading, str(root))


def open_files(config: DataConfig, files: Sequence[ImageFile], loading: Loading) -> EncodedImages:
    """Opens image files, resized and cropped as the images of the dataset are.

    Args:
        config: See `open_images`.
        files: The files.
        loading: How they are loaded.

    Raises:
        DataError: Every image is unusable and was skipped.
        BadFiles: See `open_images`.
    """
    return _open_encoded(config, EncodedImages(files, _file_decoder(config, loading)), loading, "images")


def _open_encoded(config: DataConfig, files: EncodedImages, loading: Loading, name: str) -> EncodedImages:
    images, faults = _checked(files, config, loading)
    # a command that uses a model has no flag to skip them
    _report_faults({name: faults}, config, loading, MEND)
    _say_remarks(config, loading)
    _not_empty(images, name)
    return images


def decode_files(config: DataConfig, paths: Sequence[Path], loading: Loading | None = None) -> Tensor:
    """Decodes image files to uint8 or in [0, 1], (B, C, H, W), resized and cropped as the images of the dataset are.

    Args:
        config: See `open_images`.
        paths: The files.
        loading: Shows of how many images bits are dropped.

    Raises:
        DataError: A file cannot be used. The message names it.
    """
    if folders := [path for path in paths if path.is_dir()]:
        raise DataError(f"{folders[0]} is a folder: give image files, such as {folders[0]}/*.jpg")
    loading = loading or Loading()
    # for a few files, DALI would take longer to start
    decoder = TorchvisionDecoder(
        config.size, config.channels, _resizes(config), upscale=config.upscale, bits=config.bits, tally=loading.tally
    )
    images = unit(decoder([DiskFile(str(path)) for path in paths]))
    # with a few files, it does not matter that Pillow is slower
    for remark in loading.tally.remarks_on_depth(config.bits):
        loading.say(remark)
    return images


def cache_key(config: DataConfig, split: Split, *, gpu: bool) -> CacheKey:
    """Identifies the cache file of a split, whose images were decoded on a GPU or not."""
    return CacheKey(
        name=f"{config.dataset}-{split}-{pair_text(config.size)}",
        root=str(_root(config)),
        size=config.size,
        channels=config.channels,
        resize=_resizes(config),
        upscale=config.upscale,
        bits=config.bits,
        pixels="gpu" if gpu else "cpu",
    )


def _open(
    config: DataConfig, split: Split, loading: Loading, decoder: Decoder | None
) -> tuple[Images, list[str], Sequence[ImageFile] | None]:
    """The usable images of a split, the known faults of the others, and the files of both, if there are any."""
    check_split(split)
    if decoder is None:
        return _to_device(_open_arrays(config, split), config, loading), [], None
    root = _root(config)
    if config.dataset == "celeba":
        images = celeba.open_celeba(root, split, decoder)
    else:
        images = folder.open_folder(root, split, decoder, loading)
    if loading.cache == "none":
        return *_checked(images, config, loading), images.files
    key = cache_key(config, split, gpu=loading.decoder == "dali-gpu")
    cached, faults = open_cached(images, key, loading)
    if cached is images:
        return *_checked(images, config, loading), images.files
    return cached, faults, images.files


def _open_arrays(config: DataConfig, split: Split) -> ArrayImages:
    if config.dataset == "shapes":
        if not isinstance(config.size, int):
            raise DataError(f"--size {pair_text(config.size)} cannot be: shapes are drawn on squares; give one number")
        return shapes.make_shapes(split, config.size)
    if config.size != cifar10.SIZE:
        raise DataError(
            f"--size {pair_text(config.size)} cannot be: the images of CIFAR-10 are 32x32 and are not resized"
        )
    return cifar10.open_cifar10(_root(config), split)


def _to_device(images: ArrayImages, config: DataConfig, loading: Loading) -> ArrayImages:
    """Moves images that are held in memory to the GPU, if there is one and the cache is "device" or "auto"."""
    if loading.decoder != "auto":
        raise DataError(
            f"--decoder {loading.decoder} has no effect with {config.dataset}, which is not encoded: leave it out"
        )
    if loading.cache in ("disk", "none"):
        raise DataError(
            f"--cache {loading.cache} has no effect with {config.dataset}, which is held in memory: use host or device"
        )
    if loading.cache == "device" and loading.device.type != "cuda":
        raise DataError(f"--cache device needs a CUDA GPU, not a {loading.device.type}: use host")
    if loading.device.type != "cuda" or loading.cache == "host":
        return images
    # these datasets are small beside the memory of any GPU
    return ArrayImages(images.images.to(loading.device))


def _checked(images: EncodedImages, config: DataConfig, loading: Loading) -> tuple[EncodedImages, list[str]]:
    """The images without the files that the check finds unusable, and the faults of those."""
    resize, upscale = _resizes(config), config.upscale
    find = partial(find_faults, images.files, images.decoder, loading, size=config.size, resize=resize, upscale=upscale)
    if isinstance(images.files, ShardFiles):
        # omit the default bits, so that records of earlier versions still match
        rules = f"{config.channels} {config.size} {resize} {upscale}" + (f" {config.bits}" if config.bits != 8 else "")
        faults = known_faults(images.files, rules, find)
    else:
        faults = find()
    return (images.without(faults) if faults else images), list(faults.values())


def _usable(files: Sequence[ImageFile], faults: list[str]) -> Sequence[ImageFile]:
    """The files without those that have faults, "NAME fault" each; a name may contain spaces."""
    if not faults:
        return files
    beginnings = {fault[: space.start()] for fault in faults for space in re.finditer(" ", fault)}
    return [file for file in files if file.name not in beginnings]


def _report_faults(
    faults_by_split: dict[str, list[str]],
    config: DataConfig,
    loading: Loading,
    hint: str = f"{MEND}, or leave them out with --bad-images skip",
) -> None:
    """Raises BadFiles if there are bad files, or says that they are skipped if the configuration allows it."""
    faults = [fault for split_faults in faults_by_split.values() for fault in split_faults]
    if not faults:
        return
    if config.bad_images == "error":
        raise BadFiles(dict(enumerate(faults)), hint)
    counts = ", ".join(f"{len(in_split)} of {split}" for split, in_split in faults_by_split.items() if in_split)
    listed = "".join(f"\n  {fault}" for fault in faults[:MAX_LISTED])
    rest = f"\n  and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    loading.say(f"skipped {len(faults)} images that cannot be used ({counts}):{listed}{rest}")


def _say_remarks(config: DataConfig, loading: Loading) -> None:
    for remark in loading.tally.remarks(config.bits):
        loading.say(remark)


def _resizes(config: DataConfig) -> bool:
    # the images of CelebA all have one size and are only cropped; a folder may hold images of any size
    return config.dataset != "celeba"


def _not_empty(images: Images, name: str) -> Images:
    if not len(images):
        raise DataError(f"{name}: every image is unusable and was skipped: mend or add images")
    return images


def _decoder(config: DataConfig, loading: Loading) -> Decoder | None:
    """The decoder of a dataset; None if its images are not encoded."""
    return None if config.dataset in IN_MEMORY else _file_decoder(config, loading)


def _file_decoder(config: DataConfig, loading: Loading) -> Decoder:
    return make_decoder(
        loading,
        size=config.size,
        channels=config.channels,
        resize=_resizes(config),
        upscale=config.upscale,
        bits=config.bits,
    )


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise DataError(f"{config.dataset} needs --data, the folder that holds it")
    return Path(config.root)
