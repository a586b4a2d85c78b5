"""fastle export: a model as ONNX or as torch.export's program, checked against the model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from fastle.config import ConfigError
from fastle.method.export import Format, export_model

from .models import load_model
from .outputs import check_output

ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}


def run(flags: argparse.Namespace, console: Console) -> None:
    """Writes the files that the flags ask for."""
    given = {"onnx": flags.onnx, "torch-export": flags.torch_export}
    outputs = {form: Path(given[form]) for form in ENDINGS if given[form] is not None}
    if not outputs:
        raise ConfigError("there is nothing to export to: give --onnx FILE.onnx or --torch-export FILE.pt2")
    for form, output in outputs.items():
        check_output(output, (ENDINGS[form],), flag=f"--{form}")
    model = load_model(flags.model, torch.device("cpu"), flags.weights).model
    for form, output in outputs.items():
        difference = export_model(model, output, form=form, part=flags.part)
        console.print(
            f"written to {output}: it takes any number of images, and is within {difference:.1g} of the model",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
