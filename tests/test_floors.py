"""Nothing imports upward: the floors of CONTRIBUTING, from the ground to the commands, and the folders around them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a room may import from itself and from the rooms of lower floors
FLOORS = (
    ("errors",),
    ("extras", "files", "folders", "options"),
    ("choices", "config"),
    ("checkpoint", "hub", "lengths", "machine", "phases", "kernels"),
    ("method",),
    ("presets", "data"),
    ("training",),
    ("profiling", "fitting", "web"),
    ("commands",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# an operator knows tensors only
STRICT = {"kernels": ("kernels",)}
FILES = sorted(p for folder in ("fastle", "kernels") for p in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if "kernels" in parts[:2] else parts[1]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, also inside of functions."""
    # kernels/x.py is fastle.kernels.x
    package = ("fastle", *path.relative_to(ROOT).parent.parts[path.is_relative_to(ROOT / "fastle") :])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *((node.module,) if node.module else ())))
            names |= {f"{start}.{alias.name}" for alias in node.names}
    assert not any(name.split(".")[0] in ("bench", "examples", "scripts", "tests") for name in names), (
        "the package stands alone"
    )
    return {name.split(".")[1] for name in names if name.startswith("fastle.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    allowed = STRICT.get(room, tuple(name for name, height in FLOOR.items() if height < FLOOR[room] or name == room))
    assert imported_rooms(path) <= set(allowed)


def test_every_room_has_a_floor() -> None:
    # data: the models that ship, and the marker of types
    files = [path for path in (ROOT / "fastle").iterdir() if path.name not in ("weights", "py.typed")]
    rooms = {path.stem for path in files if path.name[0] not in "_."}
    assert rooms == set(FLOOR)
