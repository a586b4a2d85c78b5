"""How people set a value: the flag, range and help of a dataclass field, declared at the field and read from there.

The checks of the configuration, the command line, `--help` and the signature of `make_config` all come from these
declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Container, Hashable, Iterable, Mapping
from dataclasses import MISSING, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import FastleError

# far larger than any useful value, and small enough for 64-bit integers and single precision
CAPS: dict[type, float] = {int: 2**31, float: 1e30}
PAIR = "a whole number, or HEIGHTxWIDTH such as 96x128"
SHOWN = 60  # characters of a value in a message
# the argument groups of --help
Group = Literal["data", "model", "objective", "training", "speed", "output"]


class ConfigError(FastleError):
    """A value is out of its range, or has no effect beside the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How people set a value.

    Attributes:
        help: What the value is, as a phrase.
        name: The keyword of `make_config`; the flag is the same with hyphens.
        kind: Int, float, str or bool. A bool's flag takes no value, and has a --no- form too if there is a default.
        optional: Whether None is a value.
        choices: The only values, where they are few.
        above, at_least, at_most, below: Bounds of a number.
        cap: The largest plausible value; larger ones are rejected as typos or damage. `--help` omits it. None: `CAPS`.
        multiple_of: What divides the number.
        many: Whether it is a tuple of such values, all different.
        pair: Whether it may be two such numbers as well, (height, width), which people write HEIGHTxWIDTH.
        default: What holds when nobody sets the value, in words.
        group, metavar: Where and how --help shows the flag.
    """

    help: str
    name: str = ""
    kind: type = str
    optional: bool = False
    choices: tuple[Any, ...] = ()
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    cap: float | None = None
    multiple_of: int | None = None
    many: bool = False
    pair: bool = False
    default: str | None = None
    group: Group = "training"
    metavar: str = "N"

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def annotation(self) -> str:
        """The type of its values, as Python writes it."""
        return f"tuple[{self.kind.__name__}, ...]" if self.many else self.kind.__name__

    @property
    def rule(self) -> str:
        """The choices or the bounds, in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:.4g}" for word, bound in bounds.items() if abs(bound) < math.inf)

    @property
    def text(self) -> str:
        """The help text, with the bounds of a number and the default."""
        bounds = f", {self.rule}" if self.rule and not self.choices else ""
        return self.help + bounds + (f" (default: {self.default})" if self.default else "")

    def check(self, value: Any) -> None:
        """Raises ConfigError for a value of another type, that is not one of the choices, or out of bounds."""
        if value is None and self.optional:
            return
        if self.many:
            self._require(isinstance(value, tuple), "numbers in a list", value)
            for item in value:
                self._check_one(item, item)
            if len(set(value)) < len(value):
                raise ConfigError(f"{self.flag} {self.as_typed(value)} names a value twice")
            return
        if self.choices:
            # True is equal to 1, and 3.0 to 3
            known = any(type(value) is type(choice) and value == choice for choice in self.choices)
            self._require(known, self.rule, value)
            return
        if self.pair and isinstance(value, tuple):
            self._require(len(value) == 2, PAIR, value)
            for side in value:
                self._check_one(side, value)
            return
        self._check_one(value, value)

    def parse(self, text: str) -> Any:
        """What somebody wrote for an option that may be a pair.

        Raises:
            ConfigError: It is neither a whole number nor HEIGHTxWIDTH.
        """
        sides = text.split("x")
        # int takes more than people mean: signs, spaces, underscores, digits of every script
        self._require(len(sides) <= 2 and all(re.fullmatch(r"[0-9]{1,9}", side) for side in sides), PAIR, text)
        return int(text) if len(sides) == 1 else tuple(map(int, sides))

    def as_typed(self, value: Any) -> Any:
        """A value as people type it: HEIGHTxWIDTH for a pair, and several with spaces between."""
        if self.many and isinstance(value, tuple):
            return " ".join(map(str, value)) or "none"
        return pair_text(value) if self.pair else value

    def words(self, value: Any) -> list[str]:
        """The words that follow the flag where it sets a value."""
        return [*map(str, value)] if self.many else [str(self.as_typed(value))]

    def _check_one(self, value: Any, whole: Any) -> None:
        """Raises ConfigError, which shows `whole`, if a value or one of a pair is of another type or out of bounds."""
        # bool is a subclass of int, so compare types exactly; an int is accepted for a float
        types, words = {
            int: ((int,), "a whole number"), float: ((int, float), "a number"), bool: ((bool,), "true or false")
        }.get(self.kind, ((str,), "text"))  # fmt: skip
        self._require(type(value) in types, words, whole)
        if self.kind in (int, float):
            inside = self.above < value < self.below and self.at_least <= value <= self.at_most
            self._require(inside and abs(value) < math.inf, self.rule or "finite", whole)
            cap = CAPS[self.kind] if self.cap is None else self.cap
            bounded = min(self.at_most, self.below) < math.inf
            self._require(bounded or value <= cap, f"at most {cap:,}", whole)
            if self.multiple_of is not None:
                nearest = max(1, round(value / self.multiple_of)) * self.multiple_of
                rule = f"divisible by {self.multiple_of}, such as {nearest}"
                self._require(value % self.multiple_of == 0, rule, whole)

    def _require(self, ok: bool, rule: str, value: Any) -> None:
        if not ok:
            raise ConfigError(f"{self.flag} must be {rule}, not {shown(self.as_typed(value))}")


