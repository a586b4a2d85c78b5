"""The documentation points at what is there: links, anchors, paths and the flags of scripts, and README is short."""

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
# a script with arguments; one without a folder is in bench, as the tables of README have them
CALL = re.compile(r"(?<![\w/.-])(python )?((?:bench|examples|scripts)/)?(\w+\.py)((?: [^\s#;&|]+)+)")
# where the flags that benchmarks and measurements share are declared
SHARED = (ROOT / "bench/common/command.py", ROOT / "bench/common/figures.py")
FLAG = re.compile(r"--[\w-]+")
# the changelog tells of flags that were
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]


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


def wrong_calls(page: Path) -> list[str]:
    """The calls of scripts on a page that lack `python`, or that have a flag which the script does not know."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```$|(?:^    [^\n]*\n)+", text, flags=re.MULTILINE | re.DOTALL)
    lines = [*SPAN.findall(prose(page)), *(line for code in blocks for line in code.replace("\\\n", " ").splitlines())]
    wrong = []
    for line in lines:
        for python, folder, script, arguments in CALL.findall(" ".join(line.split())):
            path = ROOT / (folder or "bench/") / script
            declared = "".join(file.read_text(encoding="utf-8") for file in (path, *SHARED) if file.exists())
            unknown = [flag for flag in FLAG.findall(arguments) if f'"{flag}"' not in declared]
            if unknown or bool(python) != bool(folder) or not path.exists():
                wrong.append(f"{python}{folder}{script}{arguments}")
    return wrong


@pytest.mark.parametrize("page", NOW, ids=[str(page.relative_to(ROOT)) for page in NOW])
def test_scripts_are_called_as_they_run(page: Path) -> None:
    assert wrong_calls(page) == []


def test_wrong_calls_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`scripts/reproduce.py` `scripts/reproduce.py --list` `python\nscripts/reproduce.py --lists`\n"
        "`views_bench.py --quick` `no_bench.py --quick` `python views_bench.py --quick`\n"
        "\n    python bench/step_bench.py --sides plain \\\n        --shape cifar10:4  # --no\n"
        "\n```sh\npython examples/own_model.py\npython bench/no.py --quick\n```\n"
    )
    assert sorted(wrong_calls(page)) == [
        "no_bench.py --quick",
        "python bench/no.py --quick",
        "python bench/step_bench.py --sides plain --shape cifar10:4",
        "python scripts/reproduce.py --lists",
        "python views_bench.py --quick",
        "scripts/reproduce.py --list",
    ]


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
