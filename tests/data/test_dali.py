"""What is DALI's alone; test_decode.py compares its pixels and its faults with torchvision's."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastle.data import dali
from fastle.data.dali import DaliDecoder, why_no_dali
from fastle.data.decode import BadFiles, DiskFile, TorchvisionDecoder
from fastle.data.header import Header
from tests.data.pictures import GOOD, Memory, encoded, half, picture
from tests.data.test_decode import ODD

pytestmark = pytest.mark.skipif(why_no_dali() is not None, reason=f"no DALI: {why_no_dali()}")
Write = Callable[[bytes, str], DiskFile]
crop_and_resize = pytest.mark.parametrize("resize", [False, True], ids=["crop", "resize"])


@pytest.fixture(scope="module")
def files() -> list[Memory]:
    return [Memory(kind, encode(picture(0))) for kind, encode in (GOOD | ODD).items()]


@crop_and_resize
def test_images_of_many_sizes_make_one_batch(resize: bool) -> None:
    files = [Memory(str(i), encoded(picture(i, 60 + 7 * i, 130 - 5 * i), "JPEG")) for i in range(13)]
    assert torch.equal(DaliDecoder(48, resize=resize)(files), TorchvisionDecoder(48, 3, resize=resize)(files))


def test_two_threads_may_share_a_decoder() -> None:
    decoder = DaliDecoder(64, resize=False, threads=2)
    sets = [[Memory(str(i), encoded(picture(10 * s + i), "JPEG")) for i in range(3 + s)] for s in range(2)]
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


def test_torchvision_decodes_a_batch_that_dali_rejects(files: list[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TorchvisionDecoder(128, 3, resize=False)(files)

    class Dead:
        def feed_input(self, name: str, data: object) -> None:
            raise RuntimeError("Critical error in pipeline")

    build, pipelines = dali._build, [Dead()]
    monkeypatch.setattr(dali, "_build", lambda *args, **more: pipelines.pop() if pipelines else build(*args, **more))
    decoder = DaliDecoder(128, resize=False)
    assert torch.equal(decoder(files), expected)
    assert pipelines == []
    # a new pipeline takes the place of the dead one
    assert torch.equal(decoder(files), expected)


@crop_and_resize
def test_dali_decodes_what_is_plain(resize: bool, files: list[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons of pixels would pass if torchvision decoded everything."""
    left: list[bytes] = []

    def decode(data: bytes, header: Header, channels: int) -> Tensor:
        left.append(data)
        return torch.zeros(channels, 218, 178, dtype=torch.uint8)

    monkeypatch.setattr(dali, "decode", decode)
    assert DaliDecoder(128, resize=resize)(files).shape == (len(files), 3, 128, 128)
    # of the crop alone, DALI cannot decode a turned one
    turned = set() if resize else {"jpeg-turned", "png-turned", "webp-turned"}
    assert {file.name for file in files if file.read() in left} == turned | {
        "jpeg-cmyk", "jpeg-progressive", "jpeg-followed", "png-trailing", "png-grey-16", "png-16", "png-without-end",
    }  # fmt: skip


def test_the_console_stays_clean(write: Write) -> None:
    good, bad = write(encoded(picture(6), "JPEG"), "good.jpg"), write(half(encoded(picture(6), "JPEG")), "bad.jpg")
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
    # torchvision's warning about its own future is not ours, see pyproject.toml
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, good.name, bad.name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_the_pipeline_of_a_gpu_cuts_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali import fn, pipeline

    # the same graph with its decoder on the CPU, whose pixels are torchvision's
    class OnCpu(pipeline.Pipeline):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"device_id": None})

    decode = fn.decoders.image
    monkeypatch.setattr(pipeline, "Pipeline", OnCpu)
    monkeypatch.setattr(fn.decoders, "image", lambda *inputs, **options: decode(*inputs, **options | {"device": "cpu"}))
    monkeypatch.setattr(DaliDecoder, "_device", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    files = [Memory(str(i), encoded(picture(i, 60 + 7 * i, 130 - 5 * i), "JPEG")) for i in range(13)]
    size = (48, 56)
    assert torch.equal(DaliDecoder(size, resize=False, gpu=0)(files), TorchvisionDecoder(size, 3, resize=False)(files))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@crop_and_resize
def test_a_gpu_decodes_nearly_the_same(resize: bool, files: list[Memory]) -> None:
    expected = TorchvisionDecoder(128, 3, resize=resize)(files)
    decoder = DaliDecoder(128, resize=resize, gpu=0)
    kept = decoder(files)
    first = kept.cpu()
    assert kept.device == torch.device("cuda", 0)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    # a GPU upsamples chroma differently, which the grain of the pictures makes as bad as it can be
    assert (first.double() - expected.double()).abs().mean((1, 2, 3)).max() < 4
    for _ in range(10):
        decoder(files[::-1])
    assert torch.equal(kept.cpu(), first)
    with pytest.raises(BadFiles) as error:
        decoder([files[0], Memory("bad.jpg", b"")])
    assert error.value.faults == {1: "bad.jpg is empty"}
    assert torch.equal(decoder(files).cpu(), first)