def pair_text(value: Any) -> Any:
    """A pair as people write it, HEIGHTxWIDTH; another value as it is."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """A value for a message: in one line, and short, whatever a file holds."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:
        # Python converts no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def option(text: str, *, initial: Any = MISSING, **about: Any) -> Any:
    """A dataclass field that people can set.

    Args:
        text: The option's help.
        initial: The field's default; none, if the preset decides.
        about: The option's other attributes. Its kind and choices follow from the annotation, its name from the field's
            and its default from `initial`, unless they are given.
    """
    return dataclasses.field(default=initial, metadata={"option": Option(help=text, **about)})


def options_of(section: type) -> Mapping[str, Option]:
    """The options of a dataclass by the names of their fields."""
    return _options_of(section)


@functools.cache
def _options_of(section: Hashable) -> Mapping[str, Option]:
    assert isinstance(section, type)
    hints, options = get_type_hints(section), {}
    for field in dataclasses.fields(section):
        if "option" not in field.metadata:
            continue
        made: Option = field.metadata["option"]
        hint = hints[field.name]
        default = "the preset's" if field.default in (MISSING, None) else str(field.default)
        options[field.name] = replace(
            made,
            name=made.name or field.name,
            kind=next(kind for kind in (bool, int, float, str) if kind in (hint, *get_args(hint), str)),
            optional=type(None) in get_args(hint),
            choices=made.choices or (get_args(hint) if get_origin(hint) is Literal else ()),
            default=default if made.default is None else made.default,
        )
    return options


Section = TypeVar("Section", bound="Checked")


class Checked:
    """A dataclass whose options are checked when it is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, made in options_of(type(self)).items():
            value = getattr(self, name)
            if made.many and isinstance(value, list):
                # JSON knows no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            # a transformation has checked itself
            if not dataclasses.is_dataclass(value):
                made.check(value)


def pick(section: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, out of settings by the names of their options."""
    return {field: settings[made.name] for field, made in options_of(section).items() if made.name in settings}


def from_fields(
    section: type[Section], values: Mapping[str, Any], decided: Mapping[str, Any] = MappingProxyType({})
) -> Section:
    """Makes a dataclass from the fields that a file holds, and from those that are decided already.

    Raises:
        ConfigError: A field is missing, unknown or out of range.
    """
    # mypy does not know that all of them are dataclasses
    declared = dataclasses.fields(section)  # type: ignore[arg-type]
    fields = {field.name: field for field in declared if field.name not in decided}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    check_names(section.__name__, values, required=required, known=fields)
    return section(**values, **decided)


def check_names(
    what: str, values: object, *, required: Iterable[str] = (), known: Container[str] | None = None
) -> None:
    """Raises ConfigError if something read from a file is no object, or lacks a field, or has one that is unknown."""
    fault = None
    if not isinstance(values, Mapping):
        fault = f"{what} is {shown(values)}, not an object with fields"
    elif missing := [name for name in required if name not in values]:
        fault = f"{what} lacks {', '.join(missing)}"
    elif known is not None and (unknown := [name for name in values if name not in known]):
        fault = f"{what} has an unknown field {shown(unknown[0])}"
    if fault:
        raise ConfigError(f"not a configuration of this version of fastle: {fault}")
