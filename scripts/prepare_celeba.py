"""Reports which parts of CelebA you have and which are missing, checks every image, and caches the training split.

    python scripts/prepare_celeba.py DIR              # crops of 128 pixels, as in the preset
    python scripts/prepare_celeba.py DIR --size 96
    python scripts/prepare_celeba.py DIR --check      # checks every image and writes nothing

DIR may have any of the three layouts that CelebA is distributed in: torchvision's, Kaggle's, or the parquet files on
Hugging Face. The script downloads nothing and changes nothing in DIR. Exit status: 0 if everything is there, 1 if
something is missing or bad.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track as show_progress

# import the fastle of this checkout, whether or not one is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastle.commands.cli import Parser
from fastle.config import ConfigError
from fastle.data import Loading, open_images
from fastle.data.celeba import TRAIN, open_celeba
from fastle.data.decode import BadFiles, DiskFile, ImageFile, TorchvisionDecoder
from fastle.errors import FastleError
from fastle.folders import SPLITS, Split
from fastle.presets import make_config

WIDTH, HEIGHT = 178, 218  # pixels
COUNTS: dict[Split, int] = {"train": TRAIN, "valid": 19_867, "test": 19_962}
CHUNK = 256  # images decoded in one call
PARTITION = "list_eval_partition"

SOURCES = """\
Any one of these is enough (the makers of CelebA permit non-commercial research only):

  torchvision, from Google Drive, whose quota is often exceeded: then choose another
      pip install gdown
      python -c "from torchvision.datasets import CelebA; CelebA({python}, download=True)"
    or by hand: img_align_celeba.zip (Img) and list_eval_partition.txt (Eval) from the Google Drive of
    https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html to {root}, and then
      unzip -q {shell}/img_align_celeba.zip -d {shell}

  Kaggle
      pip install kaggle
      kaggle datasets download jessicali9530/celeba-dataset -p {shell} --unzip

  Hugging Face, as parquet files; `fastle-train celeba --download` fetches the same
      pip install huggingface_hub pyarrow
      hf download flwrlabs/celeba --repo-type dataset --include "img_align+identity+attr/*" --local-dir {shell}
"""

Track = Callable[[Iterable[Any], str, float], Iterable[Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="prepare_celeba.py",
        allow_abbrev=False,
        description="Reports which parts of CelebA are missing, checks every image, and builds the cache.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder of CelebA, or where it should go")
    preset = make_config("celeba").data.size
    parser.add_argument(
        "--size", type=int, metavar="N", default=preset, help="size of the crops in pixels (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="check every image and write nothing")
    flags = parser.parse_args(argv)
    out, err = (Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False) for stderr in (False, True))
    root = flags.dir.expanduser().absolute()
    try:
        prepare(root, flags.size, out.print, partial(_track, console=err), check_only=flags.check)
    except FastleError as error:
        err.print(f"{parser.prog}: error: {error}")
        return 1
    return 0


def prepare(root: Path, size: int, say: Callable[[str], object], track: Track, *, check_only: bool) -> None:
    """Reports what is there, checks every image and, unless `check_only`, builds the cache of the training split.

    Raises:
        FastleError: Something is missing, and the message says where to get it; or images are bad, and it lists them.
    """
    if size > WIDTH:
        raise ConfigError(f"--size {size} cannot be: the images of CelebA are {WIDTH}x{HEIGHT} and are not resized")
    config = make_config("celeba", data=root, size=size).data
    # not DALI, which has to rebuild its pipeline after every chunk with a bad image
    decoder = TorchvisionDecoder(size, config.channels, resize=False)
    splits = find_splits(root, decoder)
    say(f"layout: {describe_layout(splits['train'])}")
    for split, files in splits.items():
        complete = len(files) == COUNTS[split]
        say(f"{split}: {len(files):,} images" + ("" if complete else f" (CelebA has {COUNTS[split]:,})"))

    # building the cache decodes every image, so it is the check of the training split
    checked = {split: files for split, files in splits.items() if check_only or split != "train"}
    bad = [fault for split, files in checked.items() for fault in check_files(files, decoder, split, track)]
    if not check_only:
        try:
            open_images(config, "train", Loading(cache="disk", say=say, track=track))
        except BadFiles as error:
            bad += error.faults.values()
    if bad:
        hint = "download them again, or train without them with --bad-images skip"
        raise FastleError(f"{len(bad)} bad images: {hint}\n" + "\n".join(f"  {fault}" for fault in bad))
    say(f"all {sum(map(len, splits.values())):,} images are good")
    sized = "" if size == make_config("celeba").data.size else f" --size {size}"
    if check_only:
        say(f"to build the cache: python scripts/prepare_celeba.py {shlex.quote(str(root))}{sized}")
    say(f"to train: fastle-train celeba --data {shlex.quote(str(root))}{sized}")


def find_splits(root: Path, decoder: TorchvisionDecoder) -> dict[Split, Sequence[ImageFile]]:
    """The files of each split, found as by `open_celeba`.

    Raises:
        FastleError: A split is missing or not complete.
    """
    splits: dict[Split, Sequence[ImageFile]] = {}
    missing: list[str] = []
    for split in SPLITS:
        try:
            splits[split] = open_celeba(root, split, decoder).files
        except FastleError as error:
            missing.append(str(error))
    missing += [f"{root}: the {split} split has no images" for split, files in splits.items() if not files]
    if missing:
        # a fault of all splits is reported once
        sources = SOURCES.format(root=root, shell=shlex.quote(str(root)), python=repr(str(root)))
        raise FastleError("; ".join(dict.fromkeys(missing)) + "\n\n" + sources)
    return splits


def describe_layout(files: Sequence[ImageFile]) -> str:
    """Says which of the three layouts the files have, and where they are."""
    first = files[0]
    if not isinstance(first, DiskFile):
        return f"Hugging Face's, parquet files in {Path(first.name.split('.parquet')[0]).parent}"
    folder = Path(first.name).parent
    # the partition is beside the images, or one or two folders above them
    bases = (folder, *folder.parents[:2])
    partitions = (base / f"{PARTITION}{ending}" for base in reversed(bases) for ending in (".txt", ".csv"))
    partition = next(path for path in partitions if path.exists())
    layout = "torchvision's" if partition.suffix == ".txt" else "Kaggle's"
    return f"{layout}, images in {folder}, partition in {partition}"


def check_files(files: Sequence[ImageFile], decoder: TorchvisionDecoder, split: Split, track: Track) -> list[str]:
    """Decodes every image. Returns a message "NAME fault" for each that cannot be used."""
    faults: list[str] = []
    starts = range(0, len(files), CHUNK)
    for start in track(starts, f"checking {split}", math.ceil(len(files) / CHUNK)):
        try:
            decoder(files[start : start + CHUNK])
        except BadFiles as error:
            faults += error.faults.values()
    return faults


def _track(items: Iterable[Any], description: str, total: float, *, console: Console) -> Iterable[Any]:
    return show_progress(items, description, total=total, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
