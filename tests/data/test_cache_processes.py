"""The packed cache: processes that are killed while they build it, and several that build it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.data.caches import pixels

ROOT = Path(__file__).parents[2]

# one process imports everything and then forks; it has started no thread before a fork
FORKS = """
import json, os, signal, sys, time, traceback, zlib
from pathlib import Path
from fastle.config import DataConfig
from fastle.data import Loading, open_images
from fastle.data.dali import why_no_dali

# whoever decodes imports it, which takes longer than its decoding
import torchvision.transforms.v2.functional

why_no_dali()
root, work = sys.argv[1:3]
config = DataConfig(dataset="folder", root=root, size=16, channels=3)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def opened(track, out):
    said = []
    loading = Loading(decoder="torchvision", cache="disk", track=track, say=lambda text: said.append(str(text)))
    images = open_images(config, "train", loading)
    crc = zlib.crc32(images.batch(range(len(images))).contiguous().numpy().tobytes())
    Path(out).write_text(json.dumps([crc, "\\n".join(said)]))

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
    os.environ["XDG_CACHE_HOME"] = str(Path(work, name))

def whole(name):
    return [str(p) for p in Path(work, name).rglob("*.safetensors")]

report = {}

def killed(name, act):
    home(name)
    status, left = ended(fork(act)), whole(name)
    again = ended(fork(lambda: opened(plain, work + f"/{name}.json")))
    report[name] = {"status": status, "left": left, "again": again, "after": whole(name)}

killed("item3", lambda: opened(dying(3), os.devnull))
for name, functions in (("rename", ("rename", "replace", "link")), ("fsync", ("fsync", "fdatasync"))):
    killed(name, lambda: ([setattr(os, function, die) for function in functions], opened(plain, os.devnull)))

# three at once, and one more
home("together")
children = [fork(lambda i=i: opened(slowly, work + f"/together{i}.json")) for i in range(3)]
statuses = [ended(child) for child in children] + [ended(fork(lambda: opened(plain, work + "/together3.json")))]
report["together"] = {"statuses": statuses, "after": whole("together")}
Path(work, "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def forks(many: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the processes' files, and a report of how they ended."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("needs os.fork")
    work = tmp_path_factory.mktemp("forks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS, str(many), str(work)]
    ran = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return work, json.loads((work / "report.json").read_text())


@pytest.mark.parametrize("moment", ["item3", "rename", "fsync"])
def test_a_killed_build_leaves_nothing_that_passes_for_whole(
    moment: str, forks: tuple[Path, dict[str, Any]], many: Path
) -> None:
    work, report = forks
    killed = report[moment]
    if moment != "fsync":
        assert killed["status"] == -9
    assert killed["left"] == [] or killed["status"] == 0
    assert killed["again"] == 0
    crc, said = json.loads((work / f"{moment}.json").read_text())
    assert crc == zlib.crc32(pixels(many).numpy().tobytes())
    assert ("reused" in said) == (killed["left"] != [])
    # nor is a partial file left
    left = [str(path) for path in (work / moment / "fastle").iterdir() if path.suffix != ".lock"]
    assert left == killed["after"] and len(left) == 1


def test_processes_that_build_at_once_leave_one_whole_file(forks: tuple[Path, dict[str, Any]], many: Path) -> None:
    work, report = forks
    together = report["together"]
    assert together["statuses"] == [0, 0, 0, 0] and len(together["after"]) == 1
    ends = [json.loads((work / f"together{i}.json").read_text()) for i in range(4)]
    assert {crc for crc, _ in ends} == {zlib.crc32(pixels(many).numpy().tobytes())}
    # one builds while the others wait, and they reuse what it built
    assert sum("reused" in said for _, said in ends) == 3
