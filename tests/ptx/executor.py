"""Executes a kernel's PTX: every thread a lane of numpy's vectors, many CTAs at a time.

Threads that have diverged meet again because the instruction that comes first is always the next (by its place in the
text), for all threads that wait there. Threads of a warp go in lockstep, which a GPU does not promise: what only that
makes right is not found, nor are races in global memory. Of shared memory, what two warps use without a barrier between
them is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx import matrices
from tests.ptx.arithmetic import DTYPES, Array, UnknownInstruction, compute, halves, operation
from tests.ptx.memory import GlobalMemory, MemoryFault, ParameterMemory, SharedMemory
from tests.ptx.parser import Address, Constant, Instruction, Kernel, Operand, Register, Symbol, Vector

# threads at a time, at most, of several CTAs
LANES = 8192
WARP = 32
# instructions after which a kernel is taken for one that never ends
MOST_STEPS = 1_000_000
CONTROL = ("bra", "ret", "trap")


class DeviceAssert(Exception):
    """A kernel's own assertion failed."""


class Divergence(Exception):
    """Threads that must act together do not."""


FAULTS = (MemoryFault, UnknownInstruction, DeviceAssert, Divergence)


def execute(
    kernel: Kernel, memory: GlobalMemory, *, grid: Sequence[int], threads: int, shared: int, arguments: Sequence[float]
) -> int:
    """All CTAs of a grid; `shared` bytes and `threads` in each. Parameters without an argument are 0.

    Returns:
        How many instructions were executed, each for all threads that wait for it.

    Raises:
        MemoryFault, UnknownInstruction, DeviceAssert, Divergence: With the kernel's name and the instruction.
    """
    symbols = {name: memory.place_bytes(np.frombuffer(text, np.uint8)) for name, text in kernel.constants.items()}
    symbols |= dict.fromkeys(kernel.shared, 0)
    parameters = ParameterMemory()
    symbols |= _placed_parameters(kernel, parameters, arguments)
    sizes = [*grid, 1, 1, 1][:3]
    # x runs fastest
    indices = np.indices(sizes[::-1]).reshape(3, -1)[::-1].T
    at_once, steps = max(1, LANES // threads), 0
    for start in range(0, len(indices), at_once):
        some = indices[start : start + at_once]
        ctas = _Ctas(kernel, memory, parameters, symbols, some, sizes, threads, shared)
        with np.errstate(all="ignore"):
            steps += ctas.run()
    return steps


def _placed_parameters(kernel: Kernel, memory: ParameterMemory, arguments: Sequence[float]) -> dict[str, int]:
    """Where each parameter lies; kernels choose among several by their address."""
    values = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]
    return {
        name: memory.place_bytes(_bits(value, DTYPES[kind]).view(np.uint8))
        for (name, kind), value in zip(kernel.parameters.items(), values, strict=True)
    }


