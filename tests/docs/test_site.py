"""The site: built as a reader's command builds it, without a warning, a dead link or a request to anybody."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import zinit
from scripts.site_pages import DOCUMENTS, to_site
from tests.shared import ROOT

DOCUMENT_LINK = re.compile(r"\]\(([^)#:\s]*)#([^)\s]+)\)")
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?([^"'\s>]+)|<link[^>]*\shref=["']?([^"'\s>]+)""")
IN_STYLES = re.compile(r"""(?:url\(|@import\s+)["']?(https?:[^"')\s]+)""")


@contextmanager
def warnings_of_mkdocs() -> Iterator[list[str]]:
    """What is logged while inside, from warnings on."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("mkdocs"), Keep(logging.WARNING)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # with DEBUG mkdocs checks no anchors
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def build_site(folder: Path, **changes: Any) -> list[str]:
    """Builds it into a folder, and gives the warnings."""
    with warnings_of_mkdocs() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")  # an advertisement, not about this site
        patch.setenv("DISABLE_MKDOCS_2_WARNING", "true")
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), **changes))
        except Abort:
            assert found
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build_site(folder) == []
    return folder


def test_the_site_builds_without_a_warning_and_has_every_document(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    written |= {Path(page).with_suffix(".html") for page in DOCUMENTS}
    built = {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")}
    assert built == written


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    bases = ("backbones.base.Backbone", "tasks.base.Task", "methods.base.Method", "adapter.encoding.Encoder",
             "adapter.sources.ContextSource", "experts.base.Expert", "suites.base.Suite",
             "interop.base.Format")  # fmt: skip
    for name in ("Handle.save", "tasks.base.Task.collate", *bases, *zinit.__all__):
        if name not in ("AttentionSite", "Task"):  # on the pages of their rooms
            assert f'id="zinit.{name}"' in pages, name
    assert 'id="zinit.backbones.base.AttentionSite"' in pages


def test_reading_a_page_asks_no_other_host(site: Path) -> None:
    loaded = IN_STYLES.findall('a{background:url("http://x.y/z")}')  # the check can fail
    assert loaded == ["http://x.y/z"]
    for path in site.rglob("*.html"):
        names = ["".join(found) for found in LOADED.findall(path.read_text(encoding="utf-8"))]
        assert names, path
        assert not [name for name in names if "//" in name], path
    for path in site.rglob("*.css"):
        assert IN_STYLES.findall(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](other.md#nowhere)", "#nowhere"),
        ("[a](../zinit/prefix.py)", "../zinit/prefix.py"),
        ("[a](/other.md)", "/other.md"),
    ],
)
def test_what_is_wrong_with_a_page_is_a_warning(text: str, says: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# One\n\n{text}\n")
    (docs / "other.md").write_text("# Two\n")
    plain = {"theme": {"name": None, "custom_dir": str(docs)}, "plugins": [], "hooks": [], "extra_css": []}
    (docs / "main.html").write_text("{{ page.content }}")
    nav = ["index.md", "other.md"]
    found = build_site(tmp_path / "site", docs_dir=str(docs), nav=nav, **plain)
    assert len(found) == 1
    assert says in found[0]
    (docs / "index.md").write_text("# One\n\n[a](other.md#two)\n")
    assert "not included in the" in "".join(build_site(tmp_path / "site", docs_dir=str(docs), nav=nav[:1], **plain))


@pytest.mark.parametrize(
    ("link", "document", "page", "expected"),
    [
        ("docs/suites.md", "README.md", "tour.md", "suites.md"),
        ("../README.md", "docs/index.md", "index.md", "tour.md"),
        ("../../CONTRIBUTING.md", "docs/api/more.md", "api/more.md", "../contributing.md"),
        ("../new-task.md", "docs/api/tasks.md", "api/tasks.md", "../new-task.md"),
        ("examples/", "README.md", "tour.md", "examples.md"),
        ("tests/README.md", "CONTRIBUTING.md", "contributing.md", "tests.md"),
        ("dynamics.md", "docs/recipes.md", "recipes.md", "dynamics.md"),
        ("../zinit/prefix.py", "docs/recipes.md", "recipes.md", "../zinit/prefix.py"),
    ],
)
def test_links_of_the_repository_lead_to_pages(link: str, document: str, page: str, expected: str) -> None:
    assert to_site(link, document, page) == expected


def github_anchors(text: str) -> set[str]:
    """Those of a document's headings, as a repository's page makes them."""
    code_left_out = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", code_left_out, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_the_repositorys_page_too() -> None:
    checked = 0
    for document in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in DOCUMENTS.values())]:
        text = document.read_text(encoding="utf-8")
        for link, anchor in DOCUMENT_LINK.findall(text):
            target = document.parent / link if link else document
            assert anchor in github_anchors(target.read_text(encoding="utf-8")), (document.name, link, anchor)
            checked += 1
    assert checked > 10
    assert github_anchors("# A `b-c`, d?\n```\n# no heading\n```\n") == {"a-b-c-d"}
