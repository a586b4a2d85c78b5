"""fastle-train's flags. `train_run` does what they ask for, and needs torch, which takes seconds to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from fastle.choices import CACHE, DECODER, DEVICE, LOG, STEP
from fastle.config import OPTIONS, ConfigError, RunConfig
from fastle.folders import SHARDS
from fastle.options import Group, Option
from fastle.presets import default_run, make_config

from .cli import Output, Parser, add_option, one_line_errors
from .settings import read_settings, settings_text
from .show import show_config

# flags that are not settings of the run: they do not change what it computes
FLAGS = {
    flag.name: flag
    for flag in (
        Option(name="download", kind=bool, help="fetch CIFAR-10 or CelebA into --data first", group="data"),
        DEVICE,
        STEP,
        DECODER,
        CACHE,
        Option(
            name="profile",
            kind=int,
            at_least=1,
            help="measure N steps instead of training: phases, rates, and traces in the run's profile/",
            group="speed",
        ),
        Option(name="against", choices=("eager",), help="with --profile: the plain eager step too", group="speed"),
        Option(
            name="run",
            help="the run directory",
            default="runs/ and a name made of dataset and setting",
            group="output",
            metavar="DIR",
        ),
        LOG,
        Option(name="overwrite", kind=bool, help="start anew where there is a run already", group="output"),
        Option(
            name="accept_new_data",
            kind=bool,
            help="go on with a run although its training images have changed",
            group="data",
        ),
        Option(
            name="config",
            help="a TOML file of settings, such as --print-config prints; flags win over it",
            group="output",
            metavar="FILE",
        ),
        Option(name="print_config", kind=bool, help="print the configuration as TOML and stop", group="output"),
        Option(name="dry_run", kind=bool, help="print the configuration and stop", group="output"),
    )
}
# those that a file of settings may hold
IN_FILE = ("device", "step", "decoder", "cache", "run", "log")


def main(argv: Sequence[str] | None = None) -> None:
    """fastle-train: trains a run, or goes on with it."""
    with one_line_errors("fastle-train"):
        parser = make_parser()
        parsed, rest = parser.parse_known_args(argv)
        if rest:
            shards = all(word.endswith(SHARDS) for word in rest)
            hint = "; put a pattern of shards in quotes, or give their folder" if shards else ""
            parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        flags = vars(parsed)
        if flags["config"] is not None:
            known = {name: FLAGS[name] for name in IN_FILE}
            given = {name: value for name, value in flags.items() if value is not None}
            flags |= read_settings(Path(flags["config"]), known) | given
        if flags["dataset"] is None:
            parser.error("the following arguments are required: dataset")
        for name, flag in FLAGS.items():
            if flags[name] is not None:
                flag.check(flags[name])
        config = make_config(**{name: value for name, value in flags.items() if name not in FLAGS})
        _check_flags(flags, config)
        path = Path(flags["run"] or default_run(config))
        if flags["print_config"]:
            print(settings_text(config))
            return
        if flags["dry_run"]:
            # only one of several processes prints
            show_config(config, path, Output(quiet=os.environ.get("RANK", "0") != "0"))
            return
    # outside, where a signal ends the process: an exception could leave a module half imported
    from .train_run import run

    with one_line_errors("fastle-train"):
        run(config, path, flags)


def _check_flags(flags: dict[str, Any], config: RunConfig) -> None:
    if flags["download"] and config.data.dataset not in ("cifar10", "celeba"):
        raise ConfigError(f"--download fetches CIFAR-10 and CelebA only, not {config.data.dataset}")
    if flags["profile"] is None:
        if flags["against"] is not None:
            raise ConfigError(f"--against {flags['against']} has no effect without --profile N")
        return
    for name in ("log", "overwrite", "accept_new_data", "print_config", "dry_run"):
        if flags[name]:
            raise ConfigError(f"{FLAGS[name].flag} has no effect with --profile, which trains nothing")


def make_parser() -> Parser:
    """The parser of fastle-train."""
    parser = Parser(
        prog="fastle-train",
        # argparse would list every flag twice
        usage="%(prog)s DATASET [options]",
        allow_abbrev=False,
        description="Train an autoencoder that teaches itself. The dataset picks a preset, and flags override it.",
        epilog="The same command again goes on where the run stopped.",
    )
    groups = {name: parser.add_argument_group(name) for name in get_args(Group)}
    for option in (*OPTIONS.values(), *FLAGS.values()):
        add_option(parser if option.name == "dataset" else groups[option.group], option)
    return parser
