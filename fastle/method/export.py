"""Exported models: the graph of an autoencoder, or of a half of it, as ONNX or as torch.export's program.

Images are fp32 in [0, 1]. Their number is free, and with a spatial latent so are their height and width, as they are
for the model. What is written has been read back and compared with the model, at two numbers and sizes of images.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastle.errors import FastleError
from fastle.extras import missing_extra
from fastle.files import one_line, write_atomic

from .conv import shortcut
from .model import STRIDE, Autoencoder, Decoder, Encoder
from .upsample import upsampling_kernel

Part = Literal["reconstruct", "encode", "decode"]
Format = Literal["onnx", "torch-export"]
LARGEST_ERROR = 1e-4
TRACED = 2  # images with which a graph is made
# how many images it is compared with, and how much larger they are where the size is free, in cells of the latent
COMPARED = ((1, (0, 0)), (5, (1, 3)))


class ExportError(FastleError):
    """A model cannot be exported, or what was exported does not compute what the model does."""


def export_model(model: Autoencoder, path: Path, *, form: Format, part: Part = "reconstruct") -> float:
    """Writes the graph of a model, and its weights, to one file, once it has been checked.

    Args:
        model: On the CPU.
        path: The file.
        form: "onnx" needs the extra "export".
        part: What the graph computes: reconstructions of images, latents of images, or images of latents.

    Returns:
        The largest difference between what the file and the model compute.

    Raises:
        FastleError: A package is missing, the model cannot be exported, the file computes something else by more than
            1e-4, or it cannot be written. Then nothing is left of it.
    """
    graph = _Part(model, part).eval()
    write, read = (_write_onnx, _read_onnx) if form == "onnx" else (_write_program, _read_program)
    with tempfile.TemporaryDirectory(prefix="fastle-") as folder, _naming_errors(f"{form} of {part}"):
        made = Path(folder) / "model"
        write(graph, graph.example(TRACED, (1, 2)), made)
        difference = _check(model, graph, read(made))
        content = made.read_bytes()
    write_atomic(path, content, "make room or give another name")
    return difference


class _Part(nn.Module):
    """A model, or a half of it, with one input and one output, in the operators that every runtime has.

    The model rearranges pixels to suit a GPU. That slows other runtimes, and torch needs a minute to export it where
    the size is free. `_check` compares the two.
    """

    def __init__(self, model: Autoencoder, part: Part) -> None:
        super().__init__()
        self.part = part
        self.config = model.config
        self.encoder = None if part == "decode" else model.encoder
        self.decoder = None if part == "encode" else model.decoder
        # constants of the graph
        self.shortcuts = [_shortcut_weight(block.reduce) for block in _blocks(model.encoder.down)]
        layers = (*(block.expand for block in _blocks(model.decoder.up)), model.decoder.head)
        self.kernels = [upsampling_kernel(layer.weight.detach()).contiguous() for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        if self.encoder is not None:
            x = self._encode(self.encoder, x)
        if self.decoder is not None:
            x = self._decode(self.decoder, x)
        return x

    def _encode(self, encoder: Encoder, x: Tensor) -> Tensor:
        x = F.silu(F.conv2d(x, encoder.stem.weight, encoder.stem.bias, stride=2, padding=1))
        for block, weight in zip(_blocks(encoder.down), self.shortcuts, strict=True):
            x = F.silu(block.mix(F.silu(block.reduce(x))) + F.conv2d(x, weight, stride=2))
        if encoder.pool is not None:
            x = encoder.pool(x.flatten(1))
        norm = encoder.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    def _decode(self, decoder: Decoder, z: Tensor) -> Tensor:
        if decoder.unpool is not None:
            z = F.silu(decoder.unpool(z)).unflatten(1, self.config.map_shape)
        *kernels, head = self.kernels
        for block, kernel in zip(_blocks(decoder.up), kernels, strict=True):
            expanded = F.silu(F.conv_transpose2d(z, kernel, block.expand.bias, stride=2, padding=1))
            z = F.silu(block.mix(expanded) + F.interpolate(block.skip(z), scale_factor=2.0, mode="nearest"))
        return torch.sigmoid(F.conv_transpose2d(z, head, decoder.head.bias, stride=2, padding=1))

    @property
    def names(self) -> tuple[str, str]:
        """The names of the input and the output."""
        return (
            "latents" if self.part == "decode" else "images",
            "latents" if self.part == "encode" else "reconstructions",
        )

    @property
    def free(self) -> dict[int, Any]:
        """The free dimensions of the input."""
        from torch.export import Dim

        dims: dict[int, Any] = {0: Dim("batch")}
        if self.config.latent is None:
            step = 1 if self.part == "decode" else STRIDE
            dims |= {2: step * Dim("rows", min=1), 3: step * Dim("columns", min=1)}
        return dims

    def example(self, count: int, more: tuple[int, int] = (0, 0)) -> Tensor:
        """An input of so many images, of the model's size or, where the size is free, more cells high and wide."""
        generator = torch.Generator().manual_seed(count)
        rows, columns = more if self.config.latent is None else (0, 0)
        if self.part == "decode":
            channels, *cells = self.config.latent_shape
            shape = [channels, *(side + added for side, added in zip(cells, (rows, columns), strict=False))]
            return torch.randn(count, *shape, generator=generator)
        height, width = self.config.sides
        sides = (height + STRIDE * rows, width + STRIDE * columns)
        return torch.rand(count, self.config.channels, *sides, generator=generator)


