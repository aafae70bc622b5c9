"""What ``zinit ls`` lists. Nothing heavy is imported: entries of registries carry their descriptions."""

from __future__ import annotations

from collections.abc import Callable

from zinit.adapter.registries import ENCODERS, FORMATS, SOURCES
from zinit.backbones import BACKBONES
from zinit.bench.plan import list_bench_presets
from zinit.errors import ConfigError
from zinit.experts import EXPERTS
from zinit.methods import METHODS
from zinit.metrics import METRICS
from zinit.registry import Registry, did_you_mean
from zinit.runs.presets import list_presets
from zinit.suites import SUITES
from zinit.tasks import TASKS
from zinit.tasks.conversation.registry import TEMPLATES

REGISTRIES = {
    "backbones": BACKBONES,
    "tasks": TASKS,
    "templates": TEMPLATES,
    "methods": METHODS,
    "metrics": METRICS,
    "formats": FORMATS,
    "encoders": ENCODERS,
    "sources": SOURCES,
    "experts": EXPERTS,
    "suites": SUITES,
}
FILES: dict[str, Callable[[], dict[str, str]]] = {"presets": list_presets, "benchmarks": list_bench_presets}


def list_kind(kind: str) -> dict[str, str]:
    """{name: one line about it} of a kind of entry.

    Raises:
        ConfigError: if there is no such kind.
    """
    if kind in FILES:
        return FILES[kind]()
    if kind not in REGISTRIES:
        raise ConfigError(f"there is no list of {kind!r}.{did_you_mean(kind, [*REGISTRIES, *FILES, 'settings'])}")
    return {name: _about(REGISTRIES[kind], name) for name in REGISTRIES[kind]}


def _about(registry: Registry, name: str) -> str:
    """One line about an entry; of another package's entry that cannot be imported, the reason."""
    try:
        return registry.about(name)
    except ConfigError as error:
        return str(error)
