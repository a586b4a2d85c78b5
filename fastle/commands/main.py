"""fastle: measures and uses what fastle-train made. The commands' modules need torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from fastle.options import Option

from .cli import DEVICE, Output, Parser, add_option, one_line_errors

WEIGHTS = Option(
    name="weights",
    help="the weights to take: model, or an average that the run keeps, such as ema-050",
    default="model",
    metavar="NAME",
)

BRUSHED = "cifar10-6x"  # the model of the latent brush, where none is named


def main(argv: Sequence[str] | None = None) -> None:
    """fastle: measures and uses what fastle-train made."""
    with one_line_errors("fastle"):
        flags = _parser().parse_args(argv)
    # outside, where a signal ends the process: imports may be in a state that no exception should meet
    command = import_module(f"fastle.commands.{flags.command}")
    with one_line_errors("fastle"):
        command.run(flags, Output())


def _parser() -> Parser:
    parser = Parser(prog="fastle", allow_abbrev=False, description="Measure and use what fastle-train made.")
    names = "{eval,reconstruct,brush,report,card,check}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    command = commands.add_parser("eval", help="PSNR and SSIM over the whole test split", allow_abbrev=False)
    command.add_argument("run", metavar="RUN", help="a run directory")
    command.add_argument("--data", metavar="DIR", help="measure every image below this folder instead")
    command.add_argument("--perceptual", action="store_true", help="LPIPS and FID too; fetches two networks at first")
    add_option(command, WEIGHTS)
    add_option(command, DEVICE)

    command = commands.add_parser("reconstruct", help="a picture of images and reconstructions", allow_abbrev=False)
    command.add_argument("model", metavar="MODEL", help="a run directory, a saved model, or the name of one that ships")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files, cut to size as in training")
    command.add_argument("-o", "--output", metavar="OUT.png", required=True, help="where the picture goes")
    add_option(command, DEVICE)

    command = commands.add_parser("brush", help="a page on this machine to paint in the latent", allow_abbrev=False)
    command.add_argument(
        "model", metavar="MODEL", nargs="?", default=BRUSHED,
        help=f"a run directory, a saved model, or one that ships (default: {BRUSHED})",
    )  # fmt: skip
    command.add_argument("--port", metavar="N", type=int, default=0, help="of 127.0.0.1 (default: one that is free)")
    add_option(command, DEVICE)

    command = commands.add_parser("report", help="one HTML page of one or several runs", allow_abbrev=False)
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    command.add_argument("-o", "--output", metavar="OUT.html", required=True, help="where the page goes")

    command = commands.add_parser("card", help="save a run's model for others, with a model card", allow_abbrev=False)
    command.add_argument("run", metavar="RUN", help="a run directory")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="the folder of the model")
    command.add_argument("--bf16", action="store_true", help="save the parameters in bf16, half as large")
    command.add_argument("--about", metavar="TEXT", help="what the images are and whose, for the card")
    command.add_argument("--license", metavar="NAME", help="of the weights, for the card: apache-2.0, cc-by-4.0 …")
    add_option(command, WEIGHTS)

    command = commands.add_parser("check", help="whether a run and its cache are intact", allow_abbrev=False)
    command.add_argument("run", metavar="RUN", help="a run directory")
    command.add_argument(
        "--restore-config", action="store_true", help="write config.json anew, as the newest good checkpoint knows it"
    )
    return parser
