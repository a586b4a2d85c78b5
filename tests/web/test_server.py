"""The brush's server against pages and programs that mean it harm: refused in one line, and still alive."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from fastle.config import ConfigError
from fastle.web.demo import open_demo
from fastle.web.server import listen
from tests.web.served import served, untrained_run

IMAGE = 32 * 32 * 3


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with served(untrained_run(tmp_path_factory.mktemp("brush") / "run")) as port:
        yield port


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_spatial_model_is_shown_at_any_size(tmp_path: Path) -> None:
    def facts(name: Path | str, size: int | None = None) -> tuple[int, list[int]]:
        demo, _ = open_demo(str(name), torch.device("cpu"), size)
        manifest = demo.manifest("http")
        assert all(picture.pixels.shape[1:] == (demo.size, demo.size) for picture in demo.pictures)
        return manifest["size"], manifest["latent"]

    assert facts("cifar10-6x") == (128, [32, 16, 16])
    # a model that was trained with holes has the panel for them
    assert [open_demo(name, torch.device("cpu"))[0].hole for name in ("cifar10-6x", "cifar10-masked")] == [None, 19]
    run = untrained_run(tmp_path / "run")
    assert facts(run) == (32, [8, 4, 4]) and facts(run, 64) == (64, [8, 8, 8])
    for size in (60, 0, 520):
        with pytest.raises(ConfigError, match=f"--size must be divisible by 8, and at most 512, not {size}"):
            facts(run, size)
    with pytest.raises(ConfigError, match=r"--size 64: the latent of .* is pooled"):
        facts(untrained_run(tmp_path / "pooled", latent=4), 64)


def test_an_answer_does_not_wait_to_be_acknowledged() -> None:
    """Its header and its body are two packets, of which the second waits for the browser unless delays are off."""

    async def delays_are_off() -> bool:
        writers: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        with listen(0) as listening:
            server = await asyncio.start_server(lambda reader, writer: writers.put_nowait(writer), sock=listening)
            _, client = await asyncio.open_connection(*listening.getsockname())
            accepted = await writers.get()
            off = accepted.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for open_one in (accepted, client, server):
                open_one.close()
        return bool(off)

    assert asyncio.run(delays_are_off())


def test_pixels_become_latents_and_latents_pixels(port: int) -> None:
    status, latents = ask(port, "POST", "/encode", bytes(range(256)) * (2 * IMAGE // 256))
    assert status == 200 and len(latents) == 2 * 8 * 4 * 4 * 4
    decoded = ask(port, "POST", "/decode", latents)
    assert decoded == ask(port, "POST", "/reconstruct", bytes(range(256)) * (2 * IMAGE // 256))
    assert decoded[0] == 200 and len(decoded[1]) == 2 * IMAGE
    # a part of the latent, and parts that it has not
    assert len(ask(port, "POST", "/decode?cells=2,3", bytes(8 * 2 * 3 * 4))[1]) == 2 * 3 * 64 * 3
    for cells in ("0,3", "5,4", "4", "4,4,4", "a,b", ""):
        assert ask(port, "POST", f"/decode?cells={cells}", bytes(8 * 2 * 3 * 4))[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1:1"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_other_pages_are_refused(port: int, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/model.json"), ("GET", "/pictures/0.png"), ("POST", "/encode")):
        status, line = ask(port, method, path, b"", **headers)
        assert status == 403 and line.count(b"\n") == 1
    assert ask(port, "GET", "/")[0] == 200


def test_bodies_of_any_other_size_are_refused_before_they_are_read(port: int) -> None:
    # the server decodes no files, so what is in them does not matter
    huge_png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 2 * (10_000).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    not_finite = torch.full((8 * 4 * 4,), torch.nan).numpy().tobytes()
    for path, body in (("/encode", b""), ("/encode", b"a text file"), ("/encode", huge_png), ("/decode", not_finite)):
        status, line = ask(port, "POST", path, body)
        assert status == 400 and line and b"\n" not in line
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/encode")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    # nothing was sent: the length alone is refused
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/encode")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        while sent < 1000:
            connection.send(b"100000\r\n" + bytes(2**20) + b"\r\n")
            sent += 1
    except OSError:
        # the server has closed the connection
        pass
    connection.close()
    assert sent < 100, "megabytes"
    assert ask(port, "GET", "/model.json")[0] == 200


def test_a_body_that_does_not_come_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastle.web.server.SECONDS_TO_SEND", 0.1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/encode")
    connection.putheader("Content-Length", str(IMAGE))
    connection.endheaders(bytes(IMAGE // 2))
    assert connection.getresponse().status == 408
    connection.close()
    assert ask(port, "GET", "/model.json")[0] == 200


def test_a_hundred_requests_at_once(port: int) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(port, "POST", "/reconstruct", bytes(16 * IMAGE))[0]))
        for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 100 and set(answers) <= {200, 503} and 200 in answers
    assert ask(port, "POST", "/reconstruct", bytes(IMAGE))[0] == 200
