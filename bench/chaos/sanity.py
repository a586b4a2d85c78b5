"""What a run may hold, written here once more, without fastle's own rules: what is accepted must keep to it."""

from __future__ import annotations

import math
from typing import Any

from fastle.config import RunConfig


def insane_rows(rows: list[dict[str, Any]]) -> str:
    """What is insane in rows of metrics, or ""."""
    steps = [row["step"] for row in rows]
    if steps != sorted(set(steps)) or any(type(step) is not int or step < 0 for step in steps):
        return f"the steps of metrics.jsonl are {steps}"
    for row in rows:
        if not all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in row.values()):
            return f"a row is {row}"
    return ""


def insane_config(config: RunConfig) -> str:
    """What is insane in a configuration, or ""."""
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