class _Ctas:
    """Some CTAs of a grid, one thread after the other in every array of `lanes`."""

    def __init__(
        self, kernel: Kernel, memory: GlobalMemory, parameters: ParameterMemory, symbols: dict[str, int],
        indices: Array, grid: Sequence[int], threads: int, shared: int,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.parameters, self.symbols = kernel, memory, parameters, symbols
        self.threads = threads
        self.shared = SharedMemory(len(indices), shared)
        self.lanes = len(indices) * threads
        self.cta, tid = np.divmod(np.arange(self.lanes), threads)
        self.warp = tid // WARP
        self.specials = {"%tid.x": tid.astype(np.uint32)}
        for axis, name in enumerate("xyz"):
            self.specials[f"%ctaid.{name}"] = indices[self.cta, axis].astype(np.uint32)
            self.specials[f"%nctaid.{name}"] = np.array([grid[axis]], np.uint32)
        self.call_parameters: dict[str, Array] = {}
        # groups of copies to shared memory that nobody waited for: their addresses, bytes and lanes
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]
        self.registers: dict[str, Array] = {}
        self.place = np.zeros(self.lanes, np.int64)
        self.alive = np.ones(self.lanes, bool)

    def run(self) -> int:
        steps = 0
        while self.alive.any():
            waiting = self.place[self.alive]
            start = int(waiting.min())
            if start == len(self.kernel.instructions):
                raise Divergence(f"{self.kernel.name}: a thread goes past the last instruction")
            later = waiting[waiting > start]
            stop = int(later.min()) if later.size else len(self.kernel.instructions)
            steps += self._run_until(start, stop, self.alive & (self.place == start))
            if steps > MOST_STEPS:
                raise Divergence(f"{self.kernel.name} does not end within {MOST_STEPS} instructions")
        return steps

    def _run_until(self, start: int, stop: int, active: Array) -> int:
        """Instructions from `start` on for `active` lanes, to `stop`, where others wait, or to a branch."""
        for at in range(start, stop):
            instruction, executing = self.kernel.instructions[at], active
            if instruction.predicate is not None:
                executing = active & (self.read(instruction.predicate, "pred") != instruction.negated)
            try:
                if instruction.opcode in CONTROL:
                    self.place[active] = at + 1
                    self._branch(instruction, executing)
                    return at + 1 - start
                if executing.any():
                    self._step(instruction, executing)
            except FAULTS as fault:
                raise type(fault)(f"{self.kernel.name}: {fault}, in {instruction.text}") from None
        self.place[active] = stop
        return stop - start

    def _branch(self, instruction: Instruction, executing: Array) -> None:
        if instruction.opcode == "ret":
            self.alive &= ~executing
        elif instruction.opcode == "bra":
            (target,) = instruction.operands
            assert isinstance(target, Symbol)
            self.place[executing] = self.kernel.labels[target.name]
        elif executing.any():
            raise DeviceAssert("trap")

    def _step(self, instruction: Instruction, executing: Array) -> None:
        handler = HANDLERS.get(operation(instruction).split(".")[0])
        if handler is not None:
            handler(self, instruction, executing)
            return
        operands = instruction.operands
        self.write(operands[0], compute(instruction, lambda i, kind: self.read(operands[i], kind)), executing)

    # operands

    def read(self, operand: Operand, kind: str) -> Array:
        """The value in each lane as a type, or the one value of all lanes."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            return _as(self._register(operand), dtype)
        if isinstance(operand, Constant):
            return _bits(operand.bits, dtype)
        if isinstance(operand, Symbol):
            if operand.name in self.specials:
                return _as(self.specials[operand.name], dtype)
            if operand.name in self.symbols:
                return _bits(self.symbols[operand.name], dtype)
        raise UnknownInstruction(f"unknown operand {operand}")

    def write(self, operand: Operand, values: Array, executing: Array) -> None:
        """Narrower values are extended by zeros or, signed ones, by their sign."""
        assert isinstance(operand, Register)
        if operand.name == "_":
            return
        register = self._register(operand)
        predicates = "b" in (values.dtype.kind, register.dtype.kind)
        if values.dtype.itemsize > register.dtype.itemsize or (predicates and values.dtype != register.dtype):
            raise UnknownInstruction(f"{values.dtype} does not fit into {operand.name}")
        if values.dtype.itemsize == register.dtype.itemsize:
            values = values.view(register.dtype)
        np.copyto(register, values.astype(register.dtype, copy=False), where=executing)

    def _register(self, register: Register) -> Array:
        found = self.registers.get(register.name)
        if found is None:
            width = self.kernel.width(register)
            # what was never written is NaN
            found = np.zeros(self.lanes, bool) if width == 1 else np.full(self.lanes, -1, f"i{width // 8}")
            found = self.registers[register.name] = found if width == 1 else found.view(f"u{width // 8}")
        return found

    def addresses(self, operand: Operand) -> Array:
        assert isinstance(operand, Address)
        wide = not (isinstance(operand.base, Register) and self.kernel.width(operand.base) == 32)
        base = self.read(operand.base, "u64" if wide else "u32").astype(np.int64)
        return np.broadcast_to(base + operand.offset, (self.lanes,))

    # memory

    def load_bytes(self, space: str, addresses: Array, size: int, chosen: Array) -> Array:
        """(chosen lanes, size), from where each of them reads."""
        if space == "shared":
            return self.shared.load(self.cta[chosen], self.warp[chosen], addresses[chosen], size)
        return (self.parameters if space == "param" else self.memory).load(addresses[chosen], size)

    def store_bytes(self, space: str, addresses: Array, values: Array, chosen: Array) -> None:
        if space == "shared":
            self.shared.store(self.cta[chosen], self.warp[chosen], addresses[chosen], values)
        else:
            self.memory.store(addresses[chosen], values)

    def spread(self, values: Array, chosen: Array) -> Array:
        """Values of the chosen lanes among all."""
        found = np.zeros(self.lanes, values.dtype)
        found[chosen] = values
        return found


def _bits(value: float, dtype: np.dtype[Any]) -> Array:
    """An argument, or an immediate's bits, as an array of one value."""
    if dtype.kind == "b":
        return np.array([bool(value)])
    if isinstance(value, int):
        size = dtype.itemsize
        return np.array([value & ((1 << 8 * size) - 1)], f"u{size}").view(dtype)
    return np.array([value], dtype)