def _write_program(graph: _Part, example: Tensor, path: Path) -> None:
    # torch.export warns of a path without its ending, and not of an open file
    with path.open("wb") as file:
        torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=(graph.free,)), file)


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(graph: _Part, example: Tensor, path: Path) -> None:
    source, result = graph.names
    with _extra("to export ONNX"):
        # imported before the work, so that a missing package is reported at once
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[source],
            output_names=[result],
            dynamic_shapes=(graph.free,),
        )
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    with _extra("to check ONNX"):
        import onnxruntime
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {source.name: x.numpy()})[0])


def _blocks(blocks: nn.Sequential) -> Iterator[Any]:
    # a Sequential does not know the types of its blocks
    return iter(blocks)


def _shortcut_weight(reduce: nn.Conv2d) -> Tensor:
    """`shortcut` as the weight of a 2×2 convolution of stride 2."""
    channels = reduce.in_channels
    # blocks with a one at one pixel of one channel: their results are the columns of the weight
    pixels = torch.eye(4 * channels).view(-1, channels, 2, 2)
    return shortcut(pixels, reduce.out_channels).view(channels, 2, 2, -1).permute(3, 0, 1, 2).contiguous()


@torch.no_grad()
def _check(model: Autoencoder, graph: _Part, read: Callable[[Tensor], Tensor]) -> float:
    parts: dict[Part, Callable[[Tensor], Tensor]] = {
        "reconstruct": model, "encode": model.encode, "decode": model.decode,
    }  # fmt: skip
    compute = parts[graph.part]
    errors = []
    for count, more in COMPARED:
        x = graph.example(count, more)
        wanted, got = compute(x), read(x)
        if got.shape != wanted.shape:
            raise ExportError(f"it gives {tuple(got.shape)} for {tuple(x.shape)}, not {tuple(wanted.shape)}")
        errors.append((got - wanted).abs().max())
    # torch's maximum is NaN if one of them is; Python's may not be
    worst = float(torch.stack(errors).max())
    if not worst <= LARGEST_ERROR:
        raise ExportError(f"it is off by {worst:.2g}, where {LARGEST_ERROR:g} is the most")
    return worst


@contextmanager
def _extra(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error, what) or error from None


@contextmanager
def _naming_errors(what: str) -> Iterator[None]:
    """Adds what was exported to an error's message, and hides the exporters' warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError as error:
        raise ExportError(f"{what}: nothing is written, because {error}") from None
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{what}: torch {torch.__version__} cannot export it ({one_line(error)[:300]})") from None
