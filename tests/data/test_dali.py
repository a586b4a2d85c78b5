from __future__ import annotations

import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor

from fastle.data import dali
from fastle.data.dali import DaliDecoder, why_no_dali
from fastle.data.decode import BadFiles, DiskFile, TorchvisionDecoder
from tests.data.pictures import chunk, encoded, with_alpha

pytestmark = pytest.mark.skipif(why_no_dali() is not None, reason=f"no DALI: {why_no_dali()}")

Picture = Callable[..., Image.Image]
Encode = Callable[[Image.Image], bytes]
Write = Callable[[bytes, str], DiskFile]


def turned(image: Image.Image, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, kind, exif=exif)


def without(data: bytes, share: float) -> bytes:
    return data[: round(len(data) * (1 - share))]


def sixteen_bits(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257 + 3), "PNG")


def interlaced(image: Image.Image) -> bytes:
    starts = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [np.asarray(image)[y::dy, x::dx] for x, y, dx, dy in starts]
    raw = b"".join(b"\x00" + row.tobytes() for part in passes for row in part)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def with_gamma(image: Image.Image) -> bytes:
    data = encoded(image, "PNG")
    return data[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + data[33:]


KINDS: dict[str, Encode] = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=75),
    "jpeg-444": lambda image: encoded(image, "JPEG", quality=95, subsampling=0),
    "jpeg-422": lambda image: encoded(image, "JPEG", subsampling=1),
    "jpeg-progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "jpeg-restarts": lambda image: encoded(image, "JPEG", restart_marker_rows=1),
    "jpeg-grey": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg-rgb": lambda image: encoded(image, "JPEG", keep_rgb=True),
    "jpeg-cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "jpeg-turned": lambda image: turned(image, "JPEG"),
    "jpeg-padded": lambda image: encoded(image, "JPEG") + bytes(40),
    "jpeg-trailing": lambda image: encoded(image, "JPEG") + b"more",
    # no decoder sees more than that the rest is missing
    "jpeg-cut-and-ended": lambda image: without(encoded(image, "JPEG"), 0.05) + b"\xff\xd9",
    "png": lambda image: encoded(image, "PNG"),
    "png-alpha": lambda image: encoded(with_alpha(image), "PNG"),
    "png-grey": lambda image: encoded(image.convert("L"), "PNG"),
    "png-grey-alpha": lambda image: encoded(with_alpha(image).convert("LA"), "PNG"),
    "png-grey-transparent": lambda image: encoded(image.convert("L"), "PNG", transparency=90),
    "png-transparent": lambda image: encoded(image, "PNG", transparency=image.getpixel((0, 0))),
    "png-palette": lambda image: encoded(image.quantize(200), "PNG"),
    "png-palette-4": lambda image: encoded(image.quantize(16), "PNG"),
    "png-palette-alpha": lambda image: encoded(image.quantize(99), "PNG", transparency=bytes(range(0, 250, 5))),
    "png-1": lambda image: encoded(image.convert("1"), "PNG"),
    "png-16": sixteen_bits,
    "png-interlaced": interlaced,
    "png-turned": lambda image: turned(image, "PNG"),
    "png-gamma": with_gamma,
    "png-profile": lambda image: encoded(image, "PNG", icc_profile=b"no profile", dpi=(3, 3)),
    "png-without-end": lambda image: encoded(image, "PNG")[:-12],
    "webp": lambda image: encoded(image, "WEBP"),
    "webp-lossless": lambda image: encoded(image, "WEBP", lossless=True),
    "webp-alpha": lambda image: encoded(with_alpha(image), "WEBP"),
    "webp-alpha-lossless": lambda image: encoded(with_alpha(image), "WEBP", lossless=True),
    "webp-turned": lambda image: turned(image, "WEBP"),
}
# with both margins even and odd, at once and in turn; then no margin at all
CROPS = [(178, 218, 128), (97, 131, 64), (98, 131, 64), (131, 97, 64), (178, 218, 33), (64, 64, 64), (64, 79, 64)]
RESIZED = [(178, 218, 128), (97, 131, 64), (97, 131, 37), (300, 70, 64), (40, 51, 37), (64, 99, 64), (128, 64, 32)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes, name: str) -> DiskFile:
        path = tmp_path / name
        path.write_bytes(data)
        return DiskFile(str(path))

    return write


