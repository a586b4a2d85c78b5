"""fastle brush: a page on this machine, where people paint in the latent of a model."""

from __future__ import annotations

import argparse

import torch

from fastle.config import ConfigError
from fastle.extras import missing_extra
from fastle.machine import pick_device
from fastle.web.demo import open_demo

from .cli import Output


def run(flags: argparse.Namespace, console: Output) -> None:
    """Serves the page until a signal ends it."""
    _brush(flags.model, flags.size, flags.port, pick_device(flags.device or "auto", console), console)


def _brush(name: str, size: int | None, port: int, device: torch.device, console: Output) -> None:
    try:
        from fastle.web.server import listen, make_app, make_server
    except ModuleNotFoundError as error:
        raise missing_extra(error, "fastle brush") or error from None
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be at most {2**16 - 1}, not {port}")
    demo, remark = open_demo(name, device, size)
    if remark:
        console.say(remark)
    with listen(port) as listening:
        port = listening.getsockname()[1]
        console.say(f"{name} is at http://127.0.0.1:{port} for browsers on this machine; Ctrl-C ends it")
        make_server(make_app(demo, port)).run(sockets=[listening])
