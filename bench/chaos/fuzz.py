"""Mutates the files of a run, and sees what fastle makes of them.

A mutation is found (one line that names the file), harmless (what was read is what was written), or one of these:

    traceback           an error that is not fastle's, or more than a line
    accepted nonsense   something else was read than what was written, and it is not sane
    memory              reading took more than twice the file's size, and `SLACK`

Some mutations renew the checksums, as a program that is wrong would: then what is accepted must be sane, by rules that
are written here once more, without fastle's own.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastle.checkpoint import load_checkpoint, newest_good_checkpoint, read_run_config, save_checkpoint, signed
from fastle.config import RunConfig
from fastle.errors import FastleError
from fastle.method.pretrained import of_run
from fastle.presets import make_config
from fastle.training.report import check_metrics
from fastle.training.trainer import Trainer

SLACK = 8 * 2**20  # bytes: what Python and torch keep for themselves
LONGEST = 700  # characters of a message
STEP = 3
SIGNED = ", signed"  # of a mutation that renews the checksums
# what a field may become
VALUES = (
    b"null", b"true", b"false", b"-1", b"0", b"1", b"32.0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity",
    b"9223372036854775808", b"9" * 30, b"9" * 5000, b"1e308", b"1e-320", b'""', b'"x"', b'"\\u0000"', b'"\\ud800"',
    b"[]", b"{}", b"[[]]", b'{"name": "noise"}', b'"' + b"A" * 10_000 + b'"', b"[" * 2000 + b"]" * 2000,
    b"[" * 200_000, b"2147483648", b"1073741824", b"1000000",
)  # fmt: skip


@dataclass
class Outcome:
    """What became of the cases so far."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    most_memory: float = 0

    def add(self, kind: str, case: int, mutation: str, detail: str = "") -> None:
        """Counts a case; those that must not be are kept with what is needed to repeat them."""
        self.counts[kind] += 1
        if kind not in ("found", "harmless"):
            self.faults.append({"kind": kind, "case": case, "mutation": mutation, "detail": detail[:300]})


class Bench:
    """A small run directory, and what fastle reads from it."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.config = make_config(
            "shapes",
            size=16,
            hidden=4,
            map_channels=4,
            latent=6,
            batch_size=4,
            slices=8,
            steps=9,
            masked=True,
            precision="fp32",
        )
        self.trainer = Trainer(self.config, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEP):
            self.trainer(torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=generator))
        self.run.mkdir()
        (self.run / "config.json").write_text(json.dumps({"format": "fastle run", **self.config.to_dict()}, indent=2))
        rows = [json.dumps({"step": step, "total": 1 / step, "images_per_second": None}) for step in range(1, 9)]
        (self.run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        metadata = {"step": STEP, "train_images": 12_000, "config": self.config.to_dict()}
        self.checkpoint = save_checkpoint(self.run, STEP, self.trainer.state(), metadata)
        self.saved = load_checkpoint(self.checkpoint)
        self.files = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}

    def restore(self) -> None:
        """Puts every file back."""
        shutil.rmtree(self.run)
        for path, content in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def read(self, *, signed: bool = False) -> str:
        """Reads everything as a resumed run and an evaluation would, and says what is insane in it, or "".

        Args:
            signed: Whether tensors and metadata may be others than those that were written.

        Raises:
            FastleError: Something was refused.
        """
        rows, damaged = check_metrics(self.run / "metrics.jsonl")
        if damaged:
            raise FastleError(f"{len(damaged)} lines of metrics.jsonl are damaged")
        config = read_run_config(self.run)
        model, checkpoint, _ = of_run(self.run, "cpu")
        whole, _ = newest_good_checkpoint(self.run, self.trainer.check)
        if differences := [text for text in self.config.differences(config) if not text.startswith("data.root ")]:
            return f"the configuration is another: {differences}"
        if not signed and (whole.metadata != self.saved.metadata or not _equal(whole.tensors, self.saved.tensors)):
            return "the checkpoint is another than the one that was written"
        return (
            _insane_rows(rows)
            or _insane_config(config)
            or self._insane_state(whole.tensors, whole.metadata)
            or self._insane_state({f"model.{n}": t for n, t in model.state_dict().items()}, checkpoint.metadata)
        )

    def _insane_state(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
        for name, tensor in tensors.items():
            saved = self.saved.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                return f"{name} is not the model's"
            if not tensor.isfinite().all():
                return f"{name} is not finite"
            if name.endswith(".exp_avg_sq") and tensor.min() < 0:
                return f"{name} is negative"
            if name.endswith(".step") and not 0 <= tensor <= metadata["step"]:
                return f"{name} is {tensor}"
        if type(metadata["step"]) is not int or metadata["step"] != STEP:
            return f"step is {metadata['step']}"
        images = metadata.get("train_images", 1)
        return "" if type(images) is int and 0 <= images < 2**53 else f"train_images is {images}"


def fuzz(folder: Path, *, cases: int, seed: int, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Reads so many mutated run directories. `folder` is empty and for this alone."""
    bench, outcome = Bench(folder), Outcome()
    assert bench.read() == ""
    for case in range(cases):
        random = Random(f"{seed}-{case}")
        path = random.choice(
            [bench.checkpoint, bench.checkpoint, bench.run / "config.json", bench.run / "metrics.jsonl"]
        )
        name, mutate = random.choice(MUTATIONS[path.suffix])
        content = mutate(bench.files[path], random)
        path.write_bytes(content)
        _read_once(bench, outcome, case, f"{name} of {path.name}", len(content))
        path.write_bytes(bench.files[path])
        if case % 1000 == 999:
            say(f"{case + 1:,} of {cases:,} mutations: {dict(outcome.counts)}")
    return {
        "cases": cases,
        "seed": seed,
        **{kind: outcome.counts[kind] for kind in ("found", "harmless", "traceback", "accepted nonsense", "memory")},
        "most_memory_over_twice_the_file": round(outcome.most_memory),
        "faults": outcome.faults,
    }


