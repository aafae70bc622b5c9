"""Where the settings of a run come from: a preset, a config file, the command line; later ones win."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from zinit.backbones import BACKBONES
from zinit.errors import ConfigError
from zinit.files import is_file, local_path
from zinit.methods import METHODS
from zinit.methods.rates import shares_rates
from zinit.registry import did_you_mean
from zinit.runs.config import DEFAULT_METHOD, PARTS, RunConfig, merge, read_tables
from zinit.runs.options import named_method, run_overrides
from zinit.runs.presets import OF_PRESETS, PICKED, Preset, preset_names, read_config_file, read_preset
from zinit.tasks import TASKS
from zinit.validation import shown, split_at_commas

RATES = ("learning_rate", "min_learning_rate", "rates")  # settings of [train] that are right for one method only
PLACES = ("model", "data", "warm_start")
TEXTS = ("preset", "backbone", "model")  # of a config file, which are looked at before all is checked


def resolve(
    *,
    backbone: str | None = None,
    task: str | None = None,
    method: str | None = None,
    model: str | None = None,
    encoder: str | None = None,
    data: str | Sequence[str] | None = None,
    preset: str | None = None,
    config_file: str | None = None,
    seed: int | None = None,
    warm_start: str | None = None,
    options: Iterable[str] = (),
) -> tuple[RunConfig, Preset]:
    """The settings of a run: preset, then config file, then the arguments, then the options.

    Without a model the embedded demo is trained, with the preset of the method's demo on the backbone, or else the
    task's ``demo`` preset, unless another is named.

    Args:
        backbone: see `RunConfig`; task, model and data alike.
        task: default: the demo's, or the backbone's own.
        method: registered name; as the option ``method=NAME``.
        model: folder or Hub id.
        encoder: folder, name or Hub id of an image model.
        data: file, folder or Hub id, or several.
        preset: ``alpaca/llama-7b``, or ``llama-7b`` for the task at hand.
        config_file: TOML.
        seed: for everything random.
        warm_start: folder or Hub id of an adapter or a run to start from.
        options: ``section.key=value``; the section may be left out where the key is unique.

    Returns:
        The settings, and the preset's full name, "" without one: a `Preset`, which knows what of it is in the settings.

    Raises:
        ConfigError: naming the setting that is unknown or wrong.
    """
    options = [*([] if method is None else [f"method={method}"]), *options]
    from_file = _read_run_file(config_file)
    preset = _known_name(preset or from_file.pop("preset", None))
    named = named_method(options) or from_file["method"].get("name")
    if preset is None and task is None and "name" not in from_file["task"]:
        preset = _demo_preset(named, backbone or from_file.get("backbone"), options, model or from_file.get("model"))
    backbone = _choose_backbone(backbone or from_file.get("backbone"), preset)
    task = _choose_task(task or from_file["task"].get("name"), preset, backbone)
    overrides = run_overrides(options, task=task, method=named or DEFAULT_METHOD)
    preset = _full_preset(preset, task, _lacking({"model": model, "data": data}, from_file, overrides))

    values = {} if preset is None else preset_values(preset, named)
    said = {"backbone": backbone, "model": model or None, "data": data or None, "seed": seed, "warm_start": warm_start}
    given: dict[str, Any] = {}
    for source in (from_file, _given(said), {"task": {"name": task}}, _of_encoder(encoder), overrides):
        merge(given, source)
    _check_parts(overrides, named or DEFAULT_METHOD)
    known = _known_preset(preset, values, given)
    merge(values, given)
    if values.get("model") is not None and values.get("data") is None:
        raise ConfigError("say what to train on: --data FILE_OR_HUB_ID (the embedded data is for the embedded model).")
    return RunConfig.from_dict(_with_absolute_paths(values)), known


def _known_preset(name: str | None, values: dict[str, Any], given: dict[str, Any]) -> Preset:
    """A preset that knows what of its values will be in the settings; they are scaled to a shorter run."""
    preset = Preset(name or "")
    if name is None:
        said = {".".join(path.split(".")[:2]) for path in _paths(given)}
        preset.untouched = PICKED - said
        return preset
    preset.untouched = frozenset(_paths(values) - _paths(given))
    preset.model_layers = read_preset(name).get("model_layers")
    preset.notes = _shorten(values.get("train", {}), given.get("train", {}))
    return preset


def _demo_preset(method: str | None, backbone: str | None, options: Sequence[str], model: str | None) -> str | None:
    """The preset of a method's own demo on a backbone; None where it has none, or a model is named."""
    if method is None or backbone is None or model or any(option.startswith("model=") for option in options):
        return None
    return METHODS.fact(method, "demos").get(backbone)


