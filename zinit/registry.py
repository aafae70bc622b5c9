"""One small lazy registry, used for backbones, tasks, methods, metrics, formats, encoders and context sources."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from zinit.errors import ConfigError

LONGEST_NAME = 80  # that a message repeats in full


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name (if one is near) and all of them.

    Args:
        name: what the user wrote.
        known: the names that exist.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def import_object(where: str) -> Any:
    """The object at an address, ``"package.module:OBJECT"``."""
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Address(str):
    """Where an object is, ``"package.module:OBJECT"``, among an entry's facts."""


class Entry(NamedTuple):
    """A name's address and what is known of it without importing it.

    Attributes:
        where: ``"package.module:OBJECT"``.
        about: one line for ``zinit ls``; empty takes the object's docstring.
        facts: attributes of the object that are asked for early, by name; an `Address` stands for what is there.
    """

    where: str
    about: str = ""
    facts: Mapping[str, Any] = MappingProxyType({})


class Registry:
    """Names to ``"module:object"`` addresses, imported on first use, so that listing costs nothing.

    Installed packages add theirs through entry points of a group; these are looked up once, when a list or an unknown
    name is first asked for. One that cannot be used (its name is taken) is left out with a warning.

    Args:
        kind: what the entries are, for messages ("backbone", "task").
        entries: the names zinit ships, each with its address or an `Entry`.
        group: of the entry points ("zinit.backbones"); None has none.

    Attributes:
        shipped: the names zinit ships.
        facts: what the shipped entries say of themselves; see `Entry`.
    """

    def __init__(self, kind: str, entries: Mapping[str, str | Entry], *, group: str | None = None) -> None:
        described = {name: Entry(entry) if isinstance(entry, str) else entry for name, entry in entries.items()}
        self.kind = kind
        self.shipped = frozenset(entries)
        self._where: dict[str, str] = {name: entry.where for name, entry in described.items()}
        self._about: dict[str, str] = {name: entry.about for name, entry in described.items()}
        self.facts: dict[str, Mapping[str, Any]] = {name: entry.facts for name, entry in described.items()}
        self._unread = group

    def register(self, name: str, where: str, about: str = "") -> None:
        """Adds an entry.

        Args:
            name: how users will call it.
            where: ``"package.module:OBJECT"``; imported when first asked for.
            about: one line for ``zinit ls``; empty takes the object's docstring.

        Raises:
            ConfigError: if the name is taken by something else, or the address is not of that form.
        """
        module, _, attribute = where.partition(":")
        if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
            raise ConfigError(f"the {self.kind} {name!r} needs an address like 'package.module:OBJECT', got {where!r}.")
        taken_by = self._all().get(name, where)
        if taken_by != where:
            raise ConfigError(f"a {self.kind} named {name!r} exists already ({taken_by}). Choose another name.")
        self._where[name] = where
        if about:
            self._about[name] = about

    def get(self, name: str) -> Any:
        """The object behind a name.

        Raises:
            ConfigError: if the name is unknown (with the nearest known one), its address cannot be imported, or the
                object there calls itself by another name: files it saves could not find it again.
        """
        where = self.where(name)
        try:
            found = import_object(where)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the {self.kind} {name!r} cannot be loaded from {where!r}: {error}") from error
        own = getattr(found, "name", name)
        if isinstance(own, str) and own != name:
            raise ConfigError(
                f"{where} is registered as the {self.kind} {name!r}, but calls itself {own!r}, the name that files it "
                f"saves would look for. Register it as {own!r}, or set its attribute name to {name!r}."
            )
        return found

    def fact(self, name: str, attribute: str) -> Any:
        """An attribute of an entry; one that came with it (`Entry.facts`) is known without importing the entry.

        Raises:
            ConfigError: as `get`.
            AttributeError: if the entry has no such attribute.
        """
        self.where(name)
        facts = self.facts.get(name, {})
        if attribute not in facts:
            return getattr(self.get(name), attribute)
        return import_object(facts[attribute]) if isinstance(facts[attribute], Address) else facts[attribute]

    def where(self, name: str) -> str:
        """The address of an entry, without importing it.

        Raises:
            ConfigError: if the name is unknown (with the nearest known one).
        """
        if name not in self:
            shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
            raise ConfigError(f"no {self.kind} named {shown!r}.{did_you_mean(name, self)}")
        return self._where[name]

    def about(self, name: str) -> str:
        """One line about an entry. Entries that came with a line are not imported for it.

        Raises:
            ConfigError: if the name is unknown, or an entry without a line cannot be imported.
        """
        where = self.where(name)
        if about := self._about.get(name):
            return about
        return _first_docstring(self.get(name), where.partition(":")[0])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._all()

    def _all(self) -> dict[str, str]:
        """All entries, those of installed packages included."""
        group, self._unread = self._unread, None
        if group is not None:
            from importlib.metadata import entry_points

            for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
                try:
                    self.register(entry.name, entry.value.replace(" ", ""))
                except ConfigError as error:
                    owner = getattr(entry.dist, "name", "unknown")
                    warnings.warn(f"an entry point of the package {owner!r} is left out: {error}", stacklevel=2)
        return self._where


def _first_docstring(found: Any, module: str) -> str:
    """The first line of an object's own docstring, or of its module's; of an instance the module's comes first."""
    docstrings = [found.__doc__, importlib.import_module(module).__doc__]
    if not inspect.isclass(found) and not inspect.isroutine(found):
        docstrings.reverse()
    text = next(filter(None, docstrings), "")
    return text.strip().split("\n")[0]
