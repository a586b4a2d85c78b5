"""The documentation points at what is there: links, anchors and paths resolve, and README keeps to its size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
# a path that begins at the root, also in the middle of a command
OURS = re.compile(r"(?<![\w/.-])(?:bench|docs|examples|fastle|kernels|scripts|tests)/[\w./-]*")
# a placeholder for any file of a kind
PLACEHOLDER = re.compile(r"NAME|FILE")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```$|^    [^\n]*$", text, flags=re.MULTILINE | re.DOTALL)
    paths = [path for code in (*SPAN.findall(prose(page)), *blocks) for path in OURS.findall(code)]
    return [path for path in paths if not PLACEHOLDER.search(path) and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_paths_resolve(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_paths(page) == []


def test_broken_links_and_paths_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, twice\n[a](#a-title-twice) [b](#no) [c](no.md) [d](page.md#no) [e](https://example.org)\n"
        "`python scripts/no.py --json FILE` `scripts/reproduce.py` `NAME/kernels/no` `kernels/NAME.py`\n"
        "\n    python bench/no.py\n\n```sh\nscripts/no.sh  # [f](no.md)\n```\n"
    )
    assert broken_links(page) == ["#no", "no.md", "page.md#no"]
    assert sorted(missing_paths(page)) == ["bench/no.py", "scripts/no.py", "scripts/no.sh"]


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110] == []
