"""The documentation: its site can be built, its links lead somewhere, and it leaves out no name, part or command."""

import logging
import re
from pathlib import Path

import pytest

import dyntune
from dyntune.commands.main import app
from dyntune.parts.registry import registered

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("**/*.md") if path.relative_to(ROOT).parts[0][0] != ".")
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(#[^)\s]*)?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made where the repository is read."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {f"#{re.sub(r'[^a-z0-9 _-]', '', heading.lower()).replace(' ', '-')}" for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_in_the_repository_lead_somewhere(page):
    for path, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), path + anchor


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without a warning: of pages outside the navigation, links, anchors, names in the reference."""
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    complaints = logging.Handler(logging.WARNING)
    said: list[str] = []
    complaints.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(complaints)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False)
    build.build(config)
    logging.getLogger("mkdocs").removeHandler(complaints)
    assert not said
    return folder


def test_the_site_is_built_and_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)', page.read_text()
        )
        assert not fetched, page


def test_the_reference_has_every_public_name_and_every_part(site):
    known = set(re.findall(r'id="(dyntune\.[\w.]+)"', "".join(p.read_text() for p in (site / "reference").iterdir())))
    names = {name.rpartition(".")[2] for name in known}
    assert set(dyntune.__all__) - names <= {"DyntuneError", "__version__"}
    assert {f"{part.__module__}.{part.__qualname__}" for part in registered().values()} <= known


def test_the_page_of_the_command_line_has_every_command():
    text = (ROOT / "docs" / "commands.md").read_text()
    commands = {command.name for command in app.registered_commands if not command.hidden}
    assert commands == set(re.findall(r"^\|[^|]*\| `(\w+)` \| `dyntune \1\b", text, re.M))
