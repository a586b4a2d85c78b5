"""What mkdocs.yml needs beyond settings: links that leave docs/, and docstrings behind the link fastle/kernels.

Pages link as GitHub needs it, such as `../bench/results/sigreg-cpu.json`. In the site, docs/ is the root, and the files
outside of it that a page links to are taken in, each with its path below the repository's root.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# blocks and spans of code, which hold no links, or a relative link
LINK = re.compile(
    r"(?P<code>^```.*?^```|`(?:[^`\n]|\n(?!\n))+`)|\]\((?P<link>(?![a-z]+:|[#/])[^()\s]+)\)", re.MULTILINE | re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds CONTRIBUTING and every file outside of docs/ that a page of the site links to, also from an added page."""
    pages = [ROOT / "CONTRIBUTING.md", *(DOCS / file.src_uri for file in files.documentation_pages())]
    seen = set(pages)
    _add(ROOT / "CONTRIBUTING.md", files, config)
    while pages:
        page = pages.pop()
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            target = _target(page, match["link"]) if match["link"] else None
            # what is missing stays a broken link, which a strict build refuses
            if target is None or target in seen or target.is_relative_to(DOCS) or not target.is_file():
                continue
            seen.add(target)
            _add(target, files, config)
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the relative links of a page to where their targets lie in the site."""
    source = Path(page.file.abs_src_path or DOCS / page.file.src_uri)
    folder = PurePosixPath(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        _, hash_sign, anchor = match["link"].partition("#")
        target = _in_site(_target(source, match["link"]))
        return f"]({os.path.relpath(target, folder)}{hash_sign}{anchor})"

    return LINK.sub(rewritten, markdown)


class Kernels(griffe.Extension):
    """Shows griffe, which reads no package without an `__init__.py`, kernels/ as fastle.kernels."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.name == "fastle":
            pkg.set_member("kernels", loader.load(ROOT / "kernels"))


def _target(page: Path, link: str) -> Path:
    """The file in the repository that a link of a page means."""
    return Path(os.path.normpath(page.parent / link.partition("#")[0]))


def _in_site(path: Path) -> str:
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def _add(path: Path, files: Files, config: MkDocsConfig) -> None:
    files.append(File.generated(config, _in_site(path), abs_src_path=str(path)))
