"""Options of the command line, ``-o section.key=value``: the only place that reads them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

from zinit.compat import MOVED_SETTINGS, OLD_SETTINGS, modern_setting, modern_value
from zinit.config import ROLES, setting_paths
from zinit.errors import ConfigError
from zinit.registry import did_you_mean
from zinit.runs.config import CONTEXT, PARTS, SECTIONS, merge, plain_settings
from zinit.runs.presets import parse_toml

GROUP_RATE = re.compile(rf"train\.rates\.[^.]+\.({'|'.join(ROLES)})")  # groups are the task's: no setting names them
PART = re.compile(rf"({PARTS}\.[^.]+)\.(.+)")  # names of parts are the user's
OF_CONTEXT = re.compile(rf"{CONTEXT}\.[^.]+")  # the settings are the context source's own
METHOD_OPTIONS = ("method", "method.name")  # -o method=NAME chooses the method


def run_overrides(options: Iterable[str], *, task: str, method: str) -> dict[str, Any]:
    """What options say of a run, nested like its settings.

    Args:
        options: ``section.key=value``; the section may be left out where the key is unique.
        task: registered name; decides the settings of the section ``task``.
        method: registered name, where no option names another.

    Raises:
        ConfigError: if an option is none, or its setting is unknown or stands in several sections.
    """
    options = list(options)
    method = named_method(options) or method
    entries = {"task": task, "method": method}
    known = plain_settings() + [name for name, section in SECTIONS.items() if section.optional]
    known += [
        f"{name}.{path}"
        for name, section in SECTIONS.items()
        for path in setting_paths(section.settings_class(entries.get(name, name)))
    ]
    values = parse_options([option for option in options if _split(option)[0] not in METHOD_OPTIONS], known, method)
    return merge({"method": {"name": method}} if named_method(options) else {}, values)


def named_method(options: Iterable[str]) -> str | None:
    """The method that ``-o method=NAME`` asks for; the last one counts."""
    named = [text for name, text in map(_split, options) if name in METHOD_OPTIONS]
    return str(parse_value(named[-1])) if named else None


def parse_options(options: Iterable[str], known: Sequence[str], method: str = "") -> dict[str, Any]:
    """The values of options, nested: {"train": {"epochs": 3}}. A later option wins.

    Args:
        options: ``key=value``, the key as in ``known``, or its end where that is unique.
        known: the settings there are, in full ("train.epochs").
        method: whose settings are among them, for messages.

    Raises:
        ConfigError: as `run_overrides`.
    """
    values: dict[str, Any] = {}
    for option in options:
        name, text = _split(option)
        value = modern_value(name, parse_value(text))
        for part in reversed(_full_name(name, known, method).split(".")):
            value = {part: value}
        merge(values, value)
    return values


def parse_value(text: str) -> Any:
    """A value as TOML would read it; what TOML cannot read is text, "none" is no value."""
    try:
        return parse_toml(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return None if text.lower() in ("none", "null") else text


def _split(option: str) -> tuple[str, str]:
    name, equals, text = option.partition("=")
    if not equals:
        raise ConfigError(f"an option is key=value, such as train.epochs=3; got {option!r}.")
    return name, text


def _full_name(name: str, known: Sequence[str], method: str) -> str:
    """The setting that an option means, in full."""
    modern = _modern(name)
    if modern == CONTEXT:
        return f"{CONTEXT}.name"
    if GROUP_RATE.fullmatch(modern) or OF_CONTEXT.fullmatch(modern):
        return modern
    if part := PART.fullmatch(modern):
        of_prefix = [full.removeprefix("prefix.") for full in known if full.startswith("prefix.")]
        if part[2] not in of_prefix:
            raise ConfigError(f"no option named {name!r}: {part[1]} is a prefix.{did_you_mean(part[2], of_prefix)}")
        return modern
    found = [full for full in known if full == modern] or [full for full in known if full.endswith(f".{modern}")]
    nearest = min((full.count(".") for full in found), default=0)
    found = [full for full in found if full.count(".") == nearest]  # "prompts" is the prefix's, not train.rates.prompts
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"the option {name!r} is in several sections: say {' or '.join(found)}.")
    if name.startswith("method."):
        own = ", ".join(full for full in known if full.startswith("method.")) or "none"
        raise ConfigError(
            f"the method {method!r} has no option {name!r}. Choose the method that has it, as in -o method=lora -o "
            f"method.rank=4, or take one of: {own}."
        )
    names = known if "." in name else [full.split(".")[-1] for full in known]
    raise ConfigError(f"no option named {name!r}.{did_you_mean(name, names)}")


def _modern(name: str) -> str:
    """Today's name of a setting, also of one that is given without its section."""
    short = {old.rpartition(".")[2]: new for old, new in (OLD_SETTINGS | MOVED_SETTINGS).items()}
    return short.get(name) or modern_setting(name)
