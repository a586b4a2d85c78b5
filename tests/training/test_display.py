"""What a run shows: rates without the warm-up and the pauses, plain lines without a terminal."""

import io

import pytest
from rich.console import Console

from fastle.training.display import WARM_UP, Clock, Display, format_seconds


class Time:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_rate_leaves_out_warm_up_and_pauses() -> None:
    now = Time()
    clock = Clock(10, now)
    for _ in range(WARM_UP):
        now.seconds += 100
        clock.step()
        assert clock.seconds_per_step() is None
        assert clock.images_per_second() is None
    for _ in range(4):
        now.seconds += 2
        clock.step()
        with clock.paused():
            now.seconds += 50
    assert clock.seconds_per_step() == pytest.approx(2)
    assert clock.images_per_second() == pytest.approx(5)
    assert clock.elapsed() == pytest.approx(WARM_UP * 100 + 8)


# as long as a row of a real run gets
ROW = {
    "epoch": 1234,
    "total": 0.0123456,
    "agreement": 0.00123456,
    "consistency": 0.00123456,
    "sigreg": 0.000123456,
    "latent_spread": 0.98765,
    "effective_rank": 7.5,
    "images_per_second": None,
    "data_wait": 0.015,
    "valid_psnr": 21.987,
}


def shown(*, terminal: bool, display_shown: bool = True) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=150)
    with Display(console, 60_000, shown=display_shown) as display:
        display.say("hello [not markup]")
        for step in (20, 40):
            display.update({"step": step} | ROW, None if step == 20 else 3725.0, force=step == 40)
    return output.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    first, *lines = shown(terminal=False).splitlines()
    assert first == "hello [not markup]"
    # a report is a few lines of 80 columns, the first of which begins with the step
    starts = [index for index, line in enumerate(lines) if not line.startswith("    ")]
    assert [lines[index].split("  ")[:2] for index in starts] == [
        ["step 20/60000", "ETA warming up"],
        ["step 40/60000", "ETA 1 h 02 min"],
    ]
    assert max(map(len, lines)) <= 80 and len(lines) == 2 * 3
    parts = [part for line in lines[starts[1] :] for part in line.strip().split("  ")]
    assert parts[2:5] == ["epoch 1,234", "total 0.01235", "agreement 0.001235"]
    assert parts[-4:] == ["effective rank 7.50", "images per second –", "data wait 1.5%", "valid psnr 21.99"]


def test_plain_lines_end_at_80_columns_wherever_they_break() -> None:
    output = io.StringIO()
    with Display(Console(file=output, force_terminal=False, width=150), 600) as display:
        for digits in range(1, 12):
            display.update({"step": 10**digits} | ROW, 3725.0, force=True)
    assert 78 <= max(map(len, output.getvalue().splitlines())) <= 80


def test_plain_lines_are_few() -> None:
    output = io.StringIO()
    with Display(Console(file=output, force_terminal=False, width=150), 600) as display:
        for step in range(100):
            display.update({"step": step}, 1.0)
    assert len(output.getvalue().splitlines()) == 1


def test_a_live_table_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "step 40/60000" in text and "effective rank" in text and "\x1b[" in text


def test_other_ranks_show_nothing() -> None:
    assert shown(terminal=False, display_shown=False) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (3599.7, "1 h 00 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
