"""Settings in TOML files: the presets that zinit ships, and files of the user's."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from zinit.compat import modern_settings
from zinit.errors import ConfigError, first_line
from zinit.files import parsing
from zinit.registry import did_you_mean

PRESETS = resources.files("zinit.runs") / "presets"
OF_PRESETS = ("description", "model_layers")  # what a preset says of itself; the rest are settings

PROMPTS = frozenset({"prefix.parametrization", "prefix.init_std"})  # what prompts are, and start as
# Settings that are chosen for the model and its size where nothing gives them.
PICKED = PROMPTS | {"task.max_length", "train.learning_rate", "train.rates"}


class Preset(str):
    """A preset's full name, and what a run takes from it; "" where a run has none.

    Attributes:
        untouched: its settings ("prefix.layers") for which neither file nor arguments nor options have a value; without
            a preset, those of `PICKED` for which nothing has.
        model_layers: how many layers the model has that it was made for; None: it fits any.
        notes: what was scaled because the run is smaller than the preset's, in words.
    """

    untouched: frozenset[str] = frozenset()
    model_layers: int | None = None
    notes: tuple[str, ...] = ()


def preset_names() -> list[str]:
    """["alpaca/demo", "alpaca/llama-7b", ...]."""
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.toml')}"
        for folder in PRESETS.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    )


def list_presets() -> dict[str, str]:
    """{"alpaca/llama-7b": its description, ...}."""
    return {name: read_preset(name).get("description", "") for name in preset_names()}


def read_preset(name: str) -> dict[str, Any]:
    """A preset's values, what it says of itself (`OF_PRESETS`) included.

    Raises:
        ConfigError: if there is none of that name.
    """
    known = preset_names()
    if name not in known:
        raise ConfigError(f"no preset named {name!r}.{did_you_mean(name, known)}")
    folder, _, file = name.partition("/")
    return parse_toml((PRESETS / folder / f"{file}.toml").read_text(encoding="utf-8"))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A TOML file of settings, under their names of today.

    Raises:
        ConfigError: if it is missing or not TOML, or gives a setting under its old name and its new one.
    """
    with parsing(f"the config file {path} cannot be read", ConfigError):
        text = Path(path).read_bytes()
    with parsing(f"the config file {path} is not valid TOML", ConfigError):
        values = parse_toml(text.decode())
    try:
        return modern_settings(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """TOML in which the word "none" stands for no value: TOML has no null.

    Raises:
        tomllib.TOMLDecodeError: if it is not TOML.
    """
    try:
        return _with_none(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, tables without end
        raise tomllib.TOMLDecodeError(first_line(error)) from error


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(item) for key, item in value.items()}
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value