def _of_encoder(source: str | None) -> dict[str, Any]:
    return {} if source is None else {"encoder": {"source": source}}


def _check_parts(overrides: dict[str, Any], method: str) -> None:
    """Refuses an option of the one prefix where the method's parts have settings of their own for it."""
    parts = METHODS.fact(method, "defaults").get(PARTS, {})
    for name in overrides.get("prefix", {}):
        if own := [part for part, table in parts.items() if name in table]:
            raise ConfigError(
                f"the method {method!r} has parts with a {name} of their own. Say which you mean: "
                f"{' or '.join(f'-o {PARTS}.{part}.{name}=...' for part in own)}."
            )


def preset_values(preset: str, method: str | None) -> dict[str, Any]:
    """A preset's settings for a run by some method: its learning rates are those of its own method.

    Args:
        preset: its full name.
        method: registered name; None is the preset's own.
    """
    values = read_preset(preset)
    for about in OF_PRESETS:
        values.pop(about, None)
    own = read_tables(values)["method"].get("name", DEFAULT_METHOD)
    if method is not None and not shares_rates(*(METHODS.fact(name, "default_rates") for name in (method, own))):
        values["train"] = {name: value for name, value in values.get("train", {}).items() if name not in RATES}
    return values


def override(
    config: RunConfig,
    *,
    model: str | None = None,
    encoder: str | None = None,
    data: str | Sequence[str] | None = None,
    seed: int | None = None,
    options: Iterable[str] = (),
) -> RunConfig:
    """The settings of an earlier run, some of them replaced.

    Args:
        config: as saved.
        model: see `RunConfig`; data and seed alike.
        encoder: folder, name or Hub id of the same image model.
        data: file, folder or Hub id, or several.
        seed: for everything random.
        options: see `resolve`.
    """
    values = merge(config.to_dict(), _given({"model": model, "data": data, "seed": seed}))
    merge(values, _of_encoder(encoder))
    merge(values, run_overrides(options, task=config.task, method=config.method))
    return RunConfig.from_dict(_with_absolute_paths(values))


def absolute_path(source: Any) -> Any:
    """A local path in full (links kept), so that a run can be used from any folder; anything else as it is.

    Args:
        source: a path, or a list of them.
    """
    if isinstance(source, list | tuple):
        return [absolute_path(one) for one in source]
    if not isinstance(source, str) or not source:
        return source
    if os.path.exists(local_path(source)):
        return str(local_path(source).absolute())
    # A model's name with a file of weights, see `zinit.models.timm.load_timm`.
    name, colon, file = source.partition(":")
    if colon and Path(file).suffix and is_file(local_path(file)):
        return f"{name}:{local_path(file).absolute()}"
    return source


