"""fastle export --web: where the runtime's files come from, and what is refused before anything is written."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastle.web.runtime
import fastle.web.static_page
from fastle.method.export import ExportError
from fastle.web.runtime import RuntimeFilesError, read_runtime
from tests.commands.trained import Command, command, save_model
from tests.web.served import StrictHandler

__all__ = ["command"]
CONTENTS = {name: f"the content of {name}".encode() for name in fastle.web.runtime.FILES}


@pytest.fixture(autouse=True)
def small_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A runtime of a few bytes, and an empty cache."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(fastle.web.runtime, "FILES", sums)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def archive(contents: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as package:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return written.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a package, which is also where fastle looks by default."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "runtime.tgz").write_bytes(archive(CONTENTS))

    def handler(*given: object) -> StrictHandler:
        return StrictHandler(*given, directory=str(tmp_path / "registry"))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://127.0.0.1:{server.server_port}/runtime.tgz"
        monkeypatch.setattr(fastle.web.runtime, "URL", url)
        yield url
        server.shutdown()


def test_the_runtime_comes_from_an_archive_a_folder_or_an_address(tmp_path: Path, registry: str) -> None:
    (tmp_path / "given.tgz").write_bytes(archive(CONTENTS))
    for folder in ("plain", "node_modules/onnxruntime-web/dist", "unpacked/package/dist"):
        (tmp_path / folder).mkdir(parents=True)
        for name, content in CONTENTS.items():
            (tmp_path / folder / name).write_bytes(content)
    for source in ("given.tgz", "plain", "node_modules/onnxruntime-web", "unpacked"):
        assert read_runtime(str(tmp_path / source), print) == CONTENTS
    assert read_runtime(registry, print) == CONTENTS
    assert not (tmp_path / "cache").exists()


def test_the_runtime_is_downloaded_once(tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert [read_runtime(None, said.append) for _ in range(2)] == [CONTENTS, CONTENTS]
    assert len(said) == 1 and f"from {registry} into {tmp_path / 'cache'}" in said[0]
    damaged = next((tmp_path / "cache").rglob("*.wasm"))
    damaged.write_bytes(b"half")
    assert read_runtime(None, said.append) == CONTENTS and len(said) == 2
    damaged.unlink()
    monkeypatch.setattr(fastle.web.runtime, "URL", registry.replace("runtime.tgz", "nothing.tgz"))
    with pytest.raises(RuntimeFilesError, match=r"cannot be downloaded .* there is a network, run npm pack"):
        read_runtime(None, said.append)


def test_a_runtime_of_another_version_is_refused(tmp_path: Path) -> None:
    for name, content, fault in (
        ("other.tgz", archive(dict.fromkeys(CONTENTS, b"other")), "is not that of onnxruntime-web"),
        ("lacking.tgz", archive({}), "is not the npm package"),
        ("half.tgz", archive(CONTENTS)[:100], "is not the npm package"),
        ("text.tgz", b"text", "is not the npm package"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeFilesError, match=f"{fault}.*run npm pack onnxruntime-web@"):
            read_runtime(str(tmp_path / name), print)


def test_a_page_is_written_whole_or_not_at_all(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "given.tgz").write_bytes(archive(CONTENTS))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    def files() -> list[Path]:
        # onnxruntime keeps notes in the cache
        return sorted(path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts)

    before = files()

    def fails(*_: object, **__: object) -> None:
        raise ExportError("onnx of encode: it is off")

    monkeypatch.setattr(fastle.web.static_page, "export_model", fails)
    for flags, fault in (
        (["--web", "full"], "--web full is not empty: give a new folder, or empty it"),
        (["--web", "given.tgz"], "--web given.tgz is no folder"),
        (["--web", "given.tgz/page"], "no file can be written to"),
        (["--web", "page", "--part", "encode"], "--part is for --onnx and --torch-export"),
        (["--onnx", "m.onnx", "--size", "64"], "--size and --runtime are for a page: give --web DIR too"),
        (["--web", "page", "--size", "60"], "--size must be divisible by 8"),
        (["--web", "page", "--runtime", "nothing.tgz"], "nothing.tgz cannot be read (No such file or directory)"),
        (["--web", "new/page", "--runtime", "given.tgz"], "it is off"),
    ):
        status, _, err = command("export", "model", *flags)
        assert status == 1 and fault in err and err.count("\n") == 1
        assert files() == before

    monkeypatch.setattr(fastle.web.static_page, "export_model", lambda *_, **__: None)
    (tmp_path / "empty").mkdir()
    status, out, _ = command("export", "model", "--web", "empty", "--runtime", "given.tgz")
    assert status == 0 and "written to empty" in out
    for name in ("index.html", "base.css", "model.json", "LICENSE", "README.txt", "runtime/LICENSE", "pictures/0.png"):
        assert (tmp_path / "empty" / name).stat().st_size
