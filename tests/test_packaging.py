"""The package holds each file once, under one name, and imports from anywhere without loading what it does not need."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastle.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = (77, 0, 3)  # as in pyproject.toml
# slow to import, and only a few commands need them
HEAVY = ["matplotlib", "torchmetrics", "nvidia.dali"]
IMPORT = f"""
import importlib, json, pkgutil, sys
import fastle, fastle.kernels
heavy = [name for name in {HEAVY} if name in sys.modules]
kernels = [importlib.import_module(f"fastle.kernels.{{m.name}}") for m in pkgutil.iter_modules(fastle.kernels.__path__)]
print(json.dumps([heavy, [module.__file__ for module in (fastle, *kernels)]]))
"""


TORCH_ALONE = """
import sys
import torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from fastle import SIGReg, crop_resize, draw_slices, mask_channels, mask_fill, mask_patches, sigreg
SIGReg(num_slices=100)(torch.randn(200, 4, requires_grad=True)).backward()
images, zeros = torch.rand(2, 3, 8, 8, requires_grad=True), torch.zeros(2, dtype=torch.int64)
for view in (crop_resize(images, zeros, zeros, 4), mask_fill(images, zeros, zeros, 4, 4),
             mask_patches(images, zeros, ratio=0.5, patch=4), mask_channels(images, zeros, ratio=0.5)):
    view.sum().backward()
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""

BASE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import fastle
from fastle import Autoencoder, ModelConfig, FastleError
Autoencoder(ModelConfig(size=16, channels=1, hidden=8, map_channels=8, latent=None)).save_pretrained("model")
Autoencoder.from_pretrained("model")
try:
    fastle.fit
except FastleError as error:
    print(error)
