"""A run with a tiny model, and the latent brush's server of it on a free port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastle.checkpoint import save_checkpoint
from fastle.presets import make_config
from fastle.training.trainer import Trainer
from fastle.web.demo import open_demo
from fastle.web.server import listen, make_app, make_server


def untrained_run(run: Path, **flags: int | bool) -> Path:
    """A run directory whose model has the weights that it began with."""
    torch.manual_seed(0)
    config = make_config("folder", size=32, hidden=8, map_channels=8, batch_size=4, slices=8, **flags)
    trainer = Trainer(config, torch.device("cpu"), total_steps=1)
    # a checkpoint has no empty section
    sections = {name: tensors for name, tensors in trainer.state().items() if tensors}
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    save_checkpoint(run, 1, sections, {"step": 1, "train_images": 5, "config": config.to_dict()})
    return run


@contextmanager
def served(run: Path) -> Iterator[int]:
    """The port of a server in this process."""
    demo, _ = open_demo(str(run), torch.device("cpu"))
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
