"""What PTX instructions compute, for all threads at once: functions of arrays by the name of the instruction.

Approximations (`div.full`, `ex2.approx`, …) are computed to one rounding. A fused multiply-add of fp32 is rounded once,
except where a sum rounded to fp64 is a tie in fp32; one of fp64 is rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.parser import Instruction

Array = npt.NDArray[Any]
# the value of the operand at an index, as a type
Read = Callable[[int, str], Array]

DTYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
} | {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
# of an instruction's name, what does not change the result here
IGNORED = {"rn", "ftz", "approx", "full", "uni"}


class UnknownInstruction(Exception):
    """An instruction that the executor does not have."""


def operation(instruction: Instruction) -> str:
    """The name without types and roundings: "mul.wide" of mul.wide.s32, "fma" of fma.rn.f32."""
    return ".".join([instruction.opcode, *(m for m in instruction.modifiers[:-1] if m not in IGNORED)])


def compute(instruction: Instruction, read: Read) -> Array:
    """The value that an instruction writes to its first operand, an array of the type of the result.

    Raises:
        UnknownInstruction: One that is not had here.
    """
    name, kind = operation(instruction), instruction.modifiers[-1] if instruction.modifiers else ""
    if instruction.opcode == "setp":
        return _compare(instruction, read)
    if instruction.opcode == "cvt":
        return _convert(instruction, read)
    if name == "selp":
        return np.where(read(3, "pred"), read(1, kind), read(2, kind))
    if kind == "f32x2" and name in FLOAT:
        return _packed(FLOAT[name], instruction, read)
    if kind in ("f32", "f64") and name in FLOAT:
        return _float(FLOAT[name], instruction, read)
    if kind in HALVES and name in MIXED:
        return _mixed(instruction, read)
    if kind == "pred" and name in PREDICATE:
        return PREDICATE[name](*_sources(instruction, read, "pred"))
    if kind in DTYPES and DTYPES[kind].kind in "iu":
        if name in INTEGER:
            return INTEGER[name](*_sources(instruction, read, kind))
        if name in SPECIAL:
            return SPECIAL[name](read, kind)
    raise UnknownInstruction("unknown instruction")


def _sources(instruction: Instruction, read: Read, kind: str) -> list[Array]:
    return [read(index, kind) for index in range(1, len(instruction.operands))]


# floating point


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _smaller_size(a: Array, b: Array) -> Array:
    """The smaller absolute value, with the product's sign; NaN where one is NaN."""
    return np.copysign(np.minimum(abs(a), abs(b)), np.where(np.signbit(a) ^ np.signbit(b), -1, 1)).astype(a.dtype)


FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fused,
    "neg": np.negative,
    "abs": np.abs,
    # of a number and NaN, the number
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "min.NaN.xorsign.abs": _smaller_size,
    "ex2": np.exp2,
    # the sign of the first, the size of the second
    "copysign": lambda sign, size: np.copysign(size, sign),
}


