"""What a run leaves for people."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastle.config import Size, sides_of
from fastle.training.report import (
    append_metrics,
    effective_rank,
    latent_spread,
    read_metrics,
    rewind_metrics,
    save_curves,
    save_grid,
)


def test_spread_and_rank_of_known_latents() -> None:
    torch.manual_seed(0)
    white = torch.randn(20_000, 6)
    assert float(latent_spread(white)) == pytest.approx(1, rel=0.02)
    assert float(effective_rank(white)) == pytest.approx(6, rel=0.01)
    # two directions of equal variance among six features
    plane = torch.randn(20_000, 2) @ torch.linalg.qr(torch.randn(6, 6)).Q[:2]
    assert float(effective_rank(plane)) == pytest.approx(2, rel=0.01)


def test_the_rank_of_a_wide_latent_takes_no_more_memory_than_its_samples() -> None:
    torch.manual_seed(0)
    narrow = torch.randn(8, 6)
    wide = torch.cat([narrow, torch.zeros(8, 100_000 - 6)], 1)
    # the covariance of 100,000 features would take 40 GB
    assert float(effective_rank(wide)) == pytest.approx(float(effective_rank(narrow)), rel=1e-4)


def test_collapse_is_visible() -> None:
    same = torch.ones(10, 6)
    assert float(latent_spread(same)) == 0
    line = torch.randn(100, 1) * torch.ones(1, 6)
    assert float(effective_rank(line)) == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(effective_rank(same))


def test_positions_of_a_spatial_latent_are_samples() -> None:
    z = torch.randn(5, 6, 2, 3)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(effective_rank(z), effective_rank(flat))
    assert torch.equal(latent_spread(z), latent_spread(flat))


def test_metrics_after_the_step_resumed_from_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rewind_metrics(path, 0)
    for step in (10, 20, 30):
        append_metrics(path, {"step": step, "total": 1.0 / step})
    # a killed process may leave half a line
    path.write_bytes(path.read_bytes() + b'{"step": 4')
    rewind_metrics(path, 20)
    assert [row["step"] for row in read_metrics(path)] == [10, 20]
    append_metrics(path, {"step": 30, "total": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]


@pytest.mark.parametrize(
    "line",
    [
        b"[1]", b"{}", b'{"step": true}', b'{"step": 2.0}', b'{"step": -1}', b'{"step": 2, "total": NaN}', b"\xff", b"",
        b'{"step": 2, "total": "low"}', b'{"step": 1}', b"[" * 10**5, b'{"step": 2, "total": 1e999}',
    ],
)  # fmt: skip
def test_a_damaged_line_costs_no_other_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3, "total": null}\n')
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=re.escape(f"{path}: line 2 cannot be read")):
        assert read_metrics(path) == [{"step": 1}, {"step": 3, "total": None}]
    rewind_metrics(path, 9)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3, "total": null}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "valid_psnr": float("nan"), "images_per_second": None})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "valid_psnr": None, "images_per_second": None}]


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (3, (96, 128)), (2, (16, 8))])
def test_a_grid_shows_every_image_in_its_place(tmp_path: Path, channels: int, size: Size) -> None:
    height, width = sides_of(size)
    values = (torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.6]))
    rows = [
        (name, v.view(2, 1, 1, 1).expand(2, channels, height, width))
        for name, v in zip(("a", "b"), values, strict=True)
    ]
    save_grid(tmp_path / "grid.png", rows)
    picture = Image.open(tmp_path / "grid.png").convert("L")
    zoom = max(1, round(96 / height))
    for r, row in enumerate(values):
        for b, value in enumerate(row):
            # tiles are laid from the right and bottom edges: the margin on the left depends on the font
            x = picture.width - (2 - b) * (width * zoom + 4) + width * zoom // 2
            y = picture.height - (2 - r) * (height * zoom + 4) + height * zoom // 2
            assert picture.getpixel((x, y)) == round(float(value) * 255)


def test_curves_of_any_run(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "total": 1 / step, "sigreg": 2.0, "latent_spread": 1.0, "effective_rank": 3.0} for step in (1, 2)
    ]
    rows[1]["sigreg"] = None
    save_curves(tmp_path / "curves.png", [*rows, {**rows[0], "step": 3, "valid_psnr": 20.0}])
    assert Image.open(tmp_path / "curves.png").size[0] > 500