@pytest.fixture
def files(picture: Picture, write: Write) -> list[DiskFile]:
    """One of every kind, CelebA's size, and noise, which shows more than a smooth picture does."""
    noise = np.random.default_rng(0).integers(-20, 20, (218, 178, 3))
    image = Image.fromarray((np.asarray(picture(0)) + noise).clip(0, 255).astype(np.uint8))
    return [write(encode(image), f"{name}.jpg") for name, encode in KINDS.items()]


@pytest.mark.parametrize(("width", "height", "size"), CROPS)
def test_crops_equal_torchvisions_bit_for_bit(
    width: int, height: int, size: int, picture: Picture, write: Write
) -> None:
    image = picture(1, width, height)
    files = [write(encode(image), f"{name}.jpg") for name, encode in KINDS.items()]
    ours, theirs = DaliDecoder(size, resize=False)(files), TorchvisionDecoder(size, 3, resize=False)(files)
    assert ours.shape == (len(KINDS), 3, size, size)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert [name for name, a, b in zip(KINDS, ours, theirs, strict=True) if not torch.equal(a, b)] == []
    # neither of the two alone is believed
    exact = list(KINDS).index("png")
    assert torch.equal(ours[exact], pil_to_tensor(CenterCrop(size)(image)))


@pytest.mark.parametrize(("width", "height", "size"), RESIZED)
def test_resized_images_equal_torchvisions_bit_for_bit(
    width: int, height: int, size: int, picture: Picture, write: Write
) -> None:
    files = [write(encode(picture(2, width, height)), f"{name}.jpg") for name, encode in KINDS.items()]
    ours, theirs = DaliDecoder(size, resize=True)(files), TorchvisionDecoder(size, 3, resize=True)(files)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert [name for name, a, b in zip(KINDS, ours, theirs, strict=True) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_images_of_many_sizes_make_one_batch(resize: bool, picture: Picture, write: Write) -> None:
    files = [write(encoded(picture(i, 60 + 7 * i, 130 - 5 * i), "JPEG"), f"{i}.jpg") for i in range(13)]
    assert torch.equal(DaliDecoder(48, resize=resize)(files), TorchvisionDecoder(48, 3, resize=resize)(files))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_any_threads_and_any_split_give_the_same_pixels(resize: bool, threads: int, files: list[DiskFile]) -> None:
    expected = TorchvisionDecoder(128, 3, resize=resize)(files)
    decoder = DaliDecoder(128, resize=resize, threads=threads)
    # larger and smaller ones in turn: the pipeline has to grow, and to take less than it could
    for splits in ([3, 1], [10, 2, 9], [len(files)], [1] * len(files), [7, 20]):
        parts, start = [], 0
        for share in [*splits, len(files) - sum(splits)]:
            parts += [decoder(files[start : start + share])] if share else []
            start += share
        assert torch.equal(torch.cat(parts), expected)
    backwards = decoder(files[::-1])
    assert torch.equal(backwards.flip(0), expected)


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_a_batch_that_is_kept_never_changes(resize: bool, picture: Picture, write: Write) -> None:
    decoder = DaliDecoder(64, resize=resize)
    files = [write(encoded(picture(i), "JPEG"), f"{i}.jpg") for i in range(24)]
    kept = decoder(files[:4])
    copy = kept.clone()
    batches = [decoder(files[start : start + 2]) for start in range(4, 24, 2)]
    assert len({batch.data_ptr() for batch in [kept, *batches]}) == 11
    assert torch.equal(kept, copy)
    # and it outlives the decoder
    del decoder
    assert torch.equal(kept, copy)
    # what a caller writes to it is its own affair
    kept.zero_()
    assert torch.equal(DaliDecoder(64, resize=resize)(files[:4]), copy)


def test_two_threads_may_share_a_decoder(picture: Picture, write: Write) -> None:
    decoder = DaliDecoder(64, resize=False, threads=2)
    sets = [[write(encoded(picture(10 * s + i), "JPEG"), f"{s}-{i}.jpg") for i in range(3 + s)] for s in range(2)]
    expected = [TorchvisionDecoder(64, 3, resize=False)(files) for files in sets]
    wrong: list[int] = []

    def work(which: int) -> None:
        wrong.extend(which for _ in range(20) if not torch.equal(decoder(sets[which]), expected[which]))

    workers = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def moving(image: Image.Image, kind: str) -> bytes:
    return encoded(image, kind, save_all=True, append_images=[image.rotate(90)], duration=100)


def flipped(data: bytes, at: int = 0) -> bytes:
    at = at or len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


# truncated below the crop as well, where a decoder of the crop alone has no need to look
BAD: dict[str, Encode] = {
    "jpeg-cut": lambda image: without(encoded(image, "JPEG"), 0.5),
    "jpeg-cut-below-the-crop": lambda image: without(encoded(image, "JPEG"), 0.04),
    "progressive-cut": lambda image: without(encoded(image, "JPEG", progressive=True), 0.3),
    "png-cut": lambda image: without(encoded(image, "PNG"), 0.5),
    "png-damaged": lambda image: flipped(encoded(image, "PNG")),
    "webp-cut": lambda image: without(encoded(image, "WEBP"), 0.5),
    "webp-damaged": lambda image: flipped(encoded(image, "WEBP"), 25),
    "empty": lambda image: b"",
    "html": lambda image: b"<!DOCTYPE html><title>Quota exceeded</title>",
    "gif": lambda image: encoded(image, "GIF"),
    "moving-webp": lambda image: moving(image, "WEBP"),
    "moving-png": lambda image: moving(image, "PNG"),
    "small": lambda image: encoded(image.resize((20, 20)), "JPEG"),
    "bomb": lambda image: encoded(Image.new("1", (12_000, 12_000)), "PNG"),
    "stray-marker": lambda image: encoded(image, "JPEG")[:-900] + b"\xff\x87" + encoded(image, "JPEG")[-898:],
}


def refusal(decoder: Callable[[Sequence[DiskFile]], object], files: Sequence[DiskFile]) -> BadFiles:
    with pytest.raises(BadFiles) as error:
        decoder(files)
    return error.value


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_as_torchvision_names_it(name: str, picture: Picture, write: Write) -> None:
    image = picture(3)
    good, bad = write(encoded(image, "JPEG"), "good.jpg"), write(BAD[name](image), "bad.jpg")
    ours, theirs = DaliDecoder(128, resize=False), TorchvisionDecoder(128, 3, resize=False)
    expected = refusal(theirs, [good, bad, good])
    assert refusal(ours, [good, bad, good]).faults == expected.faults
    assert list(expected.faults) == [1]
    assert str(expected).startswith(f"{bad.name} ")
    assert "\n" not in str(expected)
    # the decoder works on
    assert torch.equal(ours([good]), theirs([good]))


@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_all_bad_files_of_a_call_are_listed_in_order(
    resize: bool, tmp_path: Path, picture: Picture, files: list[DiskFile], write: Write
) -> None:
    spoilt = [write(make(picture(4)), f"bad-{name}.jpg") for name, make in BAD.items()]
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.jpg").mkdir()
    spoilt += [DiskFile(str(tmp_path / name)) for name in ("dangling.jpg", "folder.jpg")]
    mixed = [file for pair in zip(files, spoilt, strict=False) for file in pair]
    ours, theirs = DaliDecoder(128, resize=resize), TorchvisionDecoder(128, 3, resize=resize)
    error = refusal(ours, mixed)
    assert [mixed[position].name for position in error.faults] == [file.name for file in spoilt]
    assert list(error.faults) == sorted(error.faults)
    assert error.faults == refusal(theirs, mixed).faults
    assert str(error) == str(refusal(theirs, mixed))
    assert str(error).count("\n") == len(spoilt)
    assert torch.equal(ours(files), theirs(files))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_damage_in_the_middle_is_the_same_pixels_or_the_same_fault(kind: str, picture: Picture, write: Write) -> None:
    """Not every flipped bit can be seen; whether it is must not depend on the decoder."""
    data = encoded(picture(5), kind)
    ours, theirs = DaliDecoder(128, resize=False), TorchvisionDecoder(128, 3, resize=False)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        at, value = rng.integers(30, len(data)), rng.integers(256)
        file = write(data[:at] + bytes([value]) + data[at + 1 :], "damaged.jpg")
        try:
            pixels = theirs([file])
        except BadFiles as error:
            seen.add("bad")
            assert refusal(ours, [file]).faults == error.faults  # noqa: PT017
        else:
            seen.add("good")
            assert torch.equal(ours([file]), pixels)
    assert seen == {"good", "bad"}


def test_a_batch_that_dali_alone_refuses_stands(files: list[DiskFile], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, theirs = DaliDecoder(128, resize=False), TorchvisionDecoder(128, 3, resize=False)
    expected = theirs(files)
    assert torch.equal(decoder(files), expected)

    class Dead:
        def feed_input(self, name: str, data: object) -> None:
            raise RuntimeError("Critical error in pipeline")

    monkeypatch.setattr(decoder, "_pipeline", Dead())
    assert torch.equal(decoder(files), expected)
    assert decoder._pipeline is None
    assert torch.equal(decoder(files), expected)
    assert decoder._pipeline is not None


def test_dali_decodes_what_is_plain(files: list[DiskFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would pass if all were left to torchvision."""
    left: list[bytes] = []

    def decode(data: bytes, channels: int) -> Tensor:
        left.append(data)
        return torch.zeros(channels, 218, 178, dtype=torch.uint8)

    monkeypatch.setattr(dali, "decode", decode)
    assert DaliDecoder(128, resize=False)(files).shape == (len(files), 3, 128, 128)
    names = {Path(file.name).stem for file in files if file.read() in left}
    assert names == {"jpeg-cmyk", "jpeg-progressive", "jpeg-trailing", "png-16", "png-without-end"}


def test_the_console_stays_clean(tmp_path: Path, picture: Picture, write: Write) -> None:
    good, bad = write(encoded(picture(6), "JPEG"), "good.jpg"), write(BAD["jpeg-cut"](picture(6)), "bad.jpg")
    code = (
        "import sys\n"
        "from fastle.data.dali import DaliDecoder\n"
        "from fastle.data.decode import BadFiles, DiskFile\n"
        "decoder = DaliDecoder(128, resize=False)\n"
        "good, bad = map(DiskFile, sys.argv[1:])\n"
        "decoder([good, good])\n"
        "try:\n"
        "    decoder([good, bad])\n"
        "except BadFiles:\n"
        "    print(len(decoder([good])))\n"
    )
    # the last line that torchvision itself has to say about its future is for the tests' own ears, see pyproject.toml
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, good.name, bad.name]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_where_dali_is_missing_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = why_no_dali()
    assert reason is not None
    assert "nvidia-dali" in reason
    assert "\n" not in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])
def test_a_gpu_decodes_nearly_the_same(resize: bool, files: list[DiskFile], write: Write) -> None:
    expected = TorchvisionDecoder(128, 3, resize=resize)(files)
    decoder = DaliDecoder(128, resize=resize, gpu=0)
    kept = decoder(files)
    first = kept.cpu()
    assert kept.device == torch.device("cuda", 0)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    # chroma is brought up another way, and the noise of the pictures is the worst case for it
    assert (first.double() - expected.double()).abs().mean((1, 2, 3)).max() < 4
    for _ in range(10):
        decoder(files[::-1])
    assert torch.equal(kept.cpu(), first)
    bad = write(b"", "bad.jpg")
    assert refusal(decoder, [files[0], bad]).faults == {1: f"{bad.name} is empty"}
    assert torch.equal(decoder(files).cpu(), first)
