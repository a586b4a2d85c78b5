#!/usr/bin/env python
"""Cuts tiles of 128 px from the photographs in Debian's packages of backgrounds, to train on freely licensed images.

    apt-get download gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds ukui-wallpapers
    for package in *.deb; do dpkg-deb --extract "$package" photographs; done
    python scripts/cut_tiles.py photographs tiles

Every sixth photograph goes to tiles/test, the others to tiles/train, each at three scales.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

SIDE = 128
SHORTER_SIDES = (128, 256, 512)  # of the photograph, before it is cut
LEAST = 700  # pixels of the shorter side, and BYTES of the file: below, it is an icon or a pattern
BYTES = 150_000
# drawings, and patterns that repeat
DRAWN = ("GreenTraditional", "Elephants_", "Painting", "2004default", "firstgeneration", "string", "rhythm")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cut tiles of 128 px from photographs.", allow_abbrev=False)
    parser.add_argument("photographs", type=Path, help="a folder of JPEG files, searched to the bottom")
    parser.add_argument("tiles", type=Path, help="the folder to make, with train/ and test/ in it")
    options = parser.parse_args()
    if options.tiles.exists():
        sys.exit(f"cut_tiles.py: error: {options.tiles} is there already: give another folder")
    photographs = _photographs(options.photographs)
    if not photographs:
        sys.exit(f"cut_tiles.py: error: {options.photographs} holds no photograph of {LEAST} px and {BYTES:,} bytes")
    for split in ("train", "test"):
        (options.tiles / split).mkdir(parents=True)
    for number, path in enumerate(photographs):
        _cut(path, options.tiles / ("test" if number % 6 == 5 else "train"))
    counts = {split: len(list((options.tiles / split).iterdir())) for split in ("train", "test")}
    print(f"{len(photographs)} photographs: {counts['train']} tiles in train/, {counts['test']} in test/")


def _photographs(folder: Path) -> list[Path]:
    # packages hold some photographs twice, under one name
    by_name = {
        path.name: path
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg")
        and path.stat().st_size > BYTES
        and not any(word in path.name for word in DRAWN)
    }
    return sorted(by_name.values())


def _cut(path: Path, folder: Path) -> None:
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    if min(photograph.size) < LEAST:
        return
    for shorter in SHORTER_SIDES:
        scale = shorter / min(photograph.size)
        width, height = (round(side * scale) for side in photograph.size)
        small = photograph.resize((width, height), Image.Resampling.LANCZOS)
        for top in range(0, height - SIDE + 1, SIDE):
            for left in range(0, width - SIDE + 1, SIDE):
                tile = small.crop((left, top, left + SIDE, top + SIDE))
                tile.save(folder / f"{path.stem}-{shorter}-{top}-{left}.png")


if __name__ == "__main__":
    main()
