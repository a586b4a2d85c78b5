"""A run with a tiny model, the latent brush's server of a model on a free port, and a browser."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastle.checkpoint import save_checkpoint
from fastle.presets import make_config
from fastle.training.trainer import Trainer
from fastle.web.demo import open_demo
from fastle.web.runtime import RuntimeFilesError, read_licenses, read_runtime
from fastle.web.server import listen, make_app, make_server
from fastle.web.static_page import write_static_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser_for_tests() -> Iterator[Browser]:
    """Chromium without a window. Skips the test that asks for it where there is none, or no Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    # root has no sandbox
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@contextmanager
def quiet_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page at an address, in a context of its own, that shall print nothing and ask nobody but its own host."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    own = ("data:", "blob:", url.rstrip("/"))
    page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert not faults, faults


def untrained_run(run: Path, **flags: int | bool) -> Path:
    """A run directory whose model has the weights that it began with."""
    torch.manual_seed(0)
    small = {"size": 32, "hidden": 8, "map_channels": 8, "batch_size": 4, "slices": 8}
    config = make_config("folder", **(small | flags))
    trainer = Trainer(config, torch.device("cpu"), total_steps=1)
    # a checkpoint has no empty section
    sections = {name: tensors for name, tensors in trainer.state().items() if tensors}
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    save_checkpoint(run, 1, sections, {"step": 1, "train_images": 5, "config": config.to_dict()})
    return run


@contextmanager
def served(model: Path | str, size: int | None = None) -> Iterator[int]:
    """The port of a server in this process."""
    demo, _ = open_demo(str(model), torch.device("cpu"), size)
    with listen(0) as listening:
        port = listening.getsockname()[1]
        server = make_server(make_app(demo, port))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


class StrictHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with as strict a policy as a host may have."""

    def end_headers(self) -> None:
        policy = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src 'self'"
        self.send_header("content-security-policy", f"{policy}; worker-src 'self'; img-src 'self' blob:")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@contextmanager
def served_static(folder: Path, model: str, size: int) -> Iterator[int]:
    """The port of a server of files, of the static page of a model. Skips the test where the runtime cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        # it is 33 MB, and outlives the tests
        patch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        try:
            runtime = read_runtime(None, print)
        except RuntimeFilesError as error:
            pytest.skip(str(error))
    demo, _ = open_demo(model, torch.device("cpu"), size)
    write_static_page(demo, folder, runtime, read_licenses())
    handler = functools.partial(StrictHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