def _flushed(values: Array) -> Array:
    """Subnormal fp32 numbers as zeros of their sign."""
    return np.where(abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _float(function: Callable[..., Array], instruction: Instruction, read: Read) -> Array:
    kind = instruction.modifiers[-1]
    sources = _sources(instruction, read, kind)
    if "ftz" not in instruction.modifiers:
        return function(*sources)
    return _flushed(function(*map(_flushed, sources)))


# of fp32 instructions, how many of their first operands may be in half precision
MIXED = {"add.f32": 1, "sub.f32": 1, "fma.f32": 2}


def _mixed(instruction: Instruction, read: Read) -> Array:
    kind, narrow = instruction.modifiers[-1], MIXED[operation(instruction)]
    sources = [
        _from_half(read, i, kind) if i <= narrow else read(i, "f32") for i in range(1, len(instruction.operands))
    ]
    return FLOAT[instruction.opcode](*sources)


def _from_half(read: Read, index: int, kind: str) -> Array:
    """An operand in bf16 or f16 as fp32."""
    return _widened(read(index, "u16"), kind)


def _widened(bits: Array, kind: str) -> Array:
    """The 16 bits of a number in bf16 or f16 as fp32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def halves(pairs: Array, kind: str) -> list[Array]:
    """The lower and the upper number in bf16 or f16 of registers of 32 bits, as fp32."""
    if kind not in HALVES:
        raise UnknownInstruction("unknown instruction")
    return [_widened((pairs >> np.uint32(shift)).astype(np.uint16), kind) for shift in (0, 16)]


def _packed(function: Callable[..., Array], instruction: Instruction, read: Read) -> Array:
    """Two fp32 numbers in each 64-bit register."""
    sources = [np.ascontiguousarray(x).view(np.float32).reshape(-1, 2) for x in _sources(instruction, read, "b64")]
    return np.ascontiguousarray(function(*sources)).view(np.uint64).ravel()


# integers and predicates


def _divide(a: Array, b: Array) -> Array:
    """Rounded towards zero; a GPU gives some number for a division by 0."""
    divisor = np.where(b == 0, 1, b).astype(b.dtype)
    if a.dtype.kind == "u":
        return a // divisor
    quotient = a // divisor
    return quotient + ((quotient < 0) & (quotient * divisor != a)).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


PREDICATE: dict[str, Callable[..., Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
}
INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": _divide,
    "rem": _remainder,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
}


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _multiply_wide(read: Read, kind: str) -> Array:
    wide = DTYPES[_wide(kind)]
    return read(1, kind).astype(wide) * read(2, kind).astype(wide)


def _multiply_high(read: Read, kind: str) -> Array:
    return (_multiply_wide(read, kind) >> int(kind[1:])).astype(DTYPES[kind])


def _shift(read: Read, kind: str, *, left: bool) -> Array:
    """By at most the width: what is shifted further gives zeros, or the sign."""
    value, by, bits = read(1, kind), read(2, "u32"), 8 * DTYPES[kind].itemsize
    within = np.minimum(by, bits - 1).astype(value.dtype)
    if value.dtype.kind == "i" and not left:
        return value >> within
    return np.where(by >= bits, 0, value << within if left else value >> within).astype(value.dtype)


def _extract(read: Read, kind: str) -> Array:
    """The field of bits that begins at operand 2 and has the length of operand 3."""
    start, length = read(2, "u32").astype(np.uint64), read(3, "u32").astype(np.uint64)
    field = (read(1, f"u{kind[1:]}").astype(np.uint64) >> start) & ((np.uint64(1) << length) - np.uint64(1))
    if kind[0] == "s":
        field = np.where(field >> (length - np.uint64(1)) & np.uint64(1), field - (np.uint64(1) << length), field)
    return field.astype(DTYPES[f"u{kind[1:]}"]).view(DTYPES[kind])


def _permute(read: Read, kind: str) -> Array:
    """Four bytes chosen from the eight of operands 1 and 2, by the hexadecimal digits of operand 3."""
    pair = read(1, "u32").astype(np.uint64) | (read(2, "u32").astype(np.uint64) << np.uint64(32))
    selector, found = read(3, "u32").astype(np.uint64), np.zeros(1, np.uint64)
    for byte in range(4):
        digit = (selector >> np.uint64(4 * byte)) & np.uint64(15)
        value = (pair >> (np.uint64(8) * (digit & np.uint64(7)))) & np.uint64(255)
        # the digit's highest bit asks for the sign alone
        value = np.where(digit > 7, np.where(value > 127, np.uint64(255), np.uint64(0)), value)
        found = found | (value << np.uint64(8 * byte))
    return found.astype(np.uint32)


# instructions whose operands are not all of one type
SPECIAL: dict[str, Callable[[Read, str], Array]] = {
    "mul.wide": _multiply_wide,
    "mul.hi": _multiply_high,
    "mad.wide": lambda read, kind: _multiply_wide(read, kind) + read(3, _wide(kind)),
    "shl": lambda read, kind: _shift(read, kind, left=True),
    "shr": lambda read, kind: _shift(read, kind, left=False),
    "bfe": _extract,
    "prmt": _permute,
}


# comparisons and conversions

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _compare(instruction: Instruction, read: Read) -> Array:
    name, kind = operation(instruction).removeprefix("setp."), instruction.modifiers[-1]
    a, b = read(1, kind), read(2, kind)
    if name in COMPARISONS:
        # "not equal" alone is true of NaN in numpy
        return COMPARISONS[name](a, b) & ((a == a) & (b == b) if name == "ne" else True)
    unordered = (a != a) | (b != b)
    if name[:-1] in COMPARISONS and name[-1] == "u":
        return COMPARISONS[name[:-1]](a, b) | unordered
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    raise UnknownInstruction("unknown instruction")


def _to_bf16(values: Array) -> Array:
    """Rounded to the nearest, ties to even, as 16 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FFF), rounded).astype(np.uint16)


def _to_f16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


HALVES: dict[str, Callable[[Array], Array]] = {"bf16": _to_bf16, "f16": _to_f16}


def _convert(instruction: Instruction, read: Read) -> Array:
    *rounding, to, source = instruction.modifiers
    rounding = [name for name in rounding if name not in IGNORED]
    if to in HALVES and source == "f32" and not rounding:
        return HALVES[to](read(1, "f32"))
    if to.removesuffix("x2") in HALVES and source == "f32" and not rounding:
        high, low = (HALVES[to[:-2]](read(index, "f32")).astype(np.uint32) for index in (1, 2))
        return (high << np.uint32(16)) | low
    if source in HALVES and to == "f32" and not rounding:
        return _from_half(read, 1, source)
    if to not in DTYPES or source not in DTYPES or rounding not in ([], ["rzi"], ["rmi"]):
        raise UnknownInstruction("unknown instruction")
    values = read(1, source)
    if "ftz" in instruction.modifiers:
        values = _flushed(values)
    if rounding:
        values = np.trunc(values) if rounding == ["rzi"] else np.floor(values)
    if values.dtype.kind == "f" and DTYPES[to].kind in "iu":
        # saturating, and NaN is 0
        limits = np.iinfo(DTYPES[to])
        values = np.nan_to_num(values.astype(np.float64), nan=0.0)
        above = values >= float(limits.max)
        within = np.where(above, 0, np.maximum(values, float(limits.min))).astype(DTYPES[to])
        return np.where(above, limits.max, within).astype(DTYPES[to])
    return values.astype(DTYPES[to])
