"""What holds for every test and for the processes that tests start."""

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

# tests compute on small tensors, where a second thread costs more than it brings. torch reads this when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nor do tests compile enough to repay processes for it, each of which imports torch
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# two processes of one machine: the host's name may resolve to an address that leads nowhere
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch

# packed caches do not outlive the tests
CACHE = tempfile.TemporaryDirectory(prefix="fastle-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# without a GPU kernels run in Triton's interpreter. triton reads this when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# whoever starts the tests in the background may have them ignore signals, and fastle leaves ignored ones alone
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)

# `from tests import oracle` works wherever pytest is started from, and in spawned processes
sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the slow folders first, so that no process is left alone with them at the end
    slow = ("training", "bench", "scripts", "profiling", "ptx", "web")
    items.sort(key=lambda item: item.path.parent.name not in slow)


def pytest_collection_finish() -> None:
    # every trainer collects garbage before it looks how much memory is free. it need not search what is imported by
    # now, which takes longer than most tests train
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them would take most of a tiny run's time; test_what_a_run_leaves and test_report.py do."""
    if "fastle.training.run" in sys.modules:
        monkeypatch.setattr("fastle.training.run.save_curves", lambda path, rows: None)
