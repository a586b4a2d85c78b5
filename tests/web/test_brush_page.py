"""The latent brush in a browser: what people do with it, and that the Python it shows makes the same pixels."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from tests.web.served import browser_for_tests, quiet_page, served, served_static, untrained_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

PICTURE = "#brush-picture canvas"
MAP = "#brush-map canvas"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browser_for_tests() as browser:
        yield browser


@pytest.fixture(scope="module")
def shipped() -> Iterator[str]:
    with served("cifar10-6x", 32) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: Browser, shipped: str) -> Iterator[Page]:
    with quiet_page(browser, shipped, permissions=["clipboard-read", "clipboard-write"]) as page:
        settle(page)
        yield page


def settle(page: Page) -> None:
    """Waits until no picture is being computed."""
    page.wait_for_selector("#bench", state="visible")
    page.wait_for_selector("[aria-busy]", state="detached")


def drawn(page: Page, canvas: str) -> np.ndarray:
    settle(page)
    url = page.eval_on_selector(canvas, "canvas => canvas.toDataURL()")
    return read(base64.b64decode(url.partition(",")[2]))


def read(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def drop(page: Page, **files: bytes) -> None:
    for name, content in files.items():
        transfer = page.evaluate_handle(
            """([name, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name));
                return transfer;
            }""",
            [name.replace("_", "."), list(content)],
        )
        page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def photograph() -> bytes:
    """A PNG that is neither square nor of the model's size."""
    y, x = np.mgrid[:60, :90]
    pixels = np.stack([255 * x / 89, 255 * y / 59, 127 + 100 * np.sin(x / 6)], axis=2)
    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def choose_source(page: Page, card: int) -> None:
    page.locator("#images input[name=source]").nth(card).check()
    settle(page)


def choose_tool(page: Page, tool: str) -> None:
    page.locator(f"input[name=tool][value={tool}]").check()


def drag(page: Page, canvas: str, *places: tuple[float, float], steps: int = 4) -> None:
    """Presses the pointer at the first place and moves it to the others; 1 is the side of the canvas."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=steps)
    page.mouse.up()


def slide(page: Page, slider: str, value: float) -> None:
    page.eval_on_selector(
        slider,
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )


def saved(page: Page) -> np.ndarray:
    settle(page)
    with page.expect_download() as download:
        page.click("#save")
    return read(Path(download.value.path()).read_bytes())


def made_by_python(page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The picture that the copied Python saves."""
    page.click("#copy")
    page.locator("#status", has_text="Copied.").wait_for()
    program = page.evaluate("navigator.clipboard.readText()")
    monkeypatch.chdir(folder)
    # the program turns gradients off
    with torch.enable_grad():
        exec(compile(program, "copied.py", "exec"), {})
    return read((folder / "picture.png").read_bytes())


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether pixels are equal but for rounding: the page computes several images together, the Python one."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_dropped_image_is_painted_saved_and_made_again_in_python(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.locator("#images .card").count() == 8
    (tmp_path / "mine.png").write_bytes(photograph())
    drop(page, mine_png=photograph())
    page.wait_for_selector(".card:nth-child(9)")
    assert page.get_by_label("mine.png is A, which is edited").is_checked()
    choose_source(page, 3)
    states = [drawn(page, PICTURE)]

    drag(page, PICTURE, (0.1, 0.1), (0.9, 0.1))
    states.append(drawn(page, PICTURE))
    # the upper cells became those of B, of which the lower end of the picture does not know
    other = drawn(page, "#brush-source")
    assert distance(states[1][:8], other[:8]) < distance(states[0][:8], other[:8]) / 2
    assert same(states[1][28:], states[0][28:])
    for tool, x in (("scale", 0.3), ("mean", 0.6), ("sample", 0.9)):
        choose_tool(page, tool)
        drag(page, MAP, (x, 0.9))
        states.append(drawn(page, PICTURE))
    assert len({state.tobytes() for state in states}) == 5

    picture = saved(page)
    assert np.array_equal(picture, states[-1])
    assert same(picture, made_by_python(page, tmp_path, monkeypatch))

    for before in reversed(states[:-1]):
        page.click("#undo")
        assert np.array_equal(drawn(page, PICTURE), before)
    assert page.locator("#undo").is_disabled()
    page.click("#redo")
    assert np.array_equal(drawn(page, PICTURE), states[1])
    choose_tool(page, "restore")
    drag(page, MAP, (0.1, 0.1), (0.9, 0.1))
    assert np.array_equal(drawn(page, PICTURE), states[0])
    page.click("#compare")
    page.click("#reset")
    assert np.array_equal(drawn(page, PICTURE), states[0]) and page.locator("#reset").is_disabled()


