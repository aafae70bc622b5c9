"""Every setting there is, table by table, out of the types: what ``zinit ls settings`` and docs/settings.md show."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_type_hints

from zinit.adapter.registries import SOURCES
from zinit.bench.cells import Experiment
from zinit.bench.plan import BenchmarkFile
from zinit.config import JsonConfig, SettingDescription, describe_settings, documented_arguments, to_json
from zinit.encoders.retrieval import RetrievalConfig
from zinit.errors import ConfigError
from zinit.registry import Registry
from zinit.runs.config import CONTEXT, SECTIONS, RunConfig, plain_settings
from zinit.validation import MOST, describe_type, largest_number

HEADER = ("setting", "type", "default", "what it is")  # of `SettingsTable.rows`
OF_INDEX = "Options of zinit eval, chat and generate with --index: how features are mixed with their neighbours."
REQUIRED = "required"  # in the place of a default
_CONSTANT = re.compile(r"(?<!`)\b(?:None|True|False)\b(?!`)")  # of Python, in a docstring's words


@dataclass(frozen=True, kw_only=True)
class SettingsTable:
    """The settings of one table.

    Attributes:
        of: whose: a run's, a benchmark's, or those of answers with ``--index``, which are options only.
        table: its name; empty for what stands in no table.
        entry: of a registry, where one decides the settings: "lora".
        about: what it is; of another package's entry that cannot be imported, the reason.
        settings: those of a run by the names that options have: "train.epochs".
    """

    of: Literal["run", "benchmark", "index"] = "run"
    table: str
    entry: str | None = None
    about: str
    settings: list[SettingDescription]

    @property
    def title(self) -> str:
        """What stands above it: ``[method] name = "lora"``."""
        named = self.table and ("[[{}]]" if self.of == "benchmark" else "[{}]").format(self.table)
        return f'{named} name = "{self.entry}"' if self.entry else named or f"a {self.of}, outside of its tables"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """One for each setting, as `HEADER` names the columns. The limit of all numbers is not repeated."""
        rows = []
        for setting in self.settings:
            limit = "" if setting.largest in (None, MOST) else f"; at most {setting.largest:,}"
            rows.append(
                (setting.name, setting.type + limit, shown_default(setting), _as_options_have_it(setting.description))
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def settings_tables() -> list[SettingsTable]:
    """All settings of runs, then the others. Context sources are imported for theirs, and torch with them."""
    tables = [_of_class("", RunConfig, only=plain_settings())]
    for name, section in SECTIONS.items():
        if isinstance(section.settings, Registry):
            tables += _of_registry(name, section.settings)
        else:
            tables.append(_of_class(name, section.settings))
    tables += [_of_source(name) for name in SOURCES]
    return [
        *tables,
        _of_class(RetrievalConfig.called, RetrievalConfig, about=OF_INDEX, of="index"),
        _of_class("", BenchmarkFile, of="benchmark"),
        _of_class("experiment", Experiment, of="benchmark"),
    ]


def shown_default(setting: SettingDescription) -> str:
    """As ``-o key=value`` has it; a word where there is none."""
    if setting.required:
        return REQUIRED
    if setting.default is None:
        return "none"
    return setting.default if isinstance(setting.default, str) and setting.default else to_json(setting.default)


def _as_options_have_it(description: str) -> str:
    """A docstring's words with Python's constants as options and TOML write them."""
    words = _CONSTANT.sub(lambda constant: f"`{constant[0]}`", description.replace("``", "`"))
    return re.sub(r"`(?:None|True|False)`", lambda constant: constant[0].lower(), words)


def _of_class(
    table: str, settings: type[JsonConfig], *, only: list[str] | None = None, about: str = "", **facts: Any
) -> SettingsTable:
    found = [setting for setting in describe_settings(settings) if only is None or setting.name in only]
    about = about or (settings.__doc__ or "").strip().partition("\n")[0]
    return SettingsTable(table=table, about=about, settings=_named(found, table, **facts), **facts)


def _named(settings: list[SettingDescription], table: str, of: str = "run", **_: Any) -> list[SettingDescription]:
    """With the table's name in front, where options are given so."""
    if of == "benchmark" or not table:
        return settings
    return [replace(setting, name=f"{table}.{setting.name}") for setting in settings]


def _of_registry(table: str, registry: Registry) -> Iterator[SettingsTable]:
    """Those of the entries that have any."""
    for entry in registry:
        try:
            made = _of_class(table, registry.fact(entry, "Config"), about=registry.about(entry), entry=entry)
        except ConfigError as error:
            yield SettingsTable(table=table, entry=entry, about=str(error), settings=[])
            continue
        if made.settings:
            yield made


def _of_source(entry: str) -> SettingsTable:
    """A context source takes its settings as arguments. C and K, which every one takes, are no settings of its own."""
    try:
        source = SOURCES.get(entry)
    except ConfigError as error:
        return SettingsTable(table=CONTEXT, entry=entry, about=str(error), settings=[])
    hints, documented = get_type_hints(source.__init__, include_extras=True), documented_arguments(source)
    found = [
        SettingDescription(
            name=name,
            type=describe_type(hints[name]),
            default=None if parameter.default is parameter.empty else parameter.default,
            required=False,  # what has no default is known with the encoder
            largest=largest_number(hints[name]),
            description=documented.get(name, ""),
        )
        for name, parameter in inspect.signature(source).parameters.items()
        if name not in ("width", "length")
    ]
    return SettingsTable(table=CONTEXT, entry=entry, about=SOURCES.about(entry), settings=_named(found, CONTEXT))
