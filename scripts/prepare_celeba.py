"""Says what of CelebA you have and what is missing, checks every image, and packs the training split into a cache.

    python scripts/prepare_celeba.py DIR              # of 128 px, as the preset has it
    python scripts/prepare_celeba.py DIR --size 96
    python scripts/prepare_celeba.py DIR --check      # checks every image and writes nothing

DIR is in any of the three layouts that CelebA is found in: torchvision's, Kaggle's, or the parquet files on Hugging
Face. Nothing is fetched and nothing in DIR is changed. Exit status: 0 all is there, 1 something is missing or bad.
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

# first, so that it prepares for the fastle of its own checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastle.commands.cli import Parser
from fastle.config import ConfigError
from fastle.data import Loading, open_images
from fastle.data.celeba import TRAIN, open_celeba
from fastle.data.decode import BadFiles, DiskFile, ImageFile, TorchvisionDecoder
from fastle.data.images import SPLITS, Split
from fastle.errors import FastleError
from fastle.presets import PRESETS, make_config

WIDTH, HEIGHT = 178, 218
WHOLE: dict[Split, int] = {"train": TRAIN, "valid": 19_867, "test": 19_962}
CHUNK = 256  # images decoded in one call
PARTITION = "list_eval_partition"

SOURCES = """\
Any one of these is enough (by the terms of its makers CelebA is for research that is not commercial):

  torchvision, from Google Drive, which refuses when too many ask: then take another
      pip install gdown
      python -c "from torchvision.datasets import CelebA; CelebA({python}, download=True)"
    or by hand: img_align_celeba.zip (Img) and list_eval_partition.txt (Eval) from the Google Drive of
    https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html to {root}, and then
      unzip -q {shell}/img_align_celeba.zip -d {shell}

  Kaggle
      pip install kaggle
      kaggle datasets download jessicali9530/celeba-dataset -p {shell} --unzip

  Hugging Face, as parquet files
      pip install huggingface_hub pyarrow
      hf download flwrlabs/celeba --repo-type dataset --include "img_align+identity+attr/*" --local-dir {shell}
"""

Track = Callable[[Iterable[Any], str, float], Iterable[Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="prepare_celeba.py",
        allow_abbrev=False,
        description="Says what of CelebA is there and what is missing, checks every image, builds the cache.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="where CelebA is, or is to be")
    preset = PRESETS["celeba"].size
    parser.add_argument(
        "--size", type=int, metavar="N", default=preset, help="of the crop, pixels (default: %(default)s)"
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
    """Does it all.

    Raises:
        FastleError: something is missing, and the message says where it comes from; or images are bad: it lists them.
    """
    if size > WIDTH:
        raise ConfigError(f"--size {size} cannot be: the images of CelebA are {WIDTH}x{HEIGHT}, and are not resized")
    config = make_config("celeba", data=root, size=size).data
    # not DALI, which has to build a pipeline anew for every chunk with a bad image
    decoder = TorchvisionDecoder(size, config.channels, resize=False)
    splits = find(root, decoder)
    say(f"layout: {layout(splits['train'])}")
    for split, files in splits.items():
        part = "" if len(files) == WHOLE[split] else f" (CelebA has {WHOLE[split]:,}: this is not all of it, or not it)"
        say(f"{split}: {len(files):,} images{part}")

    # the cache is built of whole images, so that building it is the check
    checked = {split: files for split, files in splits.items() if check_only or split != "train"}
    bad = [fault for split, files in checked.items() for fault in faults(files, decoder, split, track)]
    if not check_only:
        try:
            open_images(config, "train", Loading(cache="disk", say=say, track=track))
        except BadFiles as error:
            bad += [error.faults[position] for position in sorted(error.faults)]
    if bad:
        advice = "fetch them again, or leave those to train and validate with out by --bad-images skip"
        raise FastleError(f"{len(bad)} bad images: {advice}\n" + "\n".join(f"  {fault}" for fault in bad))
    say(f"all {sum(map(len, splits.values())):,} images are good")
    sized = "" if size == PRESETS["celeba"].size else f" --size {size}"
    if check_only:
        say(f"to build the cache: python scripts/prepare_celeba.py {shlex.quote(str(root))}{sized}")
    say(f"to train: fastle-train celeba --data {shlex.quote(str(root))}{sized}")


def find(root: Path, decoder: TorchvisionDecoder) -> dict[Split, Sequence[ImageFile]]:
    """The encoded images of each split, by the rules of `open_celeba`.

    Raises:
        FastleError: one of the splits is not there or not whole.
    """
    splits: dict[Split, Sequence[ImageFile]] = {}
    missing: list[str] = []
    for split in SPLITS:
        try:
            splits[split] = open_celeba(root, split, decoder).files
        except FastleError as error:
            missing.append(str(error))
    missing += [f"{root}: no image is in the {split} split" for split, files in splits.items() if not files]
    if missing:
        # what is wrong with all splits is said once
        raise FastleError("; ".join(dict.fromkeys(missing)) + "\n\n" + where_from(root))
    return splits


def where_from(root: Path) -> str:
    """The ways to fetch what is missing, with their commands."""
    return SOURCES.format(
        root=root,
        shell=shlex.quote(str(root)),
        python=repr(str(root)),
    )


def layout(files: Sequence[ImageFile]) -> str:
    """Which of the three layouts it is, and where, in words."""
    first = files[0]
    if not isinstance(first, DiskFile):
        return f"Hugging Face's, parquet files in {Path(first.name.split('.parquet')[0]).parent}"
    folder = Path(first.name).parent
    # beside the images, or one or two folders above them
    bases = (folder, *folder.parents[:2])
    partitions = (base / f"{PARTITION}{ending}" for base in reversed(bases) for ending in (".txt", ".csv"))
    partition = next(path for path in partitions if path.exists())
    whose = "torchvision's" if partition.suffix == ".txt" else "Kaggle's"
    return f"{whose}, images in {folder}, partition in {partition}"


def faults(files: Sequence[ImageFile], decoder: TorchvisionDecoder, split: Split, track: Track) -> list[str]:
    """Decodes every image; the file and the fault of each that cannot be used."""
    found: list[str] = []
    starts = range(0, len(files), CHUNK)
    for start in track(starts, f"checking {split}", math.ceil(len(files) / CHUNK)):
        try:
            decoder(files[start : start + CHUNK])
        except BadFiles as error:
            found += [error.faults[position] for position in sorted(error.faults)]
    return found


def _track(items: Iterable[Any], description: str, total: float, *, console: Console) -> Iterable[Any]:
    return show_progress(items, description, total=total, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
