"""The latent brush without a server: a folder that any web host serves, whose model computes in the browser."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from fastle.errors import FastleError
from fastle.method.export import Part, export_model

from .demo import Demo
from .runtime import FILES, VERSION

PAGE = Path(__file__).parent / "brush"
BASE = PAGE.parent / "base.css"
PARTS: dict[str, Part] = {"encoder": "encode", "decoder": "decode"}
ABOUT = """\
A page to paint in the latent of {name}, made by fastle {fastle}. Any web host serves this folder; on this machine

    python -m http.server --bind 127.0.0.1 --directory FOLDER

does, and the page is at http://127.0.0.1:8000. It asks nothing of another host.

LICENSE         of the page, which is a part of fastle
runtime/        ONNX Runtime Web {runtime}, with its licence and notices
model/          the model; its licence is that of whoever trained it
"""


class StaticPageError(FastleError):
    """The folder of a page cannot be written."""


def write_static_page(demo: Demo, folder: Path, runtime: dict[str, bytes], licenses: dict[str, bytes]) -> int:
    """Writes the page of a demo, its model as ONNX, and what computes it.

    Args:
        demo: On the CPU.
        folder: There is none yet, or it is empty.
        runtime, licenses: See `read_runtime` and `read_licenses`.

    Returns:
        The size of the folder, bytes.

    Raises:
        FastleError: The model cannot be exported, or the folder cannot be written. Then nothing is left of it.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / "page"
            _write(demo, made, runtime, licenses)
            size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            # takes the place of an empty folder too
            made.replace(folder)
    except OSError as error:
        raise StaticPageError(
            f"cannot write {folder}: {error.strerror or error}; make room or give another --web (nothing is left of it)"
        ) from None
    return size


def _write(demo: Demo, folder: Path, runtime: dict[str, bytes], licenses: dict[str, bytes]) -> None:
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("http.js"))
    ours, own_license = _this_package()
    about = ABOUT.format(name=demo.source, fastle=ours, runtime=VERSION)
    files = {
        "base.css": BASE.read_bytes(),
        "model.json": json.dumps(demo.manifest("onnx")).encode(),
        **{f"pictures/{i}.png": picture.png() for i, picture in enumerate(demo.pictures)},
        # a host that does not know .mjs would not serve it as a script
        **{f"runtime/{name.replace('.mjs', '.js')}": runtime[name] for name in FILES},
        **{f"runtime/{name}": content for name, content in licenses.items()},
        "LICENSE": own_license.encode(),
        "README.txt": about.encode(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name, part in PARTS.items():
        export_model(demo.model, folder / "model" / f"{name}.onnx", form="onnx", part=part)


def _this_package() -> tuple[str, str]:
    """The version and the licence of fastle."""
    try:
        package = metadata.distribution("fastle")
        # the metadata that setuptools leaves in a checkout holds no licence, but the checkout does
        beside = Path(str(package.locate_file("LICENSE")))
        in_checkout = (beside.parent / "setup.py").is_file()
        text = beside.read_text(encoding="utf-8") if in_checkout else package.read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        text = None
    if text is None:
        raise StaticPageError("fastle's licence is not at hand, since fastle is not installed: pip install it")
    return package.version, text
