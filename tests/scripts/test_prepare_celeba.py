"""The script that prepares CelebA: it names the layout, what is missing and bad images, and builds the cache."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import prepare_celeba

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_celeba.py"
# the numbers of the images in each split
PARTS = {"train": [1, 2, 3, 6], "valid": [4], "test": [5, 7]}
CODES = {number: code for code, numbers in enumerate(PARTS.values()) for number in numbers}
SHARDS = {
    "train-00000-of-00002.parquet": [1, 2, 3],
    "train-00001-of-00002.parquet": [6],
    "valid-00000-of-00001.parquet": [4],
    "test-00000-of-00001.parquet": [5, 7],
}
COUNTS = [
    "train: 4 images (CelebA has 162,770)",
    "valid: 1 images (CelebA has 19,867)",
    "test: 2 images (CelebA has 19,962)",
]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where caches go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    # a line, however long, stays one
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "caches"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "my celeba"
    folder.mkdir()
    return folder


def encoded(number: int, kind: str = "JPEG", size: tuple[int, int] = (178, 218)) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in CODES:
        (folder / f"{number:06}.jpg").write_bytes(encoded(number))


def write_txt(folder: Path) -> None:
    lines = [f"{number:06}.jpg {CODES[number]}\n" for number in sorted(CODES)]
    (folder / "list_eval_partition.txt").write_text("".join(lines))


def write_csv(folder: Path) -> None:
    lines = ["image_id,partition\r\n", *(f"{number:06}.jpg,{CODES[number]}\r\n" for number in sorted(CODES))]
    (folder / "list_eval_partition.csv").write_bytes("".join(lines).encode())


def write_parquet(folder: Path, shards: Mapping[str, Sequence[int]] = SHARDS) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in shards.items():
        rows = [{"bytes": encoded(number, "PNG"), "path": f"{number:06}.jpg"} for number in numbers]
        pyarrow.parquet.write_table(pa.table({"image": rows}), folder / name, row_group_size=2)


# where the images lie, where the partition lies and how it is written, what the script calls it
LAYOUTS: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "torchvision": ("celeba/img_align_celeba", "celeba", write_txt, "torchvision's"),
    "torchvision-flat": ("", "", write_txt, "torchvision's"),
    "kaggle": ("img_align_celeba/img_align_celeba", "", write_csv, "Kaggle's"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit status, the lines of the output, and the errors."""
    status = prepare_celeba.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out.splitlines(), shown.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, _, errors = run(capsys, *arguments)
    assert status == 1 and errors.count("error:") == 1 and "Traceback" not in errors
    return errors[errors.index("prepare_celeba.py: error: ") + len("prepare_celeba.py: error: ") :]


