"""The command that makes a run again: its settings, as they differ from those of its preset."""

from __future__ import annotations

import json
import shlex
from typing import Any

from zinit.errors import ConfigError
from zinit.runs.config import PARTS, RunConfig
from zinit.runs.settings import resolve

WORDS = ("true", "false", "none", "null", "inf", "nan")  # that an option reads as something else than text


def command_of(config: RunConfig, preset: str | None) -> str | None:
    """``zinit train ...`` that resolves to exactly these settings; None if no command does (a preset that is gone).

    Args:
        config: of the run.
        preset: its full name.
    """
    arguments: dict[str, Any] = {"backbone": config.backbone, "task": config.task}
    if preset:
        arguments["preset"] = preset
    arguments |= {name: getattr(config, name) for name in ("model", "data") if getattr(config, name) is not None}
    arguments["seed"] = config.seed
    options: list[str] = [] if config.method == "zero-init" else [f"method={config.method}"]
    try:
        start, own = (_flat(found.to_dict()) for found in (resolve(**arguments, options=options)[0], config))
        differing = {name: value for name, value in own.items() if _inherited(name, start, own) != value}
        for part in config.parts:  # at least one setting names a part
            if not any(name.startswith(f"{PARTS}.{part}.") for name in differing):
                differing[f"{PARTS}.{part}.length"] = config.parts[part].length
        options += [f"{name}={_text(value)}" for name, value in differing.items()]
        if resolve(**arguments, options=options)[0].to_dict() != config.to_dict():
            return None
    except ConfigError:
        return None
    words = [
        word
        for name, value in arguments.items()
        for each in (value if isinstance(value, list | tuple) else [value])
        for word in (f"--{name}", str(each))
    ]
    words += [word for option in options for word in ("-o", option)]
    return shlex.join(["zinit", "train", *words])


def _inherited(name: str, start: dict[str, Any], own: dict[str, Any]) -> Any:
    """What a setting is where no option gives it: as in the preset, or, of a part, as in the run's ``prefix``."""
    section, _, rest = name.partition(".")
    return own[f"prefix.{rest.partition('.')[2]}"] if section == PARTS else start.get(name)


def _flat(values: dict[str, Any], start: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{start}{name}.")
        elif name != "name" and not isinstance(value, dict):
            found[f"{start}{name}"] = value
    return found


def _text(value: Any) -> str:
    """A value as an option has it; text that would be read as something else is quoted."""
    if value is None:
        return "none"
    if isinstance(value, str):
        plain = value.replace("-", "").replace("/", "").replace("_", "").isalpha() and value.lower() not in WORDS
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)
