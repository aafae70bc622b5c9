"""A hook of mkdocs (mkdocs.yml): documents outside of docs/ are pages too, and links are those of the repository.

A link is written as it works in the repository, ``../CONTRIBUTING.md`` or ``docs/suites.md``; on the site it leads to
the page. One that leads to no page stays as it is, and a strict build refuses it: name such a file in code instead.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
PAGES = {  # document of the repository: page of the site
    "README.md": "tour.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "tests/README.md": "tests.md",
    "zinit/demo/README.md": "demo.md",
}
DOCUMENTS = {page: document for document, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()[^)#:\s]+(?=[#)])")  # a relative link's path


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    for document, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the repository's links into the site's."""
    own: str = page.file.src_uri
    document = DOCUMENTS.get(own, DOCS + own)
    return LINK.sub(lambda link: to_site(link[0], document, own), markdown)


def to_site(link: str, document: str, page: str) -> str:
    """A link as the site has it.

    Args:
        link: relative, without an anchor, as it is written.
        document: the file of the repository that it is in.
        page: the page of the site that it is in.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(document), link))
    named = PAGES.get(target) or PAGES.get(f"{target}/README.md")
    if named is None and not target.startswith(DOCS):
        return link
    return posixpath.relpath(named or target.removeprefix(DOCS), posixpath.dirname(page) or ".")
