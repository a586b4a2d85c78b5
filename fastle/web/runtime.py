"""The files of onnxruntime-web, which computes ONNX in a browser.

They are 14 MB, so fastle does not carry them: they come from npm's registry once and stay in fastle's cache, or from
where the user says. Wherever they come from, their checksums are those of one version, with which the tests run.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import re
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

from fastle.data.cache import cache_folder
from fastle.errors import FastleError
from fastle.extras import missing_extra
from fastle.files import one_line, write_atomic

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
# the files of its folder dist that a page needs, and their SHA-256
FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
# the npm package carries neither; they are those of the Python package of the same project
LICENSES = ("LICENSE", "ThirdPartyNotices.txt")
LARGEST = 2**27  # bytes of an archive that is fetched
PATIENCE = 30.0  # seconds without an answer
WAY_OUT = f"run npm pack onnxruntime-web@{VERSION}, then give --runtime onnxruntime-web-{VERSION}.tgz"


class RuntimeFilesError(FastleError):
    """The files of onnxruntime-web cannot be had, or are not those of the version that fastle knows."""


def read_runtime(source: str | None, say: Callable[[str], None]) -> dict[str, bytes]:
    """The files of `FILES`, by name.

    Args:
        source: The npm package, as an archive, a folder or the address of an archive; None for the one in fastle's
            cache, which npm's registry fills.
        say: Shows what is downloaded.

    Raises:
        RuntimeFilesError: They cannot be read or fetched, or have other checksums.
    """
    if source is None:
        return _of_cache(cache_folder() / f"onnxruntime-web-{VERSION}", say)
    if re.match("https?://", source):
        say(f"downloading onnxruntime-web {VERSION} from {source}")
        return _checked(_of_archive(_fetch(source), source), source)
    path = Path(source).expanduser()
    return _checked(_of_folder(path) if path.is_dir() else _of_archive(_read(path), source), source)


def read_licenses() -> dict[str, bytes]:
    """The licence of ONNX Runtime and the notices of what it contains, by the names of their files.

    Raises:
        FastleError: Onnxruntime is not installed, or has no such files.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_extra(error, "--web") or error from None
    folder = Path(onnxruntime.__file__).parent
    try:
        return {name: (folder / name).read_bytes() for name in LICENSES}
    except OSError as error:
        raise RuntimeFilesError(
            f"the licence of ONNX Runtime is not in {folder} ({error.strerror}): "
            "pip install --force-reinstall onnxruntime"
        ) from None


def _of_cache(folder: Path, say: Callable[[str], None]) -> dict[str, bytes]:
    try:
        return _checked({name: (folder / name).read_bytes() for name in FILES}, str(folder))
    except (OSError, RuntimeFilesError):
        # not there yet, or damaged
        say(f"downloading onnxruntime-web {VERSION} from {URL} into {folder}")
    files = _checked(_of_archive(_fetch(URL), URL), URL)
    for name, content in files.items():
        write_atomic(folder / name, content, "make room, or set XDG_CACHE_HOME to another folder")
    return files


def _checked(files: dict[str, bytes], source: str) -> dict[str, bytes]:
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != FILES[name]:
            raise RuntimeFilesError(f"{source}: its {name} is not that of onnxruntime-web {VERSION}: {WAY_OUT}")
    return files


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return bytes(response.read(LARGEST))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeFilesError(
            f"onnxruntime-web {VERSION} cannot be downloaded from {url} ({one_line(error)}): where there is a network, "
            f"{WAY_OUT}"
        ) from None


def _of_folder(folder: Path) -> dict[str, bytes]:
    # the package as npm installs or unpacks it, or its folder dist
    places = (folder / "dist", folder / "package" / "dist", folder)
    place = next((place for place in places if (place / next(iter(FILES))).is_file()), folder)
    return {name: _read(place / name) for name in FILES}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RuntimeFilesError(f"--runtime: {path} cannot be read ({error.strerror}): {WAY_OUT}") from None


def _of_archive(archive: bytes, source: str) -> dict[str, bytes]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
            members = {name: package.extractfile(f"package/dist/{name}") for name in FILES}
            return {name: member.read() if member else b"" for name, member in members.items()}
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error):
        raise RuntimeFilesError(f"{source} is not the npm package onnxruntime-web {VERSION}: {WAY_OUT}") from None