def _as(values: Array, dtype: np.dtype[Any]) -> Array:
    """A register's bits as a type that is not wider; its lower bits, where it is narrower."""
    if dtype.itemsize > values.dtype.itemsize or (dtype.kind == "b") != (values.dtype.kind == "b"):
        raise UnknownInstruction(f"a register of {values.dtype} read as {dtype}")
    if dtype.kind == "b":
        return values
    return values.astype(f"u{dtype.itemsize}", copy=False).view(dtype)


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _access(instruction: Instruction, count: int) -> tuple[str, str]:
    """(memory space, type) of a load or store of `count` registers."""
    space, *vector, kind = instruction.modifiers
    expected = [f"v{count}"] if count > 1 else []
    if space not in ("global", "shared", "param") or kind not in DTYPES or vector != expected:
        raise UnknownInstruction("unknown instruction")
    return space, kind


def _load(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    targets = _elements(instruction.operands[0])
    space, kind = _access(instruction, len(targets))
    source = instruction.operands[1]
    chosen = np.flatnonzero(executing)
    size = DTYPES[kind].itemsize * len(targets)
    values = ctas.load_bytes(space, ctas.addresses(source), size, chosen).view(DTYPES[kind])
    for index, target in enumerate(targets):
        ctas.write(target, ctas.spread(values[:, index], chosen), executing)


def _store(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    target, sources = instruction.operands[0], _elements(instruction.operands[1])
    space, kind = _access(instruction, len(sources))
    values = [np.broadcast_to(ctas.read(source, kind), (ctas.lanes,))[executing] for source in sources]
    if space == "param":
        assert isinstance(target, Address) and isinstance(target.base, Register | Symbol)
        ctas.call_parameters[target.base.name] = values[0]
        return
    ctas.store_bytes(space, ctas.addresses(target), np.stack(values, 1).view(np.uint8), np.flatnonzero(executing))


def _copy(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    """A copy to shared memory that has arrived when a thread has waited for its group, and not before.

    A warp that still reads what the copy will overwrite is not found: the store counts when it is waited for.
    """
    if instruction.modifiers == ("async", "commit_group"):
        ctas.copies.append([])
    elif instruction.modifiers == ("async", "wait_group"):
        (left,) = (int(ctas.read(operand, "u32")[0]) for operand in instruction.operands)
        # the last group is open: nothing was committed to it yet
        arrived = max(0, len(ctas.copies) - 1 - left)
        for addresses, values, chosen in itertools.chain.from_iterable(ctas.copies[:arrived]):
            ctas.store_bytes("shared", addresses, values, chosen)
        del ctas.copies[:arrived]
    elif instruction.modifiers[::2] == ("async", "shared") and instruction.modifiers[1] in ("ca", "cg"):
        target, source, size, *given = instruction.operands
        bytes_ = int(ctas.read(size, "u32")[0])
        # what is not read is zero: a mask's way to leave it out
        read = np.broadcast_to(ctas.read(given[0], "u32") if given else bytes_, (ctas.lanes,))
        if np.setdiff1d(read[executing], (0, bytes_)).size:
            raise UnknownInstruction("unknown instruction")
        chosen = np.flatnonzero(executing)
        values = np.zeros((len(chosen), bytes_), np.uint8)
        inside = read[chosen] != 0
        values[inside] = ctas.load_bytes("global", ctas.addresses(source), bytes_, chosen[inside])
        ctas.copies[-1].append((ctas.addresses(target), values, chosen))
    else:
        raise UnknownInstruction("unknown instruction")


def _move(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    """A copy, parts packed into a register, or a register unpacked into parts."""
    target, source = instruction.operands
    kind = instruction.modifiers[-1]
    if isinstance(target, Vector):
        bits = 8 * DTYPES[kind].itemsize // len(target.elements)
        whole = ctas.read(source, kind).astype(np.uint64)
        for index, part in enumerate(target.elements):
            ctas.write(part, (whole >> np.uint64(bits * index)).astype(f"u{bits // 8}"), executing)
    elif isinstance(source, Vector):
        bits = 8 * DTYPES[kind].itemsize // len(source.elements)
        whole = np.zeros(1, np.uint64)
        for index, part in enumerate(source.elements):
            whole = whole | (ctas.read(part, f"u{bits}").astype(np.uint64) << np.uint64(bits * index))
        ctas.write(target, whole.astype(DTYPES[kind]), executing)
    else:
        ctas.write(target, ctas.read(source, kind), executing)


def _global_address(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    if "global" not in instruction.modifiers:
        raise UnknownInstruction("unknown instruction")
    ctas.write(instruction.operands[0], ctas.read(instruction.operands[1], "u64"), executing)


def _barrier(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    if "warp" in instruction.modifiers:
        return
    arrived, alive = (x.reshape(-1, ctas.threads) for x in (executing, ctas.alive))
    here = arrived.any(1)
    if (arrived != alive)[here].any():
        raise Divergence("some threads of a CTA do not come to a barrier")
    ctas.shared.barrier(np.flatnonzero(here))


def _shuffle(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    target, value, by, last, _ = instruction.operands
    name = operation(instruction)
    # the last lane that is read: others divide a warp
    if name not in ("shfl.sync.bfly", "shfl.sync.idx") or last != Constant(WARP - 1):
        raise UnknownInstruction("unknown instruction")
    lane, number = np.arange(ctas.lanes), ctas.read(by, "u32").astype(np.int64) % WARP
    source = lane ^ number if name == "shfl.sync.bfly" else lane // WARP * WARP + number
    if not executing[source][executing].all():
        raise Divergence("a thread reads another's register that is not there")
    ctas.write(target, ctas.read(value, "b32")[source], executing)


def _reduce(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    """One value of all threads of a warp, to each of them."""
    name, kind = operation(instruction).removeprefix("redux.sync."), instruction.modifiers[-1]
    if name not in REDUCTIONS or kind not in ("s32", "u32"):
        raise UnknownInstruction("unknown instruction")
    _check_whole_warps(executing)
    values = np.broadcast_to(ctas.read(instruction.operands[1], kind), (ctas.lanes,)).reshape(-1, WARP)
    ctas.write(instruction.operands[0], np.repeat(REDUCTIONS[name].reduce(values, axis=1), WARP), executing)


def _check_whole_warps(executing: Array) -> None:
    by_warp = executing.reshape(-1, WARP)
    if (by_warp.any(1) != by_warp.all(1)).any():
        raise Divergence("some threads of a warp are missing")


def _matrix_places(ctas: _Ctas, rows: Operand, matrix: int, transposed: bool, executing: Array) -> list[Array]:
    """Where both 16-bit numbers of each lane lie in an 8×8 matrix, whose rows begin where 8 of a warp's lanes say."""
    lane = np.arange(ctas.lanes)
    starts = ctas.addresses(rows)
    place, pair = lane % WARP // 4, lane % 4 * 2
    places = []
    for half in (0, 1):
        row, column = (pair + half, place) if transposed else (place, pair + half)
        start = starts[lane // WARP * WARP + 8 * matrix + row]
        if (start[executing] % 16).any():
            raise MemoryFault("a matrix's row is not aligned to 16 bytes")
        places.append(start + 2 * column)
    return places


def _matrix(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    """Up to four matrices between shared memory and a register of each lane."""
    loads = instruction.opcode == "ldmatrix"
    registers, rows = instruction.operands if loads else reversed(instruction.operands)
    parts, transposed = _elements(registers), "trans" in instruction.modifiers
    modifiers = tuple(name for name in instruction.modifiers if name != "trans")
    if modifiers != ("sync", "aligned", "m8n8", f"x{len(parts)}", "shared", "b16"):
        raise UnknownInstruction("unknown instruction")
    _check_whole_warps(executing)
    chosen = np.flatnonzero(executing)
    for index, part in enumerate(parts):
        places = _matrix_places(ctas, rows, index, transposed, executing)
        if loads:
            halves = [ctas.load_bytes("shared", place, 2, chosen).view(np.uint16)[:, 0] for place in places]
            values = halves[0] | halves[1].astype(np.uint32) << np.uint32(16)
            ctas.write(part, ctas.spread(values, chosen), executing)
        else:
            values = np.broadcast_to(ctas.read(part, "b32"), (ctas.lanes,))[chosen, None]
            both = np.ascontiguousarray(values).view(np.uint8)
            for half, place in enumerate(places):
                ctas.store_bytes("shared", place, both[:, 2 * half : 2 * half + 2], chosen)


def _multiply_matrices(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    kind = instruction.modifiers[-2]
    if instruction.modifiers != ("sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32"):
        raise UnknownInstruction("unknown instruction")
    _check_whole_warps(executing)
    target, *sources = (_elements(operand) for operand in instruction.operands)
    pairs = [[np.broadcast_to(ctas.read(part, "b32"), (ctas.lanes,)) for part in parts] for parts in sources[:2]]
    a, b = ([half for part in parts for half in halves(part, kind)] for parts in pairs)
    c = [np.broadcast_to(ctas.read(part, "f32"), (ctas.lanes,)) for part in sources[2]]
    for part, values in zip(target, matrices.multiplied(a, b, c), strict=True):
        ctas.write(part, values, executing)


def _call(ctas: _Ctas, instruction: Instruction, executing: Array) -> None:
    function, parameters = instruction.operands
    if function != Symbol("__assertfail") or not isinstance(parameters, Vector):
        raise UnknownInstruction("unknown function")
    message = parameters.elements[0]
    assert isinstance(message, Register | Symbol)
    raise DeviceAssert(ctas.memory.text(int(ctas.call_parameters[message.name][0])))


REDUCTIONS = {"min": np.minimum, "max": np.maximum}
HANDLERS: dict[str, Callable[[_Ctas, Instruction, Array], None]] = {
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "mov": _move,
    "cvta": _global_address,
    "bar": _barrier,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "mma": _multiply_matrices,
    "call": _call,
}
