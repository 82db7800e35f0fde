"""Hooks of MkDocs: the site takes in what its pages link to outside ``docs/``; links are those of the repository.

``CONTRIBUTING.md``, results of benchmarks and the like stay where the repository's readers find them, and have the same
path in the site, at whose root the pages of ``docs/`` stand. What links to nothing MkDocs complains about.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
"""The target of a link or picture in the repository, and its anchor."""
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""Pages outside ``docs/`` that the navigation names."""
ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>~?(?:[\w.]+\.)?([^<]+)</code>")
"""What a role of Sphinx has become in HTML, such as ``:class:`~pathlib.Path```, and the last part of its name."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside ``docs/`` that pages link to, and those that these link to in turn."""
    root, waiting = _root(config), [*ALWAYS]
    for file in files.documentation_pages():
        waiting += _targets(root, f"docs/{file.src_uri}")
    while waiting:
        path = waiting.pop()
        if path.startswith("docs/") or path in files.src_uris:
            continue
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
        if path.endswith(".md"):
            waiting += _targets(root, path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links within the repository into links within the site."""
    root = _root(config)
    own = Path(page.file.abs_src_path).relative_to(root).as_posix() if page.file.abs_src_path else page.file.src_uri

    def in_site(link: re.Match[str]) -> str:
        path = _resolve(root, own, link[1])
        if path is None:
            return link[0]
        target = os.path.relpath(path.removeprefix("docs/"), os.path.dirname(page.file.src_uri) or ".")
        return target + (link[2] or "")

    return LINK.sub(in_site, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _targets(root: Path, path: str) -> list[str]:
    links = LINK.findall((root / path).read_text(encoding="utf-8"))
    return [found for link, _ in links if (found := _resolve(root, path, link)) is not None]


def _resolve(root: Path, page: str, link: str) -> str | None:
    """The file in the repository that a page's link means, a folder's README for a folder; None where there is none."""
    path = os.path.normpath(os.path.join(os.path.dirname(page), link))
    if path.startswith(".."):
        return None
    if (root / path).is_dir():
        path = f"{path}/README.md"
    return path if (root / path).is_file() else None


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name classes and functions with Sphinx's roles, of which the name is shown."""
    return ROLE.sub(r"<code>\1</code>", html)
