"""The settings of a run, resolved from presets, a config file and options."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from zinit.backbones import BACKBONES
from zinit.compat import modern_setting, modern_settings
from zinit.config import JsonConfig, PrefixConfig, TrainConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.models.quantization import QUANTIZATIONS, Quantize
from zinit.registry import did_you_mean
from zinit.tasks import TASKS

PRESETS = resources.files("zinit.runs") / "presets"
SECTIONS = ("method", "prefix", "train", "task")
DEFAULT_METHOD = "zero-init"


@dataclass(frozen=True, kw_only=True)
class RunConfig(JsonConfig):
    """Everything that decides what a run computes.

    Args:
        backbone: registered name.
        task: registered name.
        model: folder or Hub id; None is the backbone's embedded demo.
        revision: of the model on the Hub.
        data: file, folder or Hub id; None is the task's embedded demo data.
        seed: of the prompts' start, the split and the order of the examples.
        dtype: of the frozen model; "auto" is bfloat16 on a GPU, float32 on a CPU.
        quantize: hold the frozen model's matrices in 8 or 4 bits ("bnb-8bit", "bnb-4bit", "torchao-int8"); None does
            not. See `zinit.models.quantization`.
        offload: keep the frozen model's blocks in CPU memory; each layer comes to the GPU while it runs.
        method: registered name of how the model is adapted.
        method_options: the method's own settings; None is its defaults.
        prefix: the prefix, for the methods that have one.
        train: the loop.
        options: the task's own settings.
    """

    backbone: str
    task: str
    model: str | None = None
    revision: str | None = None
    data: str | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    offload: bool = False
    method: str = DEFAULT_METHOD
    method_options: Any = None
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    options: Any = None

    def __post_init__(self) -> None:
        for name in ("backbone", "task", "model", "revision", "data"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be text; got {value!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number of at least 0; got {self.seed!r}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16; got {self.dtype!r}.")
        self._check_memory()
        if self.method_options is None:
            object.__setattr__(self, "method_options", METHODS.get(self.method).Config())

    def _check_memory(self) -> None:
        trains_host = METHODS.get(self.method).trains_host
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ConfigError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, or none; got {self.quantize!r}.")
        if not isinstance(self.offload, bool):
            raise ConfigError(f"offload must be true or false; got {self.offload!r}.")
        if trains_host and (self.quantize is not None or self.offload):
            what = "offload=true" if self.offload else f"quantize={self.quantize}"
            raise ConfigError(
                f"{what} is for a frozen model, and the method {self.method!r} trains its weights. Leave it out, or "
                f"train beside the model: -o method=zero-init, or -o method=lora."
            )
        needed = {
            "quantize=none (what is quantised stays on the GPU)": self.quantize is not None,
            "train.compile=false": self.train.compile,
            "train.activation_cache=none (it reads the weights)": self.train.activation_cache is not None,
            "train.gradient_checkpointing=true (without it the weights would wait on the GPU for the backward pass)": (
                not self.train.gradient_checkpointing
            ),
        }
        if self.offload and (changes := [text for text, found in needed.items() if found]):
            raise ConfigError(f"offload=true needs {'; '.join(changes)}.")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values: scalars, then the tables ``method``, ``prefix``, ``train`` and ``task``."""
        return {
            **{name: getattr(self, name) for name in _plain_names()},
            "method": {"name": self.method, **self.method_options.to_dict()},
            "prefix": self.prefix.to_dict(),
            "train": self.train.to_dict(),
            "task": {"name": self.task, **self.options.to_dict()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """From nested plain values, as `to_dict` makes them and TOML files hold them.

        Raises:
            ConfigError: naming the setting that is unknown or wrong.
        """
        values = modern_settings(values)
        if isinstance(values.get("method"), str):
            values["method"] = {"name": values["method"]}
        sections = {name: dict(values.pop(name, {})) for name in SECTIONS}
        known = _plain_names()
        for name in values:
            if name not in known:
                raise ConfigError(f"there is no setting {name!r}.{did_you_mean(name, [*known, *SECTIONS])}")
        task = sections["task"].pop("name", None)
        if task is None:
            raise ConfigError("a run needs a task: --task NAME, or name = ... in the table [task].")
        method = sections["method"].pop("name", DEFAULT_METHOD)
        return cls(
            **values,
            task=task,
            method=method,
            method_options=_read_section("method", METHODS.get(method).Config, sections),
            prefix=_read_section("prefix", PrefixConfig, sections),
            train=_read_section("train", TrainConfig, sections),
            options=_read_section("task", TASKS.get(task).Config, sections),
        )


def _read_section(name: str, settings: type[JsonConfig], sections: dict[str, dict[str, Any]]) -> Any:
    """One table of the settings; what is wrong there is said with the table's name."""
    try:
        return settings.from_dict(sections[name])
    except ConfigError as error:
        raise ConfigError(f"[{name}] {error}") from error


def _plain_names() -> list[str]:
    """The settings that lie in no table."""
    return [f.name for f in fields(RunConfig) if f.name not in (*SECTIONS, "options", "method_options")]


def list_presets() -> dict[str, str]:
    """{"alpaca/llama-7b": its description, ...}."""
    return {name: read_preset(name).get("description", "") for name in _preset_names()}


def _preset_names() -> list[str]:
    found = []
    for folder in PRESETS.iterdir():
        if folder.is_dir():
            found += [
                f"{folder.name}/{f.name.removesuffix('.toml')}" for f in folder.iterdir() if f.name.endswith(".toml")
            ]
    return sorted(found)


def read_preset(name: str) -> dict[str, Any]:
    """A preset's values, its ``description`` included.

    Raises:
        ConfigError: if there is none of that name.
    """
    known = _preset_names()
    if name not in known:
        raise ConfigError(f"no preset named {name!r}.{did_you_mean(name, known)}")
    folder, _, file = name.partition("/")
    return _none(tomllib.loads((PRESETS / folder / f"{file}.toml").read_text(encoding="utf-8")))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A TOML file of settings.

    Raises:
        ConfigError: if it is missing or not TOML.
    """
    try:
        return _none(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not valid TOML: {error}.") from error


def resolve(
    *,
    backbone: str | None = None,
    task: str | None = None,
    model: str | None = None,
    data: str | None = None,
    preset: str | None = None,
    config_file: str | None = None,
    seed: int | None = None,
    options: Iterable[str] = (),
) -> tuple[RunConfig, str | None]:
    """The settings of a run: preset, then config file, then what was said on the command line.

    Without a model the embedded demo is trained, with the task's ``demo`` preset unless another is named.

    Args:
        backbone: see `RunConfig`; task, model, data and seed alike.
        task: default: the backbone's own.
        model: folder or Hub id.
        data: file, folder or Hub id.
        preset: ``alpaca/llama-7b``, or ``llama-7b`` for the task at hand.
        config_file: TOML.
        seed: for everything random.
        options: ``section.key=value``; the section may be left out where the key is unique.

    Returns:
        The settings, and the preset's full name.

    Raises:
        ConfigError: naming the setting that is unknown or wrong.
    """
    from_file = read_config_file(config_file) if config_file else {}
    if isinstance(from_file.get("method"), str):
        from_file["method"] = {"name": from_file["method"]}
    for name in SECTIONS:
        if not isinstance(from_file.get(name, {}), dict):
            raise ConfigError(f"{config_file}: {name} must be a table: [{name}].")
    preset = preset or from_file.pop("preset", None)
    known = {short for name in _preset_names() for short in (name, name.partition("/")[2])}
    if preset is not None and preset not in known and Path(preset).expanduser().is_file():
        raise ConfigError(
            f"--preset takes a name ('zinit ls presets'), and {preset!r} is a file. Pass a file of your own with "
            f"--config {preset}."
        )
    backbone = backbone or from_file.get("backbone")
    task = task or from_file.get("task", {}).get("name")
    if backbone is None and preset and "/" in preset:
        backbone = read_preset(preset).get("backbone")
    if backbone is None:
        raise ConfigError(f"say which backbone to train: --backbone {'|'.join(BACKBONES)}.")
    if preset is not None and "/" in preset:
        read_preset(preset)  # there is one of that name
    if task is None:
        task = preset.split("/")[0] if preset and "/" in preset else str(BACKBONES.get(backbone).default_task)
        if task not in TASKS:
            raise ConfigError(
                f"the backbone {backbone!r} has no task of its own to train yet. Attach a prefix in Python "
                f"(zinit.attach), register a task (zinit.register_task), or name one with --task: {', '.join(TASKS)}."
            )
    TASKS.where(task)
    model = model or from_file.get("model")
    data = data or from_file.get("data")
    options = list(options)
    method = _named_method(options) or from_file.get("method", {}).get("name", DEFAULT_METHOD)
    parsed = [_parse_option(option, task, method) for option in options]
    if preset is None and model is None and not any(option.get("model") for option in parsed):
        preset = f"{task}/demo"
        if preset not in _preset_names():
            raise ConfigError(f"the task {task!r} has no embedded demo: pass --model and --data.")
    if preset is not None and "/" not in preset:
        preset = f"{task}/{preset}"
    values: dict[str, Any] = {}
    if preset is not None:
        values = read_preset(preset)
        values.pop("description", None)
    _merge(values, from_file)
    said = {"backbone": backbone, "model": model, "data": data, "seed": seed, "task": {"name": task}}
    _merge(values, {name: value for name, value in said.items() if value is not None})
    for option in parsed:
        _merge(values, option)
    if values.get("model") is not None and values.get("data") is None:
        raise ConfigError("say what to train on: --data FILE_OR_HUB_ID (the embedded data is for the embedded model).")
    return RunConfig.from_dict(_with_absolute_paths(values)), preset


def absolute_path(source: Any) -> Any:
    """A local path in full (links kept), so that a run can be used from any folder; anything else as it is."""
    if isinstance(source, str) and source and Path(source).expanduser().exists():
        return str(Path(source).expanduser().absolute())
    if isinstance(source, str):
        name, colon, file = source.partition(
            ":"
        )  # a model's name with a file of weights, see `zinit.models.timm.load_timm`
        if colon and Path(file).suffix and Path(file).expanduser().is_file():
            return f"{name}:{Path(file).expanduser().absolute()}"
    return source


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    values |= {name: absolute_path(values[name]) for name in ("model", "data") if name in values}
    if "held_out_data" in values.get("task", {}):
        values["task"]["held_out_data"] = absolute_path(values["task"]["held_out_data"])
    if (
        isinstance(folder := values.get("train", {}).get("activation_cache"), str) and folder
    ):  # it need not be there yet
        values["train"]["activation_cache"] = str(Path(folder).expanduser().absolute())
    return values


def _named_method(options: Iterable[str]) -> str | None:
    """The method that ``-o method=NAME`` asks for."""
    named = [
        text for name, _, text in (option.partition("=") for option in options) if name in ("method", "method.name")
    ]
    return str(parse_value(named[-1])) if named else None


def _parse_option(option: str, task: str, method: str) -> dict[str, Any]:
    name, equals, text = option.partition("=")
    name = modern_setting(name)
    if not equals:
        raise ConfigError(f"an option is key=value, such as train.epochs=3; got {option!r}.")
    if name in ("method", "method.name"):
        return {"method": {"name": method}}
    keys = {
        "": _plain_names(),
        "method": [f.name for f in fields(METHODS.get(method).Config)],
        "prefix": [f.name for f in fields(PrefixConfig)],
        "train": [f.name for f in fields(TrainConfig)],
        "task": [f.name for f in fields(TASKS.get(task).Config)],
    }
    full = [f"{section}.{key}" if section else key for section, names in keys.items() for key in names]
    matching = [known for known in full if name == known] or [known for known in full if name == known.split(".")[-1]]
    if len(matching) != 1:
        known = full if "." in name else [option.split(".")[-1] for option in full]
        if name.startswith("method."):
            raise ConfigError(
                f"the method {method!r} has no option {name!r}. Choose the method that has it, as in -o method=lora -o "
                f"method.rank=4, or take one of: {', '.join(k for k in full if k.startswith('method.')) or 'none'}."
            )
        raise ConfigError(f"no option named {name!r}.{did_you_mean(name, matching or known)}")
    section, _, key = matching[0].rpartition(".")
    value = parse_value(text)
    if key == "fields" and isinstance(value, str):
        value = value.split(",")
    return {section: {key: value}} if section else {key: value}


def parse_value(text: str) -> Any:
    """A value as TOML would read it; what TOML cannot read is text, "none" is nothing."""
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    return _none(value)


def _none(value: Any) -> Any:
    """TOML has no null: the word "none" stands for it."""
    if isinstance(value, dict):
        return {key: _none(item) for key, item in value.items()}
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def override(
    config: RunConfig,
    *,
    model: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    options: Iterable[str] = (),
) -> RunConfig:
    """The settings of an earlier run with some said anew.

    Args:
        config: as saved.
        model: see `RunConfig`; data and seed alike.
        data: file, folder or Hub id.
        seed: for everything random.
        options: see `resolve`.
    """
    values = config.to_dict()
    said = {"model": model, "data": data, "seed": seed}
    _merge(values, {name: value for name, value in said.items() if value is not None})
    for option in options:
        _merge(values, _parse_option(option, config.task, config.method))
    return RunConfig.from_dict(_with_absolute_paths(values))
