"""What a generated graph launches: the code that Inductor wrote, read line by line and counted.

Bytes of a Triton kernel are Inductor's own estimate (`kernel_num_gb`): each operand once, a slice as a slice. Bytes of
all else are its operands and results, once. A convolution's backward is two launches, its gradients for the images and
for the weight. Operators of fastle are one launch each, whatever they launch; a fused convolution counts as one.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["triton", "convolution", "product", "operator"]
Pass = Literal["forward", "backward"]
Shape = tuple[int, ...]

ITEM_SIZES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1, "bool": 1,
}  # fmt: skip
LARGE = 2**20  # bytes, from which a layout counts
TAPS = 16  # pixels of the largest kernel: a tensor with no more is a weight
REST = "loss"  # what no phase claims
# arithmetic of SIGReg's operators for each sample and slice, beside their product (docs/sigreg.md)
SIGREG_FLOP = {"sigreg_forward": 45, "sigreg_backward": 65}
# convolutions that a fused operator computes: the gradients need the convolution itself again
FUSED_CONVOLUTIONS = {"halving_conv": 1, "halving_conv_to_images": 2, "halving_conv_to_weight": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One call of a generated graph.

    Attributes:
        name: Of the kernel, or of what is called.
        phase: Of the step, as `fastle.phases` names it.
        bytes: Read and written.
        flop: Of convolutions, products and SIGReg; a multiply-add is two.
        atomics: Calls of atomic_add in the kernel.
        channels: Of a convolution, in and out.
        contiguous: Shapes of a convolution's operands and result from 1 MB on that are not channels-last.
        contiguous_bytes: What they hold.
        copies_layout: Reads one layout of a map from 1 MB on and writes the other.
    """

    kind: Kind
    name: str
    phase: str
    direction: Pass
    bytes: int
    flop: int = 0
    atomics: int = 0
    channels: tuple[int, int] = (0, 0)
    contiguous: tuple[Shape, ...] = ()
    contiguous_bytes: int = 0
    copies_layout: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Launch:
        """The launch of the fields that JSON has kept."""
        shapes = tuple(map(tuple, values["contiguous"]))
        return cls(**values | {"channels": tuple(values["channels"]), "contiguous": shapes})


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of the generated code; `root` names the memory that it lies in."""

    shape: Shape
    stride: Shape
    item_size: int
    root: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_size

    @property
    def layout(self) -> Literal["NCHW", "NHWC"] | None:
        """Of a map: (B, C, H, W) with several channels and pixels."""
        if len(self.shape) != 4 or self.shape[1] == 1 or self.shape[2] * self.shape[3] == 1:
            return None
        return "NHWC" if self.stride[1] == 1 else "NCHW"


def launches(source: str, direction: Pass, *, phases: Mapping[str, str], item_sizes: Mapping[str, int]) -> list[Launch]:
    """All that a generated graph launches, in order.

    Args:
        source: Of the module that Inductor wrote.
        phases: Of the names that its comments give to what is computed.
        item_sizes: Bytes of an element of each of the graph's inputs.
    """
    return _Reader(source, direction, phases, item_sizes).read()


@dataclass(frozen=True, slots=True)
class _Kernel:
    bytes: int
    atomics: int


def _kernels(source: str) -> dict[str, _Kernel]:
    kernels = {}
    for match in re.finditer(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", source, re.M | re.S):
        name, body = match.groups()
        estimate = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", body)
        kernels[name] = _Kernel(round(1e9 * float(estimate[1])) if estimate else 0, body.count("tl.atomic_add("))
    return kernels


@dataclass(slots=True)
class _Reader:
    source: str
    direction: Pass
    phases: Mapping[str, str]
    item_sizes: Mapping[str, int]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    launched: list[Launch] = field(default_factory=list)
    # launches whose results are known only by the assertions that follow them: index → operands
    pending: dict[str, int] = field(default_factory=dict)
    in_products: set[str] = field(default_factory=set)
    maps: list[tuple[int, list[Buffer]]] = field(default_factory=list)

    def read(self) -> list[Launch]:
        kernels = _kernels(self.source)
        lines = self.source.splitlines()
        for statement in _statements(self.source):
            match statement:
                case ast.Assign(targets=[ast.Name(target)], value=value):
                    self._assign(target, value, self._phase(lines, statement))
                case ast.Expr(value=ast.Call() as call):
                    self._call(call, kernels, self._phase(lines, statement))
        for index, maps in self.maps:
            # a map at a Linear lies as the weight's columns do: that is no copy from one layout to the other
            free = [buffer for buffer in maps if buffer.root not in self.in_products]
            if len({buffer.layout for buffer in free}) > 1:
                self._change(index, copies_layout=True)
        return self.launched

    def _phase(self, lines: list[str], statement: ast.stmt) -> str:
        """Of the comment above a statement, by majority."""
        for line in reversed(lines[max(0, statement.lineno - 4) : statement.lineno - 1]):
            if match := re.search(r"Source Nodes: \[(.*?)\]", line):
                names = [self.phases[name] for name in match[1].split(", ") if name in self.phases]
                return Counter(names).most_common(1)[0][0] if names else REST
        return REST

    def _assign(self, target: str, value: ast.expr, phase: str) -> None:
        match value:
            case ast.Call(func=ast.Name("empty_strided_cuda"), args=[shape, stride, dtype]):
                size = ITEM_SIZES[ast.unparse(dtype).removeprefix("torch.")]
                self.buffers[target] = Buffer(_literal(shape), _literal(stride), size, target)
            case ast.Call(func=ast.Attribute(), args=_):
                self._library(target, value, phase)
            case ast.Subscript(value=ast.Name(name)) if name in self.pending:
                # one of several results: its shape follows
                self.pending[target] = self.pending[name]
            case _ if (buffer := self._buffer(value)) is not None:
                self.buffers[target] = buffer

    def _call(self, call: ast.Call, kernels: dict[str, _Kernel], phase: str) -> None:
        match call:
            case ast.Call(func=ast.Name("assert_size_stride"), args=[ast.Name(name), shape, stride, *_]):
                self._learn(name, _literal(shape), _literal(stride), None)
            case ast.Call(func=ast.Name("assert_size_stride_grouped"), args=[ast.Tuple(names), shapes, strides, *_]):
                for one, extent, steps in zip(names, _literal(shapes), _literal(strides), strict=True):
                    self._learn(ast.unparse(one), extent, steps, None)
            case ast.Call(func=ast.Name("assert_tensor_metadata"), args=[ast.Name(name), shape, stride, dtype, *_]):
                self._learn(name, _literal(shape), _literal(stride), ast.unparse(dtype).removeprefix("torch."))
            case ast.Call(func=ast.Attribute(value=ast.Name(name), attr="run")) if name in kernels:
                self._triton(name, kernels[name], call, phase)
            case ast.Call(func=ast.Attribute(value=ast.Name("extern_kernels"))):
                self._library(None, call, phase)

    def _learn(self, name: str, shape: Shape, stride: Shape, dtype: str | None) -> None:
        if name not in self.buffers:
            size = ITEM_SIZES[dtype] if dtype else self.item_sizes.get(name, 4)
            self.buffers[name] = Buffer(shape, stride, size, name)
        if name in self.pending:
            index = self.pending.pop(name)
            self._result(index, self.buffers[name])

    def _result(self, index: int, buffer: Buffer) -> None:
        launch = self.launched[index]
        self._change(index, bytes=launch.bytes + buffer.bytes)
        if launch.kind == "convolution":
            self._note_layouts(index, buffer)

    def _change(self, index: int, **changes: Any) -> None:
        self.launched[index] = replace(self.launched[index], **changes)

    def _add(self, **values: Any) -> int:
        self.launched.append(Launch(direction=self.direction, **values))
        return len(self.launched) - 1

    def _triton(self, name: str, kernel: _Kernel, call: ast.Call, phase: str) -> None:
        operands = [buffer for argument in call.args if (buffer := self._buffer(argument)) is not None]
        index = self._add(kind="triton", name=name, phase=phase, bytes=kernel.bytes, atomics=kernel.atomics)
        maps = [b for b in operands if b.layout and b.bytes >= LARGE and math.prod(b.shape[2:]) > TAPS]
        self.maps.append((index, maps))

    def _library(self, target: str | None, call: ast.Call, phase: str) -> None:
        name = ast.unparse(call.func)
        operands = [buffer for argument in _tensors(call) if (buffer := self._buffer(argument)) is not None]
        moved = sum(buffer.bytes for buffer in operands)
        if name == "extern_kernels.convolution":
            self._convolution(target, call, operands, phase)
        elif name == "torch.ops.aten.convolution_backward.default":
            self._convolution_backward(call, operands, phase)
        elif name.removeprefix("extern_kernels.") in ("mm", "addmm", "bmm"):
            left, right = operands[-3:-1]
            flop = 2 * math.prod(left.shape) * right.shape[-1]
            self._add(kind="product", name=name.split(".")[1], phase=phase, bytes=moved, flop=flop)
            self.in_products |= {buffer.root for buffer in operands}
        elif name.startswith("torch.ops."):
            operator = name.split(".")[3]
            if operator in FUSED_CONVOLUTIONS:
                self._fused_convolution(target, operator, operands, phase)
                return
            # of samples and slices: a backward's largest operand holds a number for each
            pairs = math.prod(operands[0].shape[:-1]) * operands[1].shape[-1] if operator == "sigreg_forward" else 0
            products = 2 * pairs * operands[0].shape[-1] if pairs else 0
            if operator == "sigreg_backward":
                pairs = max(math.prod(buffer.shape) for buffer in operands)
            flop = products + SIGREG_FLOP.get(operator, 0) * pairs
            index = self._add(kind="operator", name=operator, phase=phase, bytes=moved, flop=flop)
            if target is not None:
                self.pending[target] = index

    def _convolution(self, target: str | None, call: ast.Call, operands: list[Buffer], phase: str) -> None:
        images, weight = operands[:2]
        options = {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg != "bias"}
        extent = images.shape[2:]
        if not options["transposed"]:
            sizes = zip(extent, weight.shape[2:], options["stride"], options["padding"], strict=True)
            extent = tuple((n + 2 * padding - k) // stride + 1 for n, k, stride, padding in sizes)
        index = self._add(
            kind="convolution",
            name="transposed convolution" if options["transposed"] else "convolution",
            phase=phase,
            bytes=images.bytes + weight.bytes,
            flop=2 * math.prod((images.shape[0], *extent, *weight.shape)),
            channels=(images.shape[1], weight.shape[1 if options["transposed"] else 0]),
        )
        self._note_layouts(index, images, weight)
        assert target is not None
        self.pending[target] = index

    def _fused_convolution(self, target: str | None, operator: str, operands: list[Buffer], phase: str) -> None:
        blocks, weight = operands[-2:]
        pixels = blocks.shape[0] * (blocks.shape[2] - 1) * (blocks.shape[3] - 1)
        index = self._add(
            kind="convolution",
            name=operator,
            phase=phase,
            bytes=sum(buffer.bytes for buffer in operands),
            flop=FUSED_CONVOLUTIONS[operator] * 2 * pixels * math.prod(weight.shape),
            channels=(blocks.shape[1], weight.shape[0]),
        )
        self._note_layouts(index, *operands)
        # it is written as (B, H, W, channels), which is channels-last, and then read as (B, channels, H, W)
        self.in_products.add(blocks.root)
        assert target is not None
        self.pending[target] = index

    def _convolution_backward(self, call: ast.Call, operands: list[Buffer], phase: str) -> None:
        gradient, images, weight = operands[:3]
        transposed, wanted = _literal(call.args[7]), _literal(call.args[10])
        small = images if transposed else gradient
        flop = 2 * math.prod((small.shape[0], *small.shape[2:])) * math.prod(weight.shape)
        for what, read, written in (("images", weight, images), ("weight", images, weight)):
            if wanted[("images", "weight").index(what)]:
                index = self._add(
                    kind="convolution",
                    name=f"{'transposed ' if transposed else ''}convolution, gradient of its {what}",
                    phase=phase,
                    bytes=gradient.bytes + read.bytes + written.bytes,
                    flop=flop,
                    channels=(images.shape[1], gradient.shape[1]),
                )
                self._note_layouts(index, gradient, images, weight)

    def _note_layouts(self, index: int, *buffers: Buffer) -> None:
        launch = self.launched[index]
        turned = [buffer for buffer in buffers if buffer.layout == "NCHW" and buffer.bytes >= LARGE]
        self._change(
            index,
            contiguous=(*launch.contiguous, *(buffer.shape for buffer in turned)),
            contiguous_bytes=launch.contiguous_bytes + sum(buffer.bytes for buffer in turned),
        )

    def _buffer(self, value: ast.expr) -> Buffer | None:
        match value:
            case ast.Name(name):
                return self.buffers.get(name)
            case ast.Call(func=ast.Name("reinterpret_tensor"), args=[inner, shape, stride, *_]):
                base = self._buffer(inner)
                size, root = (base.item_size, base.root) if base else (4, ast.unparse(inner))
                return Buffer(_literal(shape), _literal(stride), size, root)
            case ast.Call(func=ast.Name("copy_if_misaligned"), args=[inner]):
                return self._buffer(inner)
        return None


def _statements(source: str) -> Iterator[ast.stmt]:
    """Of the function that runs the graph, in order, those in blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "call":
            yield from _flattened(node.body)
            return


def _flattened(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        if isinstance(statement, ast.With):
            yield from _flattened(statement.body)
        else:
            yield statement


def _tensors(call: ast.Call) -> Iterator[ast.expr]:
    """A call's arguments, those in lists included."""
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        yield from argument.elts if isinstance(argument, ast.List) else (argument,)


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(node)
