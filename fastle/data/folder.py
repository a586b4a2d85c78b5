"""Any folder of images, with splits of its own or with hold-out splits that stay the same from run to run."""

from __future__ import annotations

from pathlib import Path

from fastle.folders import Split, split_paths

from .decode import Decoder, DiskFile
from .images import EncodedImages


def open_folder(root: Path, split: Split | None, decoder: Decoder) -> EncodedImages:
    """Opens the images below a folder, in the order of their paths.

    Args:
        root: The folder. If it holds train/ and test/, these are splits, and valid/ or else 5 % of train/ is the third.
            Otherwise 5 % of the images are held out to test and 5 % to validate, chosen by a hash of the path below
            `root`.
        split: The split, or None for every image.
        decoder: Decodes the images.

    Raises:
        DataError: There is no such folder, or it holds no images or too few to split.
    """
    return EncodedImages([DiskFile(str(path)) for path in split_paths(root, split)], decoder)
