"""Any folder of images, with splits of its own or with hold-out splits that stay the same from run to run."""

from __future__ import annotations

from pathlib import Path

from fastle.folders import Split, find_shards, split_paths

from .decode import Decoder, DiskFile
from .images import EncodedImages
from .loading import Loading
from .shard_index import open_shards


def open_folder(root: Path, split: Split | None, decoder: Decoder, loading: Loading) -> EncodedImages:
    """Opens the images below a folder, in the order of their paths, or those of shards, read in place.

    Args:
        root: The folder. If it holds train/ and test/, these are splits, and valid/ or else 5 % of train/ is the third.
            Otherwise 5 % of the images are held out to test and 5 % to validate, chosen by a hash of the path below
            `root`. The splits of shards are made in the same way: see docs/data.md.
        split: The split, or None for every image.
        decoder: Decodes the images.
        loading: Shows the progress of indexing shards.

    Raises:
        DataError: There is no such folder, or it holds no images or too few to split; or a shard cannot be read.
    """
    if shards := find_shards(root):
        return EncodedImages(open_shards(root, shards, loading).of_split(split), decoder)
    return EncodedImages([DiskFile(str(path)) for path in split_paths(root, split)], decoder)