def _read_run_file(path: str | None) -> dict[str, Any]:
    """A config file's values, its sections filled in; what decides how the rest is read has its type."""
    if path is None:
        return read_tables({})
    values = read_config_file(path)
    try:
        tables = read_tables(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for name in TEXTS:
        if not isinstance(values.get(name, ""), str | None):
            raise ConfigError(f"{path}: {name} must be text; got {shown(values[name])}.")
    return values | tables


def _known_name(preset: str | None) -> str | None:
    """A preset's name, which there is, with its task in front or without it."""
    names = preset_names()
    known = {*names, *(name.partition("/")[2] for name in names)}
    if preset is None or preset in known:
        return preset
    if is_file(local_path(preset)):
        raise ConfigError(
            f"--preset takes a name ('zinit ls presets'), and {preset!r} is a file. Pass a file of your own with "
            f"--config {preset}."
        )
    raise ConfigError(f"no preset named {preset!r}.{did_you_mean(preset, names)}")


def _choose_backbone(backbone: str | None, preset: str | None) -> str:
    of_preset = read_preset(preset).get("backbone") if preset and "/" in preset else None
    if chosen := backbone or of_preset:
        BACKBONES.where(chosen)
        return chosen
    raise ConfigError(f"say which backbone to train: --backbone {'|'.join(BACKBONES)}.")


def _choose_task(task: str | None, preset: str | None, backbone: str) -> str:
    """The task named, the preset's, or the backbone's own; it is registered."""
    if task is None and preset and "/" in preset:
        task = preset.partition("/")[0]
    if task is not None:
        TASKS.where(task)
        return task
    own = str(BACKBONES.fact(backbone, "default_task"))
    if own not in TASKS:
        raise ConfigError(
            f"the backbone {backbone!r} has no task of its own to train yet. Attach a prefix in Python "
            f"(zinit.attach), register a task (zinit.register_task), or name one with --task: {', '.join(TASKS)}."
        )
    return own


def _lacking(said: dict[str, Any], *others: dict[str, Any]) -> list[str]:
    """The names that neither the arguments nor the other settings say anything for."""
    return [name for name in said if not any(settings.get(name) for settings in (said, *others))]


def _full_preset(preset: str | None, task: str, lacking: Sequence[str]) -> str | None:
    """The name with its task, alpaca/demo for demo. Without a name, the task's demo where no model is named."""
    if preset is not None:
        return preset if "/" in preset else f"{task}/{preset}"
    if "model" not in lacking:
        return None
    if f"{task}/demo" not in preset_names():
        options = " and ".join(f"--{name}" for name in lacking)
        raise ConfigError(f"the task {task!r} has no embedded demo: pass {options}.")
    return f"{task}/demo"


def _paths(values: dict[str, Any]) -> set[str]:
    """{"seed", "prefix.layers", ...}"""
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    return (values.keys() - tables) | {f"{name}.{path}" for name, table in tables.items() for path in _paths(table)}


def _shorten(train: dict[str, Any], given: dict[str, Any]) -> tuple[str, ...]:
    """Fits a preset's ``[train]`` to a shorter run: epochs replace its steps, and its warm-up stays as large a part.

    Returns:
        What was scaled, in words. Where the user gave steps and the preset's warm-up is in epochs,
        `zinit.runs.preview.fit_warmup` does it.
    """
    epochs, steps = given.get("epochs"), given.get("steps")
    own_warmup = not {"warmup_epochs", "warmup_steps"} & given.keys()
    if _is_number(epochs) and steps is None and (of := train.pop("steps", None)):
        warmup = train.pop("warmup_steps", None)
        notes = [f"train.epochs={epochs:g} in the place of the preset's {of} steps"]
        if own_warmup and warmup:
            train["warmup_epochs"] = epochs * warmup / of
            notes.append(f"train.warmup_epochs={train['warmup_epochs']:g} (the preset: {warmup} of {of} steps)")
        return tuple(notes)
    warmup, of = train.get("warmup_steps"), train.get("steps")
    if own_warmup and warmup and of and isinstance(steps, int) and 0 < steps <= warmup:
        train["warmup_steps"] = steps * warmup // of
        return (f"train.warmup_steps={train['warmup_steps']} of {steps} (the preset: {warmup} of {of})",)
    warmup, of = train.get("warmup_epochs"), train.get("epochs")
    if own_warmup and warmup and of and _is_number(epochs) and steps is None and 0 < epochs <= warmup:
        train["warmup_epochs"] = warmup * epochs / of
        return (f"train.warmup_epochs={train['warmup_epochs']:g} of {epochs:g} (the preset: {warmup:g} of {of:g})",)
    return ()


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _with_absolute_argument(words: Any) -> Any:
    """An expert's name, with the path behind its colon in full."""
    name, colon, argument = words.partition(":") if isinstance(words, str) else (words, "", "")
    return f"{name}:{absolute_path(argument)}" if colon else words


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    values |= {name: absolute_path(values[name]) for name in PLACES if name in values}
    task = values.get("task", {})
    task |= {
        name: absolute_path(task[name]) for name in ("held_out_data", "image_folder", "known_texts") if name in task
    }
    if isinstance(experts := split_at_commas(task.get("experts")), list | tuple):
        task["experts"] = [_with_absolute_argument(words) for words in experts]
    encoder = values.get("encoder", {})
    if "source" in encoder:
        encoder["source"] = absolute_path(encoder["source"])
    for table, name in ((values.get("train", {}), "activation_cache"), (encoder, "cache")):
        if isinstance(folder := table.get(name), str) and folder:  # it may not exist yet
            table[name] = str(local_path(folder).absolute())
    return values
