"""Any tree of images, with splits of its own or with a hold-out that stays the same from run to run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fastle.errors import DataError

from .decode import Decoder, DiskFile
from .images import EncodedImages, Split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# images that are not decoded: bad files, because whoever put them there would miss them
FOREIGN = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif")


def open_folder(root: Path, split: Split | None, decoder: Decoder) -> EncodedImages:
    """The images below `root`, in the order of their paths; `split` None takes every one.

    Args:
        root: if it holds train/ and test/, these are the splits, with valid/ or else 5 % of train/ for the third.
            Without, 5 % are held out to test and 5 % to validate, chosen by a hash of the path below `root`.

    Raises:
        DataError: there is no such folder, it holds no images, or too few to split.
    """
    return EncodedImages([DiskFile(str(path)) for path in split_paths(root, split)], decoder)


def split_paths(root: Path, split: Split | None) -> list[Path]:
    """The files of `open_folder`, found by name alone."""
    if split is None:
        return [root / path for path in find_images(root)]
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        test, valid, train = _hold_out(root, 2)
        parts = {"train": train, "valid": valid, "test": test}
        return [root / path for path in parts[split]]
    if split == "test" or (root / "valid").is_dir():
        return [root / split / path for path in find_images(root / split)]
    valid, train = _hold_out(root / "train", 1)
    return [root / "train" / path for path in (train if split == "train" else valid)]


def find_images(root: Path) -> list[str]:
    """Paths below `root` with "/" between folders, sorted. Hidden files and folders and linked folders are left out.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    images, others = [], 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = [name for name in files if not name.startswith(".")]
        found = [name for name in shown if name.lower().endswith(EXTENSIONS + FOREIGN)]
        others += len(shown) - len(found)
        below = Path(folder).relative_to(root)
        images += [(below / name).as_posix() for name in found]
    if not images:
        raise DataError(f"{root}: no images ({' '.join(EXTENSIONS)}), {others} other files")
    return sorted(images)


def _hold_out(root: Path, parts: int) -> list[list[str]]:
    """So many parts of 5 %, rounded up, and the rest, each in the order of the paths.

    The hash decides, so that an image that is added moves few others and no class or date is held out as a whole.
    """
    paths = find_images(root)
    if len(paths) <= parts:
        raise DataError(f"{root}: {len(paths)} images cannot be split in {parts + 1}: add images")
    share = -(-len(paths) // 20)
    hashed = sorted(paths, key=lambda path: hashlib.sha1(os.fsencode(path)).digest())
    held_out = [hashed[part * share : (part + 1) * share] for part in range(parts)]
    return [sorted(part) for part in (*held_out, hashed[parts * share :])]