from fastle.commands.start import fastle_train
fastle_train()
"""


def packaged() -> list[str]:
    """The sources that a distribution must hold, as paths below its root; kernels/ becomes fastle/kernels/."""
    own = [path.relative_to(ROOT) for path in (ROOT / "fastle").rglob("*.py")]
    operators = ["fastle" / path.relative_to(ROOT) for path in (ROOT / "kernels").iterdir() if _is_source(path.name)]
    assert own and operators
    return sorted(path.as_posix() for path in {*own, *operators})


def copy_sources(target: Path) -> Path:
    """Copies what a distribution is built from into a folder where setuptools may leave files."""
    target.mkdir()
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, target)
    for name in ("fastle", "kernels"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(source: Path, *options: str) -> Path:
    """Builds a distribution in this environment, without network; returns the folder that holds it."""
    try:
        importlib.metadata.version("build")
        setuptools = tuple(int(part) for part in importlib.metadata.version("setuptools").split(".")[:3])
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    if setuptools < SETUPTOOLS:
        pytest.skip(f"setuptools is older than {'.'.join(map(str, SETUPTOOLS))}")
    target = source.with_name("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)]
    done = subprocess.run(command, check=False, cwd=source.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def sources(names: list[str]) -> list[str]:
    """The sources among the names, sorted; a file that an archive holds twice appears twice."""
    return sorted(name for name in names if _is_source(name))


def _is_source(name: str) -> bool:
    return name.endswith((".py", ".cpp"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive. Beside it lies the wheel that was built from the archive, not from the checkout."""
    source = copy_sources(tmp_path_factory.mktemp("packaging") / "source")
    (source / "fastle" / "weights" / "toy").mkdir(parents=True)
    (source / "fastle" / "weights" / "toy" / "config.json").write_text("{}")
    return next(build(source).glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(sdist: Path) -> Path:
    """The wheel, unpacked as an installer would unpack it."""
    target = sdist.with_name("site-packages")
    with zipfile.ZipFile(next(sdist.parent.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


def test_kernels_link_is_relative_and_kernels_stay_out_of_the_way() -> None:
    assert (ROOT / "fastle" / "kernels").readlink() == Path("../kernels")
    # with an __init__.py the checkout's kernels/ would win over an installed package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_git_takes_the_link_as_a_link_and_ignores_no_source() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git refuses: {done.stderr.strip()}")
    files = set(done.stdout.splitlines())
    # git lists the content of a link that it follows, and the link itself otherwise
    assert "fastle/kernels" in files
    folders = ("fastle", "kernels", "bench", "tests")
    sources = {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert sources <= files


def test_wheel_and_sdist_hold_each_file_once(sdist: Path) -> None:
    with zipfile.ZipFile(next(sdist.parent.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert sources(names) == packaged()
    assert {"fastle/py.typed", "fastle/weights/toy/config.json"} <= set(names)
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert sources(names) == [*packaged(), "setup.py"]


def test_wheel_from_a_checkout_without_links(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    link = source / "fastle" / "kernels"
    link.unlink()
    link.write_text("../kernels")  # what git writes where there are no symbolic links
    with zipfile.ZipFile(next(build(source, "--wheel").glob("*.whl"))) as wheel:
        assert sources(wheel.namelist()) == packaged()


def test_metadata(installed: Path) -> None:
    metadata = importlib.metadata.Distribution.at(next(installed.glob("*.dist-info")))
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    commands = {entry.name: entry for entry in metadata.entry_points.select(group="console_scripts")}
    assert commands.keys() == {"fastle", "fastle-train"}
    assert all(callable(entry.load()) for entry in commands.values())


def test_linux_only_packages_are_asked_for_on_linux_only(installed: Path) -> None:
    requires = importlib.metadata.Distribution.at(next(installed.glob("*.dist-info"))).requires or []
    bound = [requirement for requirement in requires if requirement.startswith(("triton", "nvidia-dali"))]
    assert {requirement.partition(">")[0] for requirement in bound} == {"triton", "nvidia-dali-cuda130"}
    assert all('sys_platform == "linux"' in requirement for requirement in bound)


@pytest.mark.parametrize("form", ["checkout", "wheel"])
def test_import_from_another_directory(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = ROOT if form == "checkout" else request.getfixturevalue("installed")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, files = json.loads(done.stdout)
    assert heavy == []
    assert len(files) == 1 + len(list((ROOT / "kernels").glob("*.py")))
    assert all(Path(file).is_relative_to(root) for file in files)


def test_operators_need_torch_alone_and_load_no_compiler() -> None:
    others = ["filelock", "matplotlib", "nvidia", "PIL", "rich", "safetensors", "torchmetrics", "torchvision"]
    command = [sys.executable, "-c", TORCH_ALONE, *others]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_base_loads_models_and_names_the_extra_of_the_rest(tmp_path: Path) -> None:
    others = [*EXTRAS, "nvidia"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BASE, *others]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    needs = 'needs rich, which is not installed: pip install "fastle[train]"\n'
    assert (done.returncode, done.stdout) == (1, f"fastle.fit {needs}"), done.stderr
    assert done.stderr == f"fastle-train: error: fastle-train {needs}"


def test_every_package_has_its_extra(installed: Path) -> None:
    requires = importlib.metadata.Distribution.at(next(installed.glob("*.dist-info"))).requires or []
    base = [requirement for requirement in requires if "extra ==" not in requirement]
    assert sorted(base) == ["numpy", "safetensors", "torch>=2.4"]
    train, no_cuda = (
        {r.partition(";")[0].strip() for r in requires if f'extra == "{extra}"' in r}
        for extra in ("train", "train-no-cuda")
    )
    assert no_cuda < train and {name.split(">")[0] for name in train - no_cuda} == {"triton", "nvidia-dali-cuda130"}
    for extra in ("train", "train-no-cuda", "demo", "export", "perceptual"):
        assert any(r.startswith("torch>=2.11;") and f'extra == "{extra}"' in r for r in requires), extra
    for package, extra in EXTRAS.items():
        name = {"PIL": "pillow", "torch_fidelity": "torch-fidelity"}.get(package, package)
        assert any(r.startswith(name) and f'extra == "{extra}"' in r for r in requires), package
