"""Pictures to try a model on: made here, so that they may go wherever fastle goes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

CANVAS = 1024  # pixels on which the pictures are made before they are made smaller
Point = tuple[float, float]


def make_pictures(size: int, channels: int) -> Tensor:
    """Makes the pictures of `PICTURES`: uint8 (8, channels, size, size).

    Args:
        size: Height and width, pixels.
        channels: 3 for RGB, 1 for grey.
    """
    made = []
    for make in PICTURES.values():
        canvas = Image.new("RGB", (CANVAS, CANVAS))
        make(ImageDraw.Draw(canvas))
        picture = canvas.convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BOX)
        made.append(np.array(picture).reshape(size, size, channels))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def _sunset(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (44, 52, 104), (247, 160, 92), 0, 640)
    _disc(draw, (560, 560), 130, (255, 226, 150))
    _gradient(draw, (150, 92, 100), (30, 34, 66), 640, CANVAS)
    for i, width in enumerate((300, 220, 260, 150)):
        y = 690 + 80 * i
        draw.rectangle((560 - width / 2, y, 560 + width / 2, y + 16), fill=(250, 196, 128))


def _hills(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (128, 186, 232), (222, 238, 246), 0, CANVAS)
    _disc(draw, (230, 220), 100, (255, 240, 180))
    for base, height, phase, colour in ((560, 110, 0.4, (132, 168, 150)), (720, 90, 2.2, (84, 136, 92))):
        edge = [(x, base - height * math.sin(phase + x / 170)) for x in range(0, CANVAS + 1, 8)]
        draw.polygon([*edge, (CANVAS, CANVAS), (0, CANVAS)], fill=colour)
    draw.polygon([(430, CANVAS), (560, CANVAS), (640, 760), (610, 760)], fill=(214, 196, 150))


def _house(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (172, 210, 238), (236, 240, 238), 0, 740)
    draw.rectangle((0, 740, CANVAS, CANVAS), fill=(112, 150, 84))
    draw.rectangle((270, 430, 760, 800), fill=(236, 222, 196))
    draw.polygon([(210, 440), (515, 190), (820, 440)], fill=(168, 62, 50))
    draw.rectangle((460, 590, 580, 800), fill=(92, 62, 48))
    for x in (320, 630):
        draw.rectangle((x, 520, x + 90, 610), fill=(96, 140, 176))


def _flower(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (40, 84, 62), (22, 48, 42), 0, CANVAS)
    draw.line([(512, 480), (560, CANVAS)], fill=(96, 158, 78), width=42)
    for i in range(8):
        angle = i * math.pi / 4
        _disc(draw, (512 + 190 * math.cos(angle), 430 + 190 * math.sin(angle)), 120, (236, 122, 160))
    _disc(draw, (512, 430), 130, (250, 206, 84))


def _face(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (96, 128, 160), (58, 80, 110), 0, CANVAS)
    draw.ellipse((250, 700, 774, 1300), fill=(178, 66, 62))
    draw.rectangle((450, 640, 574, 780), fill=(206, 158, 124))
    draw.ellipse((300, 150, 724, 730), fill=(226, 180, 146))
    draw.pieslice((280, 110, 744, 620), 180, 360, fill=(70, 46, 36))
    for x in (420, 604):
        _disc(draw, (x, 430), 34, (250, 250, 246))
        _disc(draw, (x, 430), 18, (48, 62, 84))
    draw.arc((420, 480, 604, 630), 20, 160, fill=(150, 60, 62), width=22)


def _boat(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (206, 226, 238), (246, 240, 226), 0, 620)
    _gradient(draw, (58, 128, 150), (24, 70, 100), 620, CANVAS)
    draw.polygon([(230, 640), (800, 640), (700, 790), (330, 790)], fill=(132, 52, 40))
    draw.rectangle((500, 190, 522, 640), fill=(82, 60, 46))
    draw.polygon([(540, 210), (540, 600), (790, 600)], fill=(248, 244, 234))
    draw.polygon([(484, 270), (484, 600), (290, 600)], fill=(226, 150, 62))


def _tiles(draw: ImageDraw.ImageDraw) -> None:
    colours = ((232, 222, 200), (196, 84, 62), (54, 92, 120), (226, 172, 78))
    for row in range(4):
        for column in range(4):
            x, y = 256 * column, 256 * row
            draw.rectangle((x, y, x + 256, y + 256), fill=colours[(row + 2 * column) % 4])
            _disc(draw, (x + 128, y + 128), 76, colours[(row + 2 * column + 2 + row % 2) % 4])


def _rings(draw: ImageDraw.ImageDraw) -> None:
    _gradient(draw, (30, 26, 44), (62, 40, 78), 0, CANVAS)
    for radius, colour in ((430, (236, 92, 84)), (320, (248, 190, 96)), (210, (94, 186, 160)), (100, (84, 132, 206))):
        _disc(draw, (512, 512), radius, colour)
        _disc(draw, (512, 512), radius - 56, (38, 30, 54))


def _disc(draw: ImageDraw.ImageDraw, centre: Point, radius: float, colour: tuple[int, int, int]) -> None:
    draw.ellipse((centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius), fill=colour)


def _gradient(
    draw: ImageDraw.ImageDraw, above: tuple[int, int, int], below: tuple[int, int, int], start: int, stop: int
) -> None:
    for y in range(start, stop):
        share = (y - start) / (stop - start)
        colour = tuple(round((1 - share) * a + share * b) for a, b in zip(above, below, strict=True))
        draw.line([(0, y), (CANVAS, y)], fill=colour)


PICTURES: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "Sunset": _sunset, "Hills": _hills, "House": _house, "Flower": _flower,
    "Face": _face, "Boat": _boat, "Tiles": _tiles, "Rings": _rings,
}  # fmt: skip
