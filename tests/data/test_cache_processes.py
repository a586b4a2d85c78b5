"""The packed cache: processes that are killed while they build it, and some that build it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.data.caches import opened, pixels

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("cache_home")


# one process that imports once and forks: before each fork no thread has been started
FORKS = """
import json, os, signal, sys, time, traceback, zlib
from pathlib import Path
from fastle.config import DataConfig
from fastle.data import Loading, open_images
from fastle.data.dali import why_no_dali

# imports what there is to import
why_no_dali()
root, work = sys.argv[1:3]
config = DataConfig(dataset="folder", root=root, size=16, channels=3)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def opened(track, out):
    said = []
    loading = Loading(decoder="torchvision", cache="disk", track=track, say=lambda text: said.append(str(text)))
    images = open_images(config, "train", loading)
    found = zlib.crc32(images.batch(range(len(images))).contiguous().numpy().tobytes())
    Path(out).write_text(json.dumps([found, "\\n".join(said)]))

def plain(items, description="", total=None):
    return items

def slowly(items, description="", total=None):
    for item in items:
        time.sleep(0.1)
        yield item

def dying(last):
    seen = [0]
    def track(items, description="", total=None):
        for item in items:
            yield item
            seen[0] += 1
            if seen[0] == last:
                die()
    return track

def fork(act):
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def home(name):
    path = Path(work, name)
    path.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(path)
    return path

def whole(path):
    # what has the name of a cache: other files there may be those of other programs
    return [str(p) for p in path.rglob("*.safetensors")]

def killed(name, prepare, track=plain):
    path = home(name)
    def act():
        prepare()
        opened(track, os.devnull)
    status, left = ended(fork(act)), whole(path)
    again = ended(fork(lambda: opened(plain, work + f"/{name}.json")))
    return {"status": status, "left": left, "again": again, "after": whole(path)}

def patched(*names):
    return lambda: [setattr(os, name, die) for name in names]

report = {}
for last in (1, 2, 3):
    report[f"item{last}"] = killed(f"item{last}", lambda: None, dying(last))
report["rename"] = killed("rename", patched("rename", "replace", "link"))
report["fsync"] = killed("fsync", patched("fsync", "fdatasync"))

# whatever moment a signal from outside finds it in
path = home("measure")
began = time.perf_counter()
ended(fork(lambda: opened(plain, work + "/measure.json")))
took = time.perf_counter() - began
for tenths in range(1, 10, 2):
    name = f"time{tenths}"
    path = home(name)
    child = fork(lambda: opened(plain, os.devnull))
    time.sleep(took * tenths / 10)
    os.kill(child, signal.SIGKILL)
    status, left = ended(child), whole(path)
    again = ended(fork(lambda: opened(plain, work + f"/{name}.json")))
    report[name] = {"status": status, "left": left, "again": again, "after": whole(path)}

# three at once
path = home("together")
children = [fork(lambda i=i: opened(slowly, work + f"/together{i}.json")) for i in range(3)]
report["together"] = {"statuses": [ended(child) for child in children], "after": whole(path)}
Path(work, "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def forks(many: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What became of processes that were killed while they built, and of three that built at once."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("needs os.fork")
    work = tmp_path_factory.mktemp("forks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS, str(many), str(work)]
    ran = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return work, json.loads((work / "report.json").read_text())


def crc(images: Tensor) -> int:
    return zlib.crc32(images.contiguous().numpy().tobytes())


KILLED = ["item1", "item2", "item3", "rename", "fsync", *(f"time{tenths}" for tenths in range(1, 10, 2))]


@pytest.mark.parametrize("moment", KILLED)
def test_killed_while_building_leaves_nothing_that_is_taken_for_whole(
    moment: str, forks: tuple[Path, dict[str, Any]], many: Path
) -> None:
    work, report = forks
    killed = report[moment]
    if moment in ("item1", "rename"):
        assert killed["status"] == -9
    if not moment.startswith("time"):
        assert killed["left"] == [] or killed["status"] == 0
    # a signal from outside may come when the file is whole; nothing else may have the name
    reused = killed["left"] != []
    assert killed["again"] == 0
    right, said = json.loads((work / f"{moment}.json").read_text())
    assert right == crc(pixels(many))
    assert ("reused" in said) == reused
    assert len(killed["after"]) == 1
    # the partial file of the dead is gone, too
    left = [str(path) for path in (work / moment / "fastle").iterdir() if path.suffix != ".lock"]
    assert left == killed["after"]


def test_processes_that_build_at_once_end_with_one_whole_file(
    forks: tuple[Path, dict[str, Any]], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, report = forks
    together = report["together"]
    assert together["statuses"] == [0, 0, 0] and len(together["after"]) == 1
    ends = [json.loads((work / f"together{i}.json").read_text()) for i in range(3)]
    assert {right for right, _ in ends} == {crc(pixels(many))}
    # one builds, and the others wait for it
    assert sum("reused" in said for _, said in ends) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "together"))
    assert "reused" in opened(many)[1]
