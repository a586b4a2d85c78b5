"""The page of runs: what it shows, that it needs nothing else, and what its command and the brush's refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastle.checkpoint import CheckpointError
from fastle.commands.main import main
from fastle.training.report import GRID_ROWS, append_metrics, append_start, read_grid, save_grid
from fastle.web.page import make_page, read_run
from fastle.web.pictures import PICTURES, make_pictures
from tests.web.served import browser_for_tests, quiet_page, untrained_run

HOSTILE = '</script><img src="https://evil.example/x.png" onerror="throw 1">'


def images(seed: int) -> torch.Tensor:
    return torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled_run(path: Path, **flags: int | bool) -> Path:
    """A run that looks as if it had been trained for four steps."""
    run = untrained_run(path, **flags)
    for step in range(1, 5):
        append_metrics(run / "metrics.jsonl", {"step": step, "total": 8.0 / step, "valid_psnr": 20.0 + step})
        if step % 2 == 0:
            save_grid(
                run / "grids" / f"step-{step:08d}.png", list(zip(GRID_ROWS, (images(0), images(step)), strict=False))
            )
    append_start(run, {"step": 0, "command": f"fastle-train {HOSTILE}", "date": "2026-01-02T03:04:05"})
    (run / "eval-test.json").write_text(json.dumps({"data": "test", "step": 4, "clean": {"psnr": 24.125}}))
    return run


@pytest.mark.parametrize("count", [2, 4])
def test_a_grid_gives_its_images_back(tmp_path: Path, count: int) -> None:
    rows = {name: images(i) for i, name in enumerate(GRID_ROWS[:count])}
    save_grid(tmp_path / "grid.png", list(rows.items()))
    again = read_grid(tmp_path / "grid.png", 32)
    assert list(again) == list(rows) and all(torch.equal(again[name], rows[name]) for name in rows)
    with pytest.raises(CheckpointError, match="is no grid of images of 40 px"):
        read_grid(tmp_path / "grid.png", 40)
    (tmp_path / "grid.png").write_bytes((tmp_path / "grid.png").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"grid\.png cannot be read"):
        read_grid(tmp_path / "grid.png", 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_of_the_size_that_is_asked_for(channels: int) -> None:
    pictures = make_pictures(24, channels)
    assert pictures.shape == (len(PICTURES), channels, 24, 24) and pictures.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(PICTURES)


def test_a_page_compares_runs_and_names_what_it_could_not_read(tmp_path: Path) -> None:
    runs = [filled_run(tmp_path / "one"), filled_run(tmp_path / "two", slices=16)]
    (runs[1] / "grids" / "step-00000002.png").write_bytes(b"no picture")
    (runs[1] / "eval-valid.json").write_text("{")
    page = make_page([read_run(run) for run in runs])
    # of the settings, those that differ come before those that are behind a click
    different = page.partition('id="settings"')[2].partition("<details>")[0]
    assert "slices" in different and "batch-size" not in different
    assert "24.12" in page and "23.00" not in page
    assert "step-00000002.png cannot be read" in page and "eval-valid.json cannot be read" in page
    assert HOSTILE not in page


def test_a_run_that_has_nothing_yet_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = untrained_run(tmp_path / "run")
    main(["report", str(run), "-o", str(tmp_path / "new" / "page.html")])
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    for text in ("No values were noted yet", "No pictures were saved yet", "Nothing was measured", "do not say"):
        assert text in page
    assert capsys.readouterr().out == f"written to {tmp_path / 'new' / 'page.html'}\n"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (["report", "nothing", "-o", "page.html"], "nothing"),
        (["report", "run", "-o", "page.txt"], "-o page.txt: give it a name that ends in .html"),
        (["report", "run", "-o", "folder.html"], "-o folder.html is a folder"),
        # the run is not read before
        (["report", "nothing", "-o", "file/page.html"], "-o file/page.html: no file can be written to"),
        (["brush", "nothing"], "no run, checkpoint or saved model nothing is here"),
        (["brush", "cifar10-6"], "did you mean cifar10-6x?"),
        (["brush", "--port", "70000"], "--port must be at most 65535, not 70000"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_the_commands_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("file").touch()
    Path("page.html").write_text("as it was")
    with pytest.raises(SystemExit) as ended:
        main(command)
    error = str(ended.value.code)
    assert fault in error and "\n" not in error
    assert Path("page.html").read_text() == "as it was"


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    runs = [filled_run(tmp_path / "one"), filled_run(tmp_path / "two", slices=16)]
    page_of = tmp_path / "page.html"
    page_of.write_text(make_page([read_run(run) for run in runs]), encoding="utf-8")
    narrow = {"width": 400, "height": 800}
    with browser_for_tests() as browser, quiet_page(browser, page_of.as_uri(), viewport=narrow) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.get_by_text(HOSTILE).count() == 2
        chart = page.locator("[data-metric=total]")
        chart.locator("svg").hover()
        # the middle is nearest to the second or the third of four steps
        assert (chart.locator("output").text_content() or "") in ("step 2: 4 · 4", "step 3: 2.667 · 2.667")
        chart.locator("svg").press("ArrowRight")
        page.locator(".legend input").first.uncheck()
        assert chart.locator("path").count() == 1
        reconstruction = page.locator("[data-run='0'] img").nth(1)
        newest = reconstruction.get_attribute("src")
        page.locator("[data-run='0'] input[type=range]").press("Home")
        assert reconstruction.get_attribute("src") != newest
        assert reconstruction.get_attribute("alt") == "Reconstruction, a row of images at step 2"
        size = page.eval_on_selector("[data-run='0'] img", "image => [image.naturalWidth, image.naturalHeight]")
        assert size == [96, 32]
