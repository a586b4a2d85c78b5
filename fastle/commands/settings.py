"""A run's settings in a TOML file: `--config` reads it and `--print-config` writes it; without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from fastle.config import OPTIONS, ConfigError, RunConfig
from fastle.options import Group, Option
from fastle.presets import overrides_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_settings(path: Path, flags: Mapping[str, Option]) -> dict[str, Any]:
    """The settings of a TOML file, checked, by the names of the options.

    Args:
        path: The file. Its keys are flags without their hyphens in front, alone or in tables named as the groups of
            --help; "-" and "_" mean the same.
        flags: What it may hold beside the settings of a configuration.

    Raises:
        ConfigError: The file cannot be read, or a key is unknown, appears twice or has a value that is not allowed.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no TOML: {error}") from None
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += value.items() if key in get_args(Group) and isinstance(value, dict) else [(key, value)]
    known = {**OPTIONS, **flags}
    settings: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0].replace('_', '-')}?" if close else "fastle-train --help lists the settings"
            raise ConfigError(f"{path}: there is no setting {key}: {hint}")
        if name in settings:
            raise ConfigError(f"{path}: {key} stands there twice")
        try:
            settings[name] = _checked(known[name], value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return settings


def _checked(option: Option, value: Any) -> Any:
    value = tuple(value) if option.many and isinstance(value, list) else value
    value = option.parse(value) if option.pair and isinstance(value, str) else value
    option.check(value)
    # turn 1 into 1.0, so that config.json does not depend on how it was written
    return float(value) if option.kind is float and type(value) is int else value


def settings_text(config: RunConfig) -> str:
    """A configuration as TOML that `read_settings` reads. What follows from other settings is commented out."""
    chosen = overrides_of(config)
    # the command line knows no other configurations
    assert chosen is not None
    groups: dict[str, dict[str, Any]] = {group: {} for group in config.settings()}
    for group, values in config.settings().items():
        groups[group] |= values
    for name, value in chosen.items():
        groups[OPTIONS[name].group].setdefault(name, value)
    lines = ["# what is commented out follows from the other settings"]
    for group, values in groups.items():
        lines += ["", f"[{group}]"]
        for name, value in values.items():
            mark = "" if name in chosen or name == "dataset" else "# "
            written = value if OPTIONS[name].many else OPTIONS[name].as_typed(value)
            lines.append(f"{mark}{name.replace('_', '-')} = {_toml(written)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON writes text, numbers, true and false as TOML does
    return json.dumps(value, ensure_ascii=False)
