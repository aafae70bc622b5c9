"""The shape of the package: no circle of imports, few modules at the top, short functions, private names in one place.

Directions of imports are the contracts of pyproject.toml, which ``lint-imports`` checks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared import ROOT

PACKAGE = ROOT / "zinit"
MOST_AT_THE_TOP = 10
LONGEST_FUNCTION = 60  # lines, from "def" to the end; the goal is 30

# Functions that are tables: data tables and the signatures of commands, whose length says nothing.
TABLES = {"cli.py"}
# A private name of a library, and where else than in compat.py it may stand, with the reason.
ELSEWHERE = {
    "_attn_implementation": {"backbones/_hf.py"},  # the view of a config answers to it
}


# --- imports ----------------------------------------------------------------------------------------------------------


def modules(package: Path) -> dict[str, Path]:
    """{dotted name: file} of a package's modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, wherever in its code the import stands.

    The package's own file is left out: it names objects of all rooms, and is asked for nothing but the version.
    """
    known = modules(package)
    arrows = {name: set[str]() for name in known if name != package.name}
    for name in arrows:
        for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
            for target in targets(node):
                while target and target not in known:  # "package.module.object" is of package.module
                    target = target.rpartition(".")[0]
                if target in arrows and target != name:
                    arrows[name].add(target)
    return arrows


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name their module in full"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(arrows[name]):
                if found := visit(target, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in arrows if (found := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(imports(PACKAGE)) == []


def test_this_check_of_circles_can_fail(tmp_path: Path) -> None:
    package = tmp_path / "circular"
    (package / "room").mkdir(parents=True)
    for name, code in {
        "__init__": "from circular.a import A",
        "a": "import circular; from circular.room import b",
        "room/__init__": "",
        "room/b": "def late():\n    from circular.room.c import thing",
        "room/c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import circular.a",
    }.items():
        (package / f"{name}.py").write_text(code)
    assert circle(imports(package)) == ["circular.a", "circular.room.b", "circular.room.c", "circular.a"]
    (package / "room" / "c.py").write_text("")
    assert circle(imports(package)) == []


def test_few_modules_stand_at_the_top() -> None:
    top = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert len(top) <= MOST_AT_THE_TOP, f"{len(top)} modules at the top: {', '.join(top)}. Is there a room for one?"


# --- length -----------------------------------------------------------------------------------------------------------


def functions(package: Path) -> Iterator[tuple[str, int]]:
    """("room/file.py:name", lines) of every function; a decorator is not counted, a nested function is of both."""
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{where}:{node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    long = {name for name, lines in functions(PACKAGE) if lines > LONGEST_FUNCTION and name.split(":")[0] not in TABLES}
    assert not long, f"longer than {LONGEST_FUNCTION} lines: {', '.join(sorted(long))}"


def test_this_check_of_lengths_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "@d\ndef f():\n    pass\n\n\nclass A:\n    async def g(self):\n        return (\n0)\n"
    )
    assert dict(functions(tmp_path)) == {"a.py:f": 2, "a.py:g": 3}


# --- private names of libraries ---------------------------------------------------------------------------------------


def attributes(path: Path) -> set[str]:
    """Names after a dot, and names that getattr, setattr and hasattr are asked for, in a file's code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and getattr(node.func, "id", "").endswith("attr"):
            found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    return {name for name in found if re.match(r"_[a-z]", str(name))}


def test_private_names_of_libraries_are_in_one_module() -> None:
    private = attributes(PACKAGE / "compat.py")
    assert len(private) > 10
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        allowed = {name for name, places in ELSEWHERE.items() if where in places}
        found = attributes(path) & private - allowed
        assert where == "compat.py" or not found, f"{where} touches {', '.join(sorted(found))}: see zinit/compat.py"


@pytest.mark.parametrize("code", ["a._orig_mod", "getattr(a, '_orig_mod', a)", "hasattr(a.b, '_orig_mod')"])
def test_this_check_of_names_can_fail(code: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(code)
    assert attributes(tmp_path / "a.py") == {"_orig_mod"}