def prepared(lines: list[str], root: Path) -> None:
    assert [line[: len(count)] for line, count in zip(lines[1:4], COUNTS, strict=True)] == COUNTS
    assert "all 7 images are good" in lines
    assert lines[-1] == f"to train: fastle-train celeba --data '{root}'"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_partition(layout: str, root: Path, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images_at, partition_at, write_partition, whose = LAYOUTS[layout]
    write_images(root / images_at)
    write_partition(root / partition_at)
    status, lines, errors = run(capsys, root)
    assert status == 0, errors
    (partition,) = (root / partition_at).glob("list_eval_partition.*")
    assert lines[0] == f"layout: {whose}, images in {root / images_at}, partition in {partition}"
    prepared(lines, root)
    assert [path.suffix for path in caches.rglob("*") if path.stat().st_size > 4 * 128 * 128 * 3] == [".safetensors"]
    # the second time the cache is there
    status, lines, _ = run(capsys, root)
    assert status == 0 and any("reused" in line for line in lines)
    prepared(lines, root)


@pytest.mark.parametrize("inside", ["", "data"], ids=["flat", "nested"])
def test_parquet_files(inside: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(root / inside)
    status, lines, errors = run(capsys, root)
    assert status == 0, errors
    assert lines[0] == f"layout: Hugging Face's, parquet files in {root / inside}"
    prepared(lines, root)


def test_check_writes_nothing(root: Path, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(root)
    write_txt(root)
    before = sorted(root.iterdir())
    status, lines, errors = run(capsys, root, "--check", "--size", "96")
    assert status == 0, errors
    assert not caches.exists() and sorted(root.iterdir()) == before
    assert "all 7 images are good" in lines
    assert lines[-2:] == [
        f"to build the cache: python scripts/prepare_celeba.py '{root}' --size 96",
        f"to train: fastle-train celeba --data '{root}' --size 96",
    ]


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["build", "check"])
def test_all_bad_images_are_in_one_message(
    flags: tuple[str, ...], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(root)
    write_txt(root)
    bad = {
        2: (encoded(2)[:2000], "does not decode: "),
        3: (b"", "is empty"),
        4: (b"<html>quota exceeded</html>", "is an HTML page: "),
        6: (b"8BPS", "is a Photoshop file, "),
        7: (encoded(7, size=(100, 120)), "is 100x120, smaller than the 128x128 asked for"),
    }
    for number, (data, _) in bad.items():
        (root / f"{number:06}.jpg").write_bytes(data)
    first, *lines = refusal(capsys, root, *flags).splitlines()
    assert first.startswith("5 bad images: download them again, or ")
    assert len(lines) == 5
    for number, (_, fault) in bad.items():
        assert any(line.startswith(f"  {root / f'{number:06}.jpg'} {fault}") for line in lines), (number, lines)


def write_one_shard_less(folder: Path) -> None:
    write_parquet(folder, {name: rows for name, rows in SHARDS.items() if "train-00001" not in name})


def write_train_alone(folder: Path) -> None:
    write_images(folder)
    (folder / "list_eval_partition.txt").write_text("000001.jpg 0\n000004.jpg 1\n")


MISSING: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, "no CelebA at {root}: "),
    "images": (write_txt, "{root}: no images: extract img_align_celeba.zip to {root}/img_align_celeba"),
    "a-shard": (
        write_one_shard_less,
        "{root}: 1 of 2 files are missing, train-00001-of-00002.parquet first: download them",
    ),
    "test-images": (write_train_alone, "{root}: the test split has no images"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_and_where_it_comes_from(what: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, message = MISSING[what]
    write(root)
    shown = refusal(capsys, root)
    fault, empty, *sources = shown.splitlines()
    assert fault.startswith(message.format(root=root)) and empty == ""
    # once, though all splits lack it
    assert fault.count(message.format(root=root)) == 1
    commands = [line.strip() for line in sources if line.startswith("      ")]
    assert commands == [
        "pip install gdown",
        f"python -c \"from torchvision.datasets import CelebA; CelebA('{root}', download=True)\"",
        f"unzip -q '{root}'/img_align_celeba.zip -d '{root}'",
        "pip install kaggle",
        f"kaggle datasets download jessicali9530/celeba-dataset -p '{root}' --unzip",
        "pip install huggingface_hub pyarrow",
        f"hf download flwrlabs/celeba --repo-type dataset --include \"img_align+identity+attr/*\" --local-dir '{root}'",
    ]
    assert "img_align_celeba.zip (Img) and list_eval_partition.txt (Eval)" in shown


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "--size 256 cannot be: the images of CelebA are 178x218 and are not resized"),
        (100, "--size must be divisible by 8, such as 96, not 100"),
    ],
)
def test_an_impossible_size(size: int, message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, root, "--size", size).startswith(message)


def test_as_a_command(root: Path) -> None:
    write_images(root)
    write_txt(root)
    (root / "000006.jpg").write_bytes(b"")
    command = [sys.executable, str(SCRIPT), str(root), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1 and f"  {root / '000006.jpg'} is empty" in done.stderr.splitlines()
    assert done.stdout.startswith("layout: torchvision's, images in ")


def test_an_unknown_flag_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys, root, "--such")
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
