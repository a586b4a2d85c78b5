"""The server of the latent brush: the files of the page, and three functions of the model.

    GET  /model.json          what the page must know of the model
    GET  /pictures/N.png      the pictures that it begins with
    POST /encode              uint8 images (B, size, size, C)  →  fp32 latents, little-endian
    POST /decode              fp32 latents                     →  uint8 images
    POST /decode?cells=R,C    parts of spatial latents         →  uint8 images, 8 R by 8 C pixels
    POST /reconstruct         uint8 images                     →  uint8 images

The server decodes no image files: the page does, and sends pixels. A request therefore has a known size, and is refused
before it is read if it has another. Raw pixels take the server less time than a PNG, and the browser too.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from torch import Tensor

from fastle.config import ConfigError

from .demo import BATCH, Demo
from .guard import Guard

PAGE = Path(__file__).parent / "brush"
BASE = Path(__file__).parent / "base.css"
MOST_WAITING = 8  # requests for the model at once; the page has one under way
SECONDS_TO_SEND = 10.0  # that a request may take to arrive


def make_app(demo: Demo, port: int) -> ASGIApp:
    """The application that answers the page of a demo, on a port of 127.0.0.1."""
    config = demo.model.config
    images = (demo.size, demo.size, config.channels)
    model = _Model()
    files = [picture.png() for picture in demo.pictures]

    async def manifest(request: Request) -> Response:
        return JSONResponse(demo.manifest("http"))

    async def picture(request: Request) -> Response:
        index = request.path_params["index"]
        if index >= len(files):
            raise HTTPException(404, "There is no such picture.")
        return Response(files[index], media_type="image/png")

    async def encode(request: Request) -> Response:
        return await model.answer(request, demo.encode, torch.uint8, images)

    async def decode(request: Request) -> Response:
        shape = _part_of(demo.latent_shape, request.query_params.get("cells"))
        return await model.answer(request, demo.decode, torch.float32, shape)

    async def reconstruct(request: Request) -> Response:
        return await model.answer(request, demo.reconstruct, torch.uint8, images)

    routes = [
        Route("/model.json", manifest),
        Route("/pictures/{index:int}.png", picture),
        *(Route(f"/{made.__name__}", made, methods=["POST"]) for made in (encode, decode, reconstruct)),
        Route("/base.css", lambda request: FileResponse(BASE)),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Guard(Starlette(routes=routes), port)


class _Model:
    """Calls a model, one request after the other."""

    def __init__(self) -> None:
        # one thread, since each that calls torch starts as many more as `_spare_a_core` allows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=_spare_a_core)
        self._waiting = 0

    async def answer(
        self, request: Request, call: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Response:
        """Reads tensors of a shape, at most `BATCH` of them, calls the model with them and sends what it returns."""
        if self._waiting >= MOST_WAITING:
            raise HTTPException(503, "The model is busy: ask again.", {"connection": "close"})
        self._waiting += 1
        try:
            body = await _read(request, BATCH * math.prod(shape) * dtype.itemsize)
            tensors = _tensors(body, dtype, shape)
            made = await asyncio.get_running_loop().run_in_executor(self._thread, call, tensors)
        finally:
            self._waiting -= 1
        return Response(made.numpy().tobytes(), media_type="application/octet-stream")


def _part_of(shape: tuple[int, ...], cells: str | None) -> tuple[int, ...]:
    """The shape of latents or, if `cells` is "R,C", of parts of R rows and C columns."""
    if cells is None:
        return shape
    extents = [int(extent) if re.fullmatch("[0-9]{1,4}", extent) else 0 for extent in cells.split(",")]
    if len(extents) != len(shape) - 1 or not all(0 < a <= b for a, b in zip(extents, shape[1:], strict=True)):
        raise HTTPException(400, "The latent has no part of so many cells.")
    return (shape[0], *extents)


def _spare_a_core() -> None:
    # torch's threads wait for each other at every layer: one that shares its core with the browser holds all of them up
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))


async def _read(request: Request, most: int) -> bytearray:
    """The body of a request of at most `most` bytes. What is longer is refused without being read."""
    too_long = HTTPException(413, f"At most {most:,} bytes are taken.", {"connection": "close"})
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most:
        raise too_long

    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > most:
                raise too_long

    try:
        await asyncio.wait_for(read(), SECONDS_TO_SEND)
    except asyncio.TimeoutError:
        raise HTTPException(408, "The request took too long to arrive.", {"connection": "close"}) from None
    return body


def _tensors(body: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    each = math.prod(shape) * dtype.itemsize
    if not body or len(body) % each:
        raise HTTPException(400, f"{len(body):,} bytes are no multiple of the {each:,} of one image or latent.")
    tensors = torch.frombuffer(body, dtype=dtype).view(-1, *shape)
    if not tensors.float().isfinite().all():
        raise HTTPException(400, "A number is not finite.")
    return tensors


def listen(port: int) -> socket.socket:
    """A socket of a port of 127.0.0.1, where no other machine reaches it.

    Args:
        port: 0 for any port that is free.

    Raises:
        ConfigError: Another program has the port.
    """
    # the protocol is named, because asyncio sends without delay on such sockets alone: an answer's header and its body
    # are two packets, and the second would wait 40 ms for the browser to acknowledge the first
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # a server that ended a moment ago does not hold its port
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"--port {port}: {error.strerror}; give another, or none to have a free one") from None
    return listening


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server of an application, to be run with the socket of `listen`."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="critical", access_log=False, server_header=False,
            timeout_keep_alive=5, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=16_384,
        )
    )  # fmt: skip
