"""Mutations of the files of a run: of any bytes, of JSON, of lines of JSON and of checkpoints."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from fastle.checkpoint import with_checksum

SIGNED = ", signed"  # of a mutation that renews the checksums
# what a field may become
VALUES = (
    b"null", b"true", b"false", b"-1", b"0", b"1", b"32.0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity",
    b"9223372036854775808", b"9" * 30, b"9" * 5000, b"1e308", b"1e-320", b'""', b'"x"', b'"\\u0000"', b'"\\ud800"',
    b"[]", b"{}", b"[[]]", b'{"name": "noise"}', b'"' + b"A" * 10_000 + b'"', b"[" * 2000 + b"]" * 2000,
    b"[" * 200_000, b"2147483648", b"1073741824", b"1000000",
)  # fmt: skip


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        bit = random.randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _remove(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + data[at + random.choice((1, 7, 100)) :]


def _repeat(data: bytes, random: Random) -> bytes:
    at, length = random.randrange(len(data)), random.choice((1, 8, 500))
    return data[:at] + data[at : at + length] * random.choice((2, 9)) + data[at + length :]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 8, 64))) + data[at:]


def _zeros(data: bytes, random: Random) -> bytes:
    at, length = random.randrange(len(data)), random.choice((1, 512, 4096))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields and elements within a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


def _field(data: bytes, random: Random) -> bytes:
    """Another value for one field of a JSON text, or no value, or another name."""
    values = json.loads(data)
    path = random.choice(_places(values))
    place = values
    for key in path[:-1]:
        place = place[key]
    how = random.random()
    if how < 0.1:
        del place[path[-1]]
        return json.dumps(values).encode()
    if how < 0.2 and isinstance(place, dict):
        place[random.choice(("x", "", "size", "format", "name", "\0"))] = place.pop(path[-1])
        return json.dumps(values).encode()
    place[path[-1]] = "@@"
    return json.dumps(values).encode().replace(b'"@@"', random.choice(VALUES), 1)


def _line(data: bytes, random: Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    lines[at] = _field(lines[at], random).rstrip() + b"\n" if random.random() < 0.8 else random.choice(lines)
    return b"".join(lines)


def _header(data: bytes, random: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = _field(data[8 : 8 + length].rstrip(), random)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _length(data: bytes, random: Random) -> bytes:
    length = random.choice((0, 1, len(data), 2**18, 2**32, 2**63 - 1, 2**64 - 1, random.randrange(2**16)))
    return length.to_bytes(8, "little") + data[8:]


def _metadata(data: bytes, random: Random) -> bytes:
    """Another value for a field of the metadata, with its checksum renewed."""
    return _rewritten(data, lambda text: _field(text, random))


def _numbers(data: bytes, random: Random) -> bytes:
    """Other numbers in a tensor, with the checksum of its section renewed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"})
    start, end = header[random.choice(names)]["data_offsets"]
    changed = bytearray(data)
    special = random.choice((math.nan, math.inf, -1.0, 1e30, 0.0, 0.5))
    at = 8 + length + random.randrange(start, end, 4)
    changed[at : at + 4] = torch.tensor(special).numpy().tobytes()
    return _rewritten(bytes(changed), _renew_sections(header, bytes(changed[8 + length :])))


def _tensors(data: bytes, random: Random) -> bytes:
    """Another name, type or shape of a tensor, with all checksums renewed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = random.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header.pop(name)
    how = random.randrange(3)
    if how == 0:
        name = random.choice(("model.x", "optimizer.x.step", "optimizer.99.exp_avg", "x", "judge.x", "optimizer.0.x.y"))
    elif how == 1:
        entry["dtype"] = random.choice(("I32", "F32", "U8", "F16", "X")) if entry["dtype"] != "I32" else "F32"
    else:
        entry["shape"] = random.choice((entry["shape"][::-1], [1, *entry["shape"]], [math.prod(entry["shape"])], []))
    header[name] = entry
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return _rewritten(whole, _renew_sections(header, data[8 + length :]))


def _renew_sections(header: dict[str, Any], body: bytes) -> Callable[[bytes], bytes]:
    types = {"F32": "float32", "I64": "int64", "I32": "int32", "U8": "uint8", "F16": "float16"}

    def renew(text: bytes) -> bytes:
        sums: dict[str, int] = {}
        for name in sorted(header.keys() - {"__metadata__"}):
            section, _, rest = name.partition(".")
            entry = header[name]
            about = f"{rest} torch.{types.get(entry['dtype'])} {tuple(entry['shape'])}\n".encode()
            start, end = entry["data_offsets"]
            sums[section] = zlib.crc32(body[start:end], zlib.crc32(about, sums.get(section, 0)))
        return json.dumps(json.loads(text) | {"checksums": sums}).encode()

    return renew


def _rewritten(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header["__metadata__"]["fastle"].partition(" ")[2].encode())
    header["__metadata__"] = {"fastle": with_checksum(text.decode())}
    whole = json.dumps(header).encode()
    return len(whole).to_bytes(8, "little") + whole + data[8 + length :]


Mutation = tuple[str, Callable[[bytes, Random], bytes]]
ANY: list[Mutation] = [
    ("flipped bits", _flip), ("a cut", _cut), ("a gap", _remove), ("a repetition", _repeat), ("an insertion", _insert),
    ("zeros", _zeros),
]  # fmt: skip
MUTATIONS: dict[str, list[Mutation]] = {
    ".json": [*ANY, *4 * [("another field", _field)]],
    ".jsonl": [*ANY, *4 * [("another line", _line)]],
    ".safetensors": [
        *ANY, ("another header", _header), ("another header", _header), ("another length", _length),
        (f"other metadata{SIGNED}", _metadata), (f"other metadata{SIGNED}", _metadata),
        (f"other numbers{SIGNED}", _numbers), (f"other tensors{SIGNED}", _tensors),
    ],
}  # fmt: skip
