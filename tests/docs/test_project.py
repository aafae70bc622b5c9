"""What documents say about the project itself: paths that exist, marks that are set, versions and tools that agree."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

import zinit
from tests.shared import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PATH = re.compile(r"`((?:zinit|tests|scripts|docs|benchmarks|configs|\.ci)/[\w./-]*)`")
LINK = re.compile(r"\]\((?!http)([^)#]+)")

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md",
                                  "examples/README.md", "zinit/demo/README.md", *PAGES])  # fmt: skip
def test_paths_in_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = {path for path in PATH.findall(text) if "NAME" not in path}
    missing = {path for path in paths if not (ROOT / path).exists()}
    missing |= {link for link in LINK.findall(text) if not (ROOT / name).parent.joinpath(link).exists()}
    assert not missing


def test_every_mark_is_explained() -> None:
    marks = {line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert marks == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == zinit.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the schema requires


def test_hooks_are_those_of_ci_and_download_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    entries = {hook["entry"].split()[0] for hook in hooks["repos"][0]["hooks"]}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").partition("linters() {\n")[2].partition("}\n")[0]
    assert entries == {line.split()[0] for line in ci.splitlines()}


def test_extras_hold_what_tests_of_options_need() -> None:
    extras = {name: {re.split(r"[<>=\[]", item)[0] for item in items}
              for name, items in PROJECT["project"]["optional-dependencies"].items()}  # fmt: skip
    assert extras["quantize"] | extras["tensorboard"] <= extras["test"]
    assert {"zinit[serve]", "zinit[docs]"} <= set(PROJECT["project"]["optional-dependencies"]["test"])
    always = {re.split(r"[<>=\[]", item)[0] for item in PROJECT["project"]["dependencies"]}
    assert not always & set.union(*extras.values()), "a dependency of all is no extra"
    assert len(always) == len(PROJECT["project"]["dependencies"]), "a dependency is listed twice"


SKIPS = re.compile(r'importorskip\(\s*"(\w+)|skipif\(find_spec\("(\w+)')
PACKAGE = {"faiss": "faiss-cpu"}  # where it is not the module's name


def names_of(extra: str) -> set[str]:
    """The packages of an extra, those of extras in it included."""
    found: set[str] = set()
    for item in PROJECT["project"]["optional-dependencies"][extra]:
        name, _, inner = re.split(r"[<>=]", item)[0].rstrip("]").partition("[")
        found |= set().union(*map(names_of, inner.split(","))) if name == "zinit" else {name}
    return found


def test_one_extra_holds_all_that_tests_are_skipped_for() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    skipped = {PACKAGE.get(name, name) for found in SKIPS.findall(texts) for name in found if name}
    always = {re.split(r"[<>=\[]", item)[0] for item in PROJECT["project"]["dependencies"]}
    assert {"ray", "trl", "playwright", "faiss-cpu"} <= skipped
    assert skipped - always <= names_of("test-all")
    assert not {"ray", "trl", "playwright", "deepspeed"} & names_of("test"), "what CI installs stays small"