def test_images_wait_until_the_page_has_its_own(browser: Browser, shipped: str) -> None:
    with quiet_page(browser, shipped) as page:
        for name in ("first_png", "second_png"):
            drop(page, **{name: photograph()})
        page.wait_for_selector(".card:nth-child(10)")
        settle(page)
        assert page.locator(".name").all_text_contents()[-2:] == ["first.png", "second.png"]
        assert page.get_by_label("second.png is A, which is edited").is_checked()


def test_keyboard(page: Page) -> None:
    first = drawn(page, PICTURE)
    page.focus(PICTURE)
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft", "]"):
        page.keyboard.press(key)
    assert page.locator("#place").text_content() == "Row 2, column 1"
    assert page.locator("#status").text_content() == "" and page.locator("#brush-size-value").text_content() == (
        "2 × 2 cells"
    )
    page.keyboard.press("Space")
    painted = drawn(page, PICTURE)
    assert not np.array_equal(painted, first)
    page.keyboard.press("Control+z")
    assert np.array_equal(drawn(page, PICTURE), first)
    page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(drawn(page, PICTURE), painted)
    page.focus("#tab-brush")
    page.keyboard.press("ArrowRight")
    assert page.locator("#morph").is_visible() and not page.locator(PICTURE).is_visible()


def test_touch_on_a_narrow_page(browser: Browser, shipped: str) -> None:
    with quiet_page(browser, shipped, has_touch=True, viewport={"width": 400, "height": 800}) as page:
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        first = drawn(page, PICTURE)
        page.locator(PICTURE).tap()
        tapped = drawn(page, PICTURE)
        assert not np.array_equal(tapped, first)

        # a finger that moves down over the picture paints, and does not scroll the page
        box = page.locator(PICTURE).bounding_box()
        assert box is not None
        before = page.evaluate("scrollY")
        session = page.context.new_cdp_session(page)
        for kind, share in (("Start", 0.1), ("Move", 0.2), ("Move", 0.5), ("Move", 0.9), ("End", None)):
            points = (
                [] if share is None else [{"x": box["x"] + box["width"] / 2, "y": box["y"] + share * box["height"]}]
            )
            session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
        dragged = drawn(page, PICTURE)
        assert all(not np.array_equal(dragged[rows], tapped[rows]) for rows in (slice(8), slice(24, 32)))
        assert page.evaluate("scrollY") == before
        # one stroke
        page.click("#undo")
        assert np.array_equal(drawn(page, PICTURE), tapped)


