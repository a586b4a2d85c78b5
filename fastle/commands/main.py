"""fastle: measures and uses what fastle-train made. The commands' modules need torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from fastle.choices import DEVICE
from fastle.options import Option

from .cli import Output, Parser, add_option, one_line_errors

# what RUN and MODEL may be
RUN = "a run directory"
MODEL = "a run directory, a checkpoint, a saved model, the name of one that ships, or user/model on the hub"
Commands = Any  # argparse has no public type for it
WEIGHTS = Option(
    name="weights",
    help="the weights to take: model, or an average that the run keeps, such as ema-050",
    default="model",
    metavar="NAME",
)
STEPS = Option(name="steps", help="images in a row", kind=int, at_least=2, at_most=100)
COUNT = Option(name="count", help="images", kind=int, at_least=1, at_most=1000)
SEED = Option(name="seed", help="seed of the draws", kind=int, at_least=0)
BRUSHED = "cifar10-6x"  # the model of the latent brush, where none is named


def main(argv: Sequence[str] | None = None) -> None:
    """fastle: measures and uses what fastle-train made."""
    with one_line_errors("fastle"):
        flags = make_parser().parse_args(argv)
        for option in (STEPS, COUNT, SEED):
            if option.name in flags:
                option.check(getattr(flags, option.name))
    # outside, where a signal ends the process: an exception could leave a module half imported
    command = import_module(f"fastle.commands.{flags.command}")
    with one_line_errors("fastle"):
        command.run(flags, Output())


def make_parser() -> Parser:
    """The parser of fastle."""
    parser = Parser(prog="fastle", allow_abbrev=False, description="Measure and use what fastle-train made.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _eval, _reconstruct, _encode, _interpolate, _sample, _probe, _compare, _report, _brush, _export, _card, _check,
        _doctor, _completion,
    ):  # fmt: skip
        add(commands)
    return parser


def _command(commands: Commands, name: str, text: str) -> Parser:
    command: Parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    return command


def _of_model(commands: Commands, name: str, text: str) -> Parser:
    """Adds a command that takes a trained model."""
    command = _command(commands, name, text)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    return command


def _of_run(commands: Commands, name: str, text: str) -> Parser:
    """Adds a command that takes a run directory."""
    command = _command(commands, name, text)
    command.add_argument("run", metavar="RUN", help=RUN)
    return command


def _of_runs(commands: Commands, name: str, text: str) -> Parser:
    """Adds a command that takes one or several run directories."""
    command = _command(commands, name, text)
    command.add_argument("runs", metavar="RUN", nargs="+", help=f"{RUN}, or several")
    return command


def _eval(commands: Commands) -> None:
    command = _of_model(commands, "eval", "PSNR and SSIM over the whole test split of a run, or over a folder")
    command.add_argument(
        "--data",
        metavar="DIR",
        help="measure all images in this folder or these shards (required unless MODEL is a run)",
    )
    command.add_argument("--perceptual", action="store_true", help="LPIPS and FID too; fetches two networks at first")
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _reconstruct(commands: Commands) -> None:
    command = _of_model(commands, "reconstruct", "a picture of images and reconstructions")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files, cut to size as in training")
    _output(command, "OUT.png", "where the picture goes")
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _encode(commands: Commands) -> None:
    command = _of_model(commands, "encode", "the latents of images, with the names of the images, in a file")
    command.add_argument("images", metavar="PATH", help="an image, or a folder of images, cut to size as in training")
    _output(command, "OUT", "where the latents go: .safetensors, .npy or .parquet")
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _interpolate(commands: Commands) -> None:
    command = _of_model(commands, "interpolate", "a picture of the way from one image to another")
    command.add_argument("first", metavar="A", help="an image file, cut to size as in training")
    command.add_argument("second", metavar="B", help="another one")
    _output(command, "OUT.png", "where the picture goes")
    _number(command, STEPS, 9)
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _sample(commands: Commands) -> None:
    command = _of_model(commands, "sample", "a picture of what latents drawn from N(0, 1) decode to")
    _output(command, "OUT.png", "where the picture goes")
    _number(command, COUNT, 32)
    _number(command, SEED, 0)
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _probe(commands: Commands) -> None:
    command = _of_model(commands, "probe", "how well classes can be read from the latents: linear and k-NN")
    text = "holds a folder for each class, or train/ and test/ that do; or shards of these"
    command.add_argument("--data", metavar="DIR", required=True, help=text)
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)


def _compare(commands: Commands) -> None:
    command = _of_runs(commands, "compare", "figures of runs side by side, and the settings that differ")
    command.add_argument("-o", "--output", metavar="OUT.png", help="put their newest grids side by side too")


def _report(commands: Commands) -> None:
    command = _of_runs(commands, "report", "one HTML page of one or several runs")
    _output(command, "OUT.html", "where the page goes")


def _brush(commands: Commands) -> None:
    command = _command(commands, "brush", "a page on this machine to paint in the latent")
    command.add_argument("model", metavar="MODEL", nargs="?", default=BRUSHED, help=f"{MODEL} (default: {BRUSHED})")
    command.add_argument(
        "--size", metavar="PX", type=int,
        help="size of the images of a spatial latent (default: the run's, or 128 for a smaller model without a run)",
    )  # fmt: skip
    command.add_argument("--port", metavar="N", type=int, default=0, help="port of 127.0.0.1 (default: a free one)")
    add_option(command, DEVICE)


def _export(commands: Commands) -> None:
    command = _of_model(commands, "export", "a model as ONNX, for torch.export, or as a page that needs no server")
    command.add_argument("--onnx", metavar="FILE.onnx", help="write ONNX")
    command.add_argument("--torch-export", metavar="FILE.pt2", help="write a program that torch.export.load reads")
    command.add_argument(
        "--part",
        choices=("reconstruct", "encode", "decode"),
        help="what it computes: reconstructions or latents of images, or images of latents (default: reconstruct)",
    )
    command.add_argument("--web", metavar="DIR", help="write the page of fastle brush for any web host")
    command.add_argument("--size", metavar="PX", type=int, help="size of the page's images, as for fastle brush")
    command.add_argument(
        "--runtime", metavar="FROM",
        help="the page's npm package onnxruntime-web: a file, a folder or an address (default: npm's registry)",
    )  # fmt: skip
    add_option(command, WEIGHTS)


def _card(commands: Commands) -> None:
    command = _of_run(commands, "card", "save a run's model for others, with a model card")
    _output(command, "DIR", "the folder of the model")
    command.add_argument("--bf16", action="store_true", help="save the parameters in bf16, half as large")
    command.add_argument("--about", metavar="TEXT", help="what the images are and whose, for the card")
    command.add_argument(
        "--license", metavar="NAME", help="the weights' licence, for the card: apache-2.0, cc-by-4.0 …"
    )
    add_option(command, WEIGHTS)


def _check(commands: Commands) -> None:
    command = _of_run(commands, "check", "whether a run and its cache are intact")
    command.add_argument(
        "--restore-config", action="store_true", help="write config.json anew, as the newest good checkpoint knows it"
    )


def _doctor(commands: Commands) -> None:
    _command(commands, "doctor", "what fastle finds here, what it will use, and what would be slow")


def _completion(commands: Commands) -> None:
    command = _command(commands, "completion", "what your shell reads to complete fastle and fastle-train")
    command.add_argument("shell", choices=("bash", "zsh"), help="the shell")


def _number(command: Parser, option: Option, default: int) -> None:
    add_option(command, replace(option, default=str(default)))
    command.set_defaults(**{option.name: default})


def _output(command: Parser, metavar: str, text: str) -> None:
    command.add_argument("-o", "--output", metavar=metavar, required=True, help=text)