def flip_bits(folder: Path, *, cases: int, seed: int) -> dict[str, Any]:
    """Flips one bit of a checkpoint at a time, anywhere in it, and counts those that are found."""
    bench, missed = Bench(folder), []
    data = bench.files[bench.checkpoint]
    for bit in Random(seed).sample(range(8 * len(data)), min(cases, 8 * len(data))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        bench.checkpoint.write_bytes(changed)
        try:
            load_checkpoint(bench.checkpoint)
            missed.append(bit)
        except FastleError:
            continue
    return {"flipped": cases, "found": cases - len(missed), "missed": missed}


def _read_once(bench: Bench, outcome: Outcome, case: int, mutation: str, size: int) -> None:
    before = _resident(reset=True)
    try:
        insane = bench.read(signed=SIGNED in mutation)
        kind, detail = ("accepted nonsense", insane) if insane else ("harmless", "")
    except FastleError as error:
        text = str(error)
        tidy = "\n" not in text and len(text) <= LONGEST and text.isprintable()
        kind, detail = ("found", "") if tidy else ("traceback", text)
    except Exception as error:  # noqa: BLE001 (what fastle did not foresee is what is looked for)
        kind, detail = "traceback", repr(error)
    outcome.add(kind, case, mutation, detail)
    used = _resident(peak=True) - before - 2 * size
    outcome.most_memory = max(outcome.most_memory, used)
    if used > SLACK:
        outcome.add("memory", case, mutation, f"{used:,} bytes more than twice the file's {size:,}")


def _resident(*, reset: bool = False, peak: bool = False) -> int:
    """Bytes of memory that this process holds, or held at most since it was reset. 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    name = "VmHWM:" if peak else "VmRSS:"
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _insane_rows(rows: list[dict[str, Any]]) -> str:
    steps = [row["step"] for row in rows]
    if steps != sorted(set(steps)) or any(type(step) is not int or step < 0 for step in steps):
        return f"the steps of metrics.jsonl are {steps}"
    for row in rows:
        if not all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in row.values()):
            return f"a row is {row}"
    return ""


def _insane_config(config: RunConfig) -> str:
    values = config.to_dict()
    numbers = {
        ("model", "size"): (8, 10_000), ("model", "hidden"): (1, 2**31), ("model", "map_channels"): (1, 2**31),
        ("model", "latent"): (1, 2**31), ("objective", "slices"): (1, 2**31), ("train", "batch_size"): (2, 2**31),
        ("train", "seed"): (0, 2**63 - 1),
    }  # fmt: skip
    for (section, name), (least, most) in numbers.items():
        value = values[section][name]
        if value is not None and (type(value) is not int or not least <= value <= most):
            return f"{section}.{name} is {value!r}"
    for section, name in (("train", "lr"), ("objective", "hole_ratio"), ("objective", "sigreg_weight")):
        value = values[section][name]
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1e30):
            return f"{section}.{name} is {value!r}"
    lengths = [values["train"]["steps"], values["train"]["epochs"]]
    if lengths.count(None) != 1 or not all(type(n) is int and 1 <= n <= 2**31 for n in lengths if n is not None):
        return f"steps and epochs are {lengths}"
    root = values["data"]["root"]
    if root is not None and (not isinstance(root, str) or "\0" in root):
        return f"data.root is {root!r}"
    if values["model"]["size"] != values["data"]["size"] or values["model"]["channels"] != values["data"]["channels"]:
        return "the model's images are not the data's"
    return ""


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
    header["__metadata__"] = {"fastle": signed(text.decode())}
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
