"""PTX text → a kernel's parameters, registers and instructions.

Only the grammar that LLVM's NVPTX backend prints for one kernel is understood. What does not fit is a `ParseError` that
shows the statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+\.(?P<type>\w+)\b[^,]*?(?P<name>[\w$]+)\s*(?:,|$)")
_BYTES = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+(?P<name>[\w$]+)\[\d+\]\s*=\s*\{(?P<values>[^}]*)\}")
_SHARED = re.compile(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\]")
_LINE_DIRECTIVE = re.compile(r"^\s*\.loc\b[^\n]*$", re.MULTILINE)
_LABEL = re.compile(r"([\w$]+):(?!:)")
_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)(?P<predicate>[\w%]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*(?P<base>[^\s+\]]+)\s*(?:\+\s*(?P<offset>-?\w+)\s*)?\]")
_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]")


class ParseError(Exception):
    """A statement that is not understood."""


@dataclass(frozen=True, slots=True)
class Register:
    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """An immediate's bits; a negative integer is sign-extended to any width."""

    bits: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A special register, a variable or a function."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    base: Register | Constant | Symbol
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    elements: tuple[Operand, ...]


Operand = Register | Constant | Symbol | Address | Vector


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@!predicate opcode.modifiers operands;` as in `text`; the last modifier is mostly the type."""

    predicate: Register | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel.

    parameters: name → type, in order.
    widths: bits of a register, by the name's letters ("%r" of "%r12"); 1 for predicates.
    labels: index of the instruction that follows.
    constants: bytes of the module's initialised variables.
    shared: the variables that stand for the beginning of shared memory.
    """

    name: str
    parameters: dict[str, str]
    widths: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]
    constants: dict[str, bytes]
    shared: frozenset[str]

    def width(self, register: Register) -> int:
        return self.widths[register_family(register.name)]


def register_family(name: str) -> str:
    return name.rstrip("0123456789") if name.startswith("%") else name


def parse(ptx: str) -> Kernel:
    """The one kernel of a PTX module.

    Raises:
        ParseError: No kernel, more than one, or a statement that is not understood.
    """
    text = _COMMENT.sub("", ptx)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise ParseError(f"a module of one kernel is expected, not of {len(entries)}")
    entry = entries[0]
    parameters = {found["name"]: found["type"] for found in _PARAMETER.finditer(entry["parameters"])}
    constants = {found["name"]: _bytes(found["values"]) for found in _BYTES.finditer(text)}
    kernel = Kernel(entry["name"], parameters, {}, [], {}, constants, frozenset(_SHARED.findall(text)))
    for statement in _LINE_DIRECTIVE.sub("", _block(text, entry.end())).split(";"):
        _add(kernel, statement)
    return kernel


def _bytes(values: str) -> bytes:
    return bytes(int(value) for value in values.split(","))


def _block(text: str, start: int) -> str:
    """What stands between a brace that ends before `start` and the one that closes it."""
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[start : start + found.start()]
    raise ParseError("a kernel's closing brace is missing")


def _add(kernel: Kernel, statement: str) -> None:
    statement = statement.strip()
    # an instruction does not begin with a brace: those are scopes
    while statement:
        label = _LABEL.match(statement)
        if statement[0] in "{}":
            statement = statement[1:].lstrip()
        elif label:
            kernel.labels[label[1]] = len(kernel.instructions)
            statement = statement[label.end() :].lstrip()
        else:
            break
    if statement.startswith(".reg"):
        _declare(kernel, statement)
    elif statement and not statement.startswith((".param", ".pragma")):
        kernel.instructions.append(_instruction(kernel, " ".join(statement.split())))


def _declare(kernel: Kernel, statement: str) -> None:
    kind, names = re.sub(r"^\.reg\s+\.", "", statement).split(None, 1)
    width = 1 if kind == "pred" else int(kind[1:])
    for name in names.split(","):
        family = re.sub(r"<\d+>", "", name.strip())
        if kernel.widths.setdefault(family, width) != width:
            raise ParseError(f"{kernel.name}: registers of two widths share a name: {statement}")


def _instruction(kernel: Kernel, text: str) -> Instruction:
    found = _INSTRUCTION.fullmatch(text)
    if found is None:
        raise ParseError(f"{kernel.name}: not an instruction: {text}")
    opcode, *modifiers = found["opcode"].replace("::cta", "").split(".")
    operands = tuple(_operand(kernel, part) for part in _OPERAND.findall(found["operands"]))
    predicate = Register(found["predicate"]) if found["predicate"] else None
    return Instruction(predicate, bool(found["negated"]), opcode, tuple(modifiers), operands, text)


def _operand(kernel: Kernel, text: str) -> Operand:
    if text[0] in "{(":
        return Vector(tuple(_operand(kernel, part.strip()) for part in text[1:-1].split(",")))
    if text[0] == "[":
        found = _ADDRESS.fullmatch(text)
        base = found and _operand(kernel, found["base"])
        if found is None or isinstance(base, Address | Vector) or base is None:
            raise ParseError(f"{kernel.name}: not an address: {text}")
        return Address(base, int(found["offset"] or "0", 0))
    if text == "_" or register_family(text) in kernel.widths:
        return Register(text)
    if re.fullmatch(r"0[fd][0-9a-fA-F]+", text):
        return Constant(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0))
    if _SPECIAL.fullmatch(text) or re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return Symbol(text)
    raise ParseError(f"{kernel.name}: not an operand: {text}")
