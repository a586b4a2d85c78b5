"""The documentation site builds without a warning, is whole, asks nothing of other hosts and has every public name."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import fastle

ROOT = Path(__file__).resolve().parents[1]


class Elements(HTMLParser):
    """The addresses in a page and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("src", "srcset", "href", "poster", "data") and value:
                (self.links if tag == "a" else self.loaded).append(value)
            elif name == "class" and value and "mermaid" in value.split():
                # the theme would fetch its library
                self.loaded.append("https://unpkg.com")


def elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason='the documentation site needs: pip install "fastle[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    target = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Elements]:
    paths = [path for path in site.rglob("*.html") if path.name != "404.html"]
    return {path.relative_to(site).as_posix(): Elements(path) for path in paths}


def test_asks_nothing_of_another_host(site: Path, pages: dict[str, Elements]) -> None:
    assert [address for page in pages.values() for address in page.loaded if elsewhere(address)] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"']+""", styles) == []


def test_links_lead_to_files_and_anchors(site: Path, pages: dict[str, Elements]) -> None:
    broken = []
    for name, page in pages.items():
        for address in {*page.links, *page.loaded}:
            if elsewhere(address):
                continue
            path, _, anchor = unquote(urljoin(name, address)).partition("#")
            path = f"{path}index.html" if path.endswith("/") or not path else path
            path = path.removeprefix("/")
            if not (site / path).is_file() or (anchor and path in pages and anchor not in pages[path].anchors):
                broken.append(f"{name}: {address}")
    assert broken == []


def test_start_leads_to_photos_sigreg_and_what_is_not_proven(pages: dict[str, Elements]) -> None:
    assert {"training/", "sigreg/#use", "unproven/"} <= set(pages["index.html"].links)


def test_reference_has_every_public_name(pages: dict[str, Elements]) -> None:
    assert {f"fastle.{name}" for name in fastle.__all__} - pages["api/index.html"].anchors == set()
