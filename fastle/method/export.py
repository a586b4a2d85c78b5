"""Exported models: the graph of an autoencoder, or of a half of it, as ONNX or as torch.export's program.

Images are fp32 in [0, 1], and the number of images is free. What is written has been read back and compared with the
model, at two numbers of images.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastle.checkpoint import write_atomic
from fastle.errors import FastleError
from fastle.extras import missing_extra
from fastle.files import one_line

from .model import Autoencoder

Part = Literal["reconstruct", "encode", "decode"]
Format = Literal["onnx", "torch-export"]
LARGEST_ERROR = 1e-4
TRACED, OTHER = 2, 5  # images with which a graph is made, and with which it is compared as well


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
    with tempfile.TemporaryDirectory(prefix="fastle-") as folder, _said(f"{form} of {part}"):
        made = Path(folder) / "model"
        write(graph, graph.example(TRACED), made)
        difference = _check(graph, read(made))
        content = made.read_bytes()
    write_atomic(path, content, "make room or give another name")
    return difference


class _Part(nn.Module):
    """A model, or a half of it, with one input and one output."""

    def __init__(self, model: Autoencoder, part: Part) -> None:
        super().__init__()
        self.part = part
        self.encoder = None if part == "decode" else model.encoder
        self.decoder = None if part == "encode" else model.decoder
        self.config = model.config

    def forward(self, x: Tensor) -> Tensor:
        for half in (self.encoder, self.decoder):
            x = x if half is None else half(x)
        return x

    @property
    def names(self) -> tuple[str, str]:
        """Of the input and the output."""
        return (
            "latents" if self.part == "decode" else "images",
            "latents" if self.part == "encode" else "reconstructions",
        )

    def example(self, count: int) -> Tensor:
        """An input of so many images."""
        generator = torch.Generator().manual_seed(count)
        if self.part == "decode":
            return torch.randn(count, *self.config.latent_shape, generator=generator)
        return torch.rand(count, self.config.channels, *self.config.sides, generator=generator)


def _write_program(graph: _Part, example: Tensor, path: Path) -> None:
    batch = {0: torch.export.Dim("batch")}
    # a name without its ending is no file of torch.export's to it
    with path.open("wb") as file:
        torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=(batch,)), file)


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(graph: _Part, example: Tensor, path: Path) -> None:
    source, result = graph.names
    with _extra("to export ONNX"):
        # before the work, whatever torch would import when
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[source],
            output_names=[result],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    with _extra("to check ONNX"):
        import onnxruntime
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {source.name: x.numpy()})[0])


@torch.no_grad()
def _check(graph: _Part, read: Callable[[Tensor], Tensor]) -> float:
    errors = []
    for count in (1, OTHER):
        x = graph.example(count)
        wanted, got = graph(x), read(x)
        if got.shape != wanted.shape:
            raise ExportError(f"it gives {tuple(got.shape)} for {count} images, not {tuple(wanted.shape)}")
        errors.append((got - wanted).abs().max())
    # of torch, whose maximum of a NaN is NaN
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
def _said(what: str) -> Iterator[None]:
    """Names what was exported in an error, and keeps the exporters' warnings for themselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError as error:
        raise ExportError(f"{what}: nothing is written, because {error}") from None
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{what}: torch {torch.__version__} cannot export it ({one_line(error)[:300]})") from None
