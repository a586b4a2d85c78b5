"""fastle export: a model as ONNX or as torch.export's program, checked against the model, or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastle.config import ConfigError
from fastle.method.export import Format, export_model
from fastle.method.model import STRIDE

from .cli import Output
from .models import load_model
from .outputs import check_output, check_output_folder

ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}


def run(flags: argparse.Namespace, console: Output) -> None:
    """Writes the files that the flags ask for."""
    given = {"onnx": flags.onnx, "torch-export": flags.torch_export}
    outputs = {form: Path(given[form]) for form in ENDINGS if given[form] is not None}
    if not outputs and flags.web is None:
        raise ConfigError("there is nothing to export to: give --onnx FILE.onnx, --torch-export FILE.pt2 or --web DIR")
    if not outputs and flags.part is not None:
        raise ConfigError("--part is for --onnx and --torch-export: a page has the encoder and the decoder")
    for form, output in outputs.items():
        check_output(output, (ENDINGS[form],), flag=f"--{form}")
    if flags.web is not None:
        _write_page(flags, console)
    elif flags.size is not None or flags.runtime is not None:
        raise ConfigError("--size and --runtime are for a page: give --web DIR too")
    if outputs:
        _write_files(outputs, flags, console)


def _write_files(outputs: dict[Format, Path], flags: argparse.Namespace, console: Output) -> None:
    model = load_model(flags.model, torch.device("cpu"), flags.weights).model
    free = f" of any size divisible by {STRIDE}" if model.config.latent is None else ""
    for form, output in outputs.items():
        difference = export_model(model, output, form=form, part=flags.part or "reconstruct")
        console.say(
            f"written to {output}: it takes any number of images{free}, and is within {difference:.1g} of the model"
        )


def _write_page(flags: argparse.Namespace, console: Output) -> None:
    from fastle.web.demo import open_demo
    from fastle.web.runtime import read_licenses, read_runtime
    from fastle.web.static_page import write_static_page

    folder = Path(flags.web)
    check_output_folder(folder, flag="--web")
    demo, remark = open_demo(flags.model, torch.device("cpu"), flags.size, flags.weights or "model")
    if remark:
        console.say(remark)
    licenses = read_licenses()
    size = write_static_page(demo, folder, read_runtime(flags.runtime, console.say), licenses)
    console.say(f"written to {folder} ({size / 1e6:.0f} MB): any web host serves it")
    console.say(f"on this machine: python -m http.server --bind 127.0.0.1 --directory {folder}")
