"""The images of a folder and its splits, by their names alone; nothing here needs torch, or reads an image."""

from __future__ import annotations

import hashlib
import os
import re
from glob import glob
from pathlib import Path
from typing import Literal, get_args

from .errors import DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp",
    ".tif", ".tiff", ".bmp", ".dib", ".gif", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
KINDS = ".jpg .png .webp .tif .bmp .gif .avif .heic"  # in messages, the usual ones
SHARDS = (".tar", ".zip", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
# image formats that fastle does not decode: they are reported as bad files rather than silently left out
UNSUPPORTED = (
    ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".psd", ".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".ico",
    # of cameras
    ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
)  # fmt: skip


def find_shards(root: Path) -> list[Path]:
    """The shards that a path stands for, in order; none if it leads to a folder of images, or nowhere.

    Args:
        root: A shard, a pattern of shards such as "shards/*.tar", or a folder that holds shards and no image.

    Raises:
        DataError: A tar is compressed as a whole, or the pattern matches no shard.
    """
    if root.is_dir():
        return _shards_below(root)
    pattern = not root.exists() and bool(re.search(r"[*?\[]", str(root)))
    # pathlib's takes no absolute pattern
    paths = sorted(Path(path) for path in glob(str(root))) if pattern else [root]  # noqa: PTH207
    shards = [path for path in paths if path.is_file() and _is_shard(path)]
    if pattern and not shards:
        raise DataError(f"{root} matches no shard ({', '.join(SHARDS)}): give a folder, a shard or another pattern")
    return shards


def _shards_below(root: Path) -> list[Path]:
    shards = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        visible = [name for name in files if not name.startswith(".")]
        if any(name.lower().endswith(EXTENSIONS + UNSUPPORTED) for name in visible):
            # a folder of images, which may well hold an archive too
            return []
        shards += [Path(folder, name) for name in visible if name.lower().endswith(SHARDS + COMPRESSED)]
    return sorted(shard for shard in shards if _is_shard(shard))


def _is_shard(path: Path) -> bool:
    if path.name.lower().endswith(COMPRESSED):
        raise DataError(
            f"{path} is compressed as a whole, so that no image can be read without all before it: unpack it to a .tar"
        )
    return path.suffix.lower() in SHARDS


def split_paths(root: Path, split: Split | None) -> list[Path]:
    """The images below a folder, in the order of their paths.

    Args:
        root: The folder. If it holds train/ and test/, these are splits, and valid/ or else 5 % of train/ is the third.
            Otherwise 5 % of the images are held out to test and 5 % to validate, chosen by a hash of the path below
            `root`.
        split: The split, or None for every image.

    Raises:
        DataError: There is no such folder, or it holds no images or too few to split.
    """
    if split is None:
        return [root / path for path in find_images(root)]
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        test, valid, train = _hold_out(root, 2)
        splits = {"train": train, "valid": valid, "test": test}
        return [root / path for path in splits[split]]
    if split == "test" or (root / "valid").is_dir():
        return [root / split / path for path in find_images(root / split)]
    valid, train = _hold_out(root / "train", 1)
    return [root / "train" / path for path in (train if split == "train" else valid)]


def find_images(root: Path) -> list[str]:
    """The sorted paths of the images below `root`, with "/" between folders, except in hidden or linked folders.

    Raises:
        DataError: There is no such folder, or it holds no image.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder: give the folder of the images")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder of the images")
    images, others = [], 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = [name for name in files if not name.startswith(".")]
        names = [name for name in visible if name.lower().endswith(EXTENSIONS + UNSUPPORTED)]
        others += len(visible) - len(names)
        below = Path(folder).relative_to(root)
        images += [(below / name).as_posix() for name in names]
    if not images:
        raise DataError(f"{root} holds no images ({KINDS}), but {others} other files: add images")
    return sorted(images)


def _hold_out(root: Path, parts: int) -> list[list[str]]:
    """Holds out `parts` times 5 % of the images, rounded up. Returns these parts and then the rest, each sorted.

    A hash of the path decides, so that a new image moves few others, and no class or date is held out as a whole.
    """
    paths = find_images(root)
    if len(paths) <= parts:
        raise DataError(f"{root}: {len(paths)} images are too few for {parts + 1} splits: add images")
    share = -(-len(paths) // 20)
    hashed = sorted(paths, key=lambda path: hashlib.sha1(os.fsencode(path)).digest())
    held_out = [hashed[part * share : (part + 1) * share] for part in range(parts)]
    return [sorted(part) for part in (*held_out, hashed[parts * share :])]
