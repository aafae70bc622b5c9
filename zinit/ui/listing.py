"""What ``zinit ls`` lists. Nothing heavy is imported: what zinit ships is described by its source."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

from zinit.backbones import BACKBONES
from zinit.bench.plan import list_bench_presets
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.metrics import METRICS
from zinit.registry import Registry, did_you_mean
from zinit.runs.settings import list_presets
from zinit.tasks import TASKS


def list_kind(kind: str) -> dict[str, str]:
    """{name: one line about it} of a kind of entry.

    Raises:
        ConfigError: if there is no such kind.
    """
    registries = {"backbones": BACKBONES, "tasks": TASKS, "methods": METHODS, "metrics": METRICS}
    if kind == "presets":
        return list_presets()
    if kind == "benchmarks":
        return list_bench_presets()
    if kind not in registries:
        raise ConfigError(f"there is no list of {kind!r}.{did_you_mean(kind, [*registries, 'presets', 'benchmarks'])}")
    registry = registries[kind]
    return {name: _describe(registry, name) for name in registry}


def _describe(registry: Registry, name: str) -> str:
    module, _, attribute = registry.where(name).partition(":")
    if name in registry.shipped:
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        classes = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef)}
        of_module, of_entry = ast.get_docstring(tree), classes.get(attribute)
    else:
        try:
            entry = registry.get(name)
        except ConfigError as error:  # somebody else's package: the others are still listed
            return str(error)
        of_module, of_entry = importlib.import_module(module).__doc__, entry.__doc__
    several = registry is METHODS  # share a module
    return ((of_entry if several else of_module or of_entry) or "").strip().split("\n")[0]
