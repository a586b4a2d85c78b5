"""Saves the moving picture docs/brush.webp: cells of one image's latent are painted onto another's, in the page itself.

python scripts/draw_brush.py FILE.webp FOLDER

It needs Chromium, the extra dev, and the folder skimage/data of scikit-image, which carries two photographs in the
public domain: Eileen Collins (NASA) is A, and the cat Chelsea (Stefan van der Walt, CC0) is B.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Page

ROOT = Path(__file__).resolve().parents[1]
FACES = {"astronaut.png": (110, 0, 366, 256), "chelsea.png": (75, 0, 375, 300)}  # left, top, right, bottom
CELLS = 16  # of a side of the latent of cifar10-6x at 128 px
# cells in the order in which they are painted, as (row, column): to and fro over the middle of the face
PATH = [(row, column if row % 4 == 1 else 15 - column) for row in (5, 7, 9, 11) for column in range(4, 13, 2)]
MARGIN = 16  # pixels around the panel
MOVING, RESTING = 260, 1300  # milliseconds that a frame is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("Chromium is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from fastle.commands.main import main; main(['brush'])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            address = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            with sync_playwright() as playwright:
                arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
                page = browser.new_page(viewport={"width": 1180, "height": 1300}, device_scale_factor=1.25)
                page.goto(address)
                frames = paint(page, [portrait(flags.folder / "astronaut.png"), portrait(flags.folder / "chelsea.png")])
                browser.close()
        finally:
            server.terminate()
    first, *others = [frame for frame, _ in frames]
    durations = [duration for _, duration in frames]
    first.save(flags.file, append_images=others, duration=durations, loop=0, quality=75, method=6)


def portrait(path: Path) -> FilePayload:
    """A photograph as a file to choose, cut to the face in it."""
    encoded = io.BytesIO()
    Image.open(path).crop(FACES[path.name]).save(encoded, "PNG")
    return {"name": path.name, "mimeType": "image/png", "buffer": encoded.getvalue()}


def paint(page: Page, images: list[FilePayload]) -> list[tuple[Image.Image, int]]:
    """The frames, and for how many milliseconds each is shown."""
    page.set_input_files("#files", images)
    page.wait_for_selector(".card:nth-child(10)")
    page.locator(".card input[name=source]").nth(9).check()
    frames = [(shot(page), RESTING)]
    box = page.locator("#brush-map canvas").bounding_box()
    assert box is not None

    def move(row: int, column: int) -> None:
        page.mouse.move(
            box["x"] + (column + 0.5) * box["width"] / CELLS, box["y"] + (row + 0.5) * box["height"] / CELLS
        )

    move(*PATH[0])
    page.mouse.down()
    for place in PATH:
        move(*place)
        frames.append((shot(page), MOVING))
    page.mouse.up()
    frames.append((shot(page), RESTING))
    page.locator("input[name=tool][value=restore]").check()
    move(*PATH[-1])
    page.mouse.down()
    for place in PATH[::-1]:
        move(*place)
        frames.append((shot(page), MOVING // 2))
    page.mouse.up()
    return frames


def shot(page: Page) -> Image.Image:
    """The large picture, the latent and B."""
    page.wait_for_selector("[aria-busy]", state="detached")
    box = page.locator("#brush .stages").bounding_box()
    assert box is not None
    left, top = box["x"] - MARGIN, box["y"] - MARGIN
    width, height = box["width"] + 2 * MARGIN, box["height"] + 2 * MARGIN
    png = page.screenshot(clip={"x": left, "y": top, "width": width, "height": height}, full_page=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


if __name__ == "__main__":
    main()