def test_the_morph(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.click("#tab-morph")
    ends = []
    for share in (0, 100, 30):
        slide(page, "#morph-share", share)
        ends.append(drawn(page, "#morph figure:first-child canvas"))
    assert len({end.tobytes() for end in ends}) == 3
    picture = saved(page)
    assert np.array_equal(picture, ends[-1])
    assert same(picture, made_by_python(page, tmp_path, monkeypatch))


def test_directions_and_the_hole_of_a_pooled_masked_model(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained_run(tmp_path / "run", masked=True, latent=16)
    permissions = ["clipboard-read", "clipboard-write"]
    with served(run) as port, quiet_page(browser, f"http://127.0.0.1:{port}/", permissions=permissions) as page:
        settle(page)
        assert not page.locator("#tab-brush").is_visible()
        canvas = "#directions canvas"
        first = drawn(page, canvas)
        slide(page, "#sliders label:nth-child(2) input", 4)
        slide(page, "#sliders label:nth-child(1) input", -4)
        picture = saved(page)
        assert np.array_equal(picture, drawn(page, canvas)) and not np.array_equal(picture, first)
        assert same(picture, made_by_python(page, tmp_path, monkeypatch))

        page.click("#tab-hole")
        whole = drawn(page, "#hole-input canvas")
        drag(page, "#hole-input canvas", (0.5, 0.5), (0, 0))
        holed = drawn(page, "#hole-input canvas")
        # the hole went to the corner, where all of its pixels are the mean of the image
        assert not np.array_equal(holed, whole) and len(np.unique(holed[:8, :8].reshape(-1, 3), axis=0)) == 1
        assert same(saved(page), made_by_python(page, tmp_path, monkeypatch))


def test_files_that_are_no_images_are_refused_in_a_line(page: Page) -> None:
    size = (10_000).to_bytes(4, "big")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size + size + b"\x01\0\0\0\0"
    huge = header + zlib.crc32(header[12:]).to_bytes(4, "big")
    for name, content, message in (
        ("text_png", b"a text file", "text.png is not a JPEG, PNG or WebP image."),
        ("huge_png", huge, "huge.png has 10000 × 10000 pixels; at most 50 million are taken."),
        ("half_png", photograph()[:60], "half.png is damaged: it does not decode."),
    ):
        drop(page, **{name: content})
        page.locator("#status").get_by_text(message, exact=True).wait_for()
    drop(page, good_png=photograph())
    page.wait_for_selector(".card:nth-child(9)")


def test_the_page_measures_its_frames_and_decodes_what_changed(
    browser: Browser, shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    # by default a model of 32 px is shown at 128
    with served("cifar10-6x") as port:
        for size, url in ((32, shipped), (128, f"http://127.0.0.1:{port}/")):
            asked.clear()
            with quiet_page(browser, url, permissions=permissions) as page:
                page.on("request", note)
                settle(page)
                drag(page, PICTURE, (0.1, 0.1), (0.9, 0.5), (0.1, 0.9), steps=12)
                settle(page)
                shown = page.locator("#frame-time").text_content()
                # the parts make the whole
                assert any("cells=" in url for url in asked) == (size == 128)
                assert same(saved(page), made_by_python(page, tmp_path, monkeypatch))
            assert shown is not None and shown.startswith("Frame time ")
            with capsys.disabled():
                print(f"\nthe latent brush at {size} px: {shown}")


def test_without_a_server_the_page_makes_the_same_pixels(browser: Browser, shipped: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def paint(url: str) -> list[np.ndarray]:
        with quiet_page(browser, url) as page:
            drop(page, mine_png=photograph())
            page.wait_for_selector(".card:nth-child(9)")
            choose_source(page, 3)
            states = [drawn(page, PICTURE)]
            drag(page, PICTURE, (0.1, 0.1), (0.9, 0.3))
            for tool, x in (("sample", 0.9), ("mean", 0.6)):
                choose_tool(page, tool)
                drag(page, MAP, (x, 0.9))
                states.append(drawn(page, PICTURE))
            states.append(drawn(page, MAP))
            page.click("#tab-morph")
            return [*states, drawn(page, "#morph figure:first-child canvas")]

    with served_static(tmp_path / "page", "cifar10-6x", 32) as port:
        static = paint(f"http://127.0.0.1:{port}/")
    assert len({state.tobytes() for state in static}) == 5
    assert all(same(a, b) for a, b in zip(static, paint(shipped), strict=True))
