"""What a run computes: one settings object, made of plain settings and sections (tables in TOML and JSON)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from zinit.compat import modern_settings
from zinit.config import AdapterConfig, JsonConfig, PrefixConfig, setting_names
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.rates import rate_settings
from zinit.models.quantization import Quantize
from zinit.registry import Registry, did_you_mean
from zinit.tasks import TASKS
from zinit.train.config import TrainConfig
from zinit.validation import Seed, in_section, shown

DEFAULT_METHOD = "zero-init"
PARTS = "parts"  # the table of tables, one for each part of an adapter; its settings are those of the section "prefix"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of a run's settings.

    Args:
        attribute: of `RunConfig`, that holds its settings.
        settings: their class; or the registry of entries that have one each (``Config``): the table's key ``name``
            chooses the entry.
        default: the entry where the table names none; None requires a name.
    """

    attribute: str
    settings: type[JsonConfig] | Registry
    default: str | None = None

    @property
    def chooses(self) -> bool:
        """Whether the table has a key ``name`` that chooses an entry of a registry."""
        return isinstance(self.settings, Registry)

    def settings_class(self, entry: str) -> type[JsonConfig]:
        """The class of its settings.

        Args:
            entry: the chosen one's name; of no use to a section that does not choose.

        Raises:
            ConfigError: if there is no such entry.
        """
        return self.settings.fact(entry, "Config") if isinstance(self.settings, Registry) else self.settings


# A further section is one line here, and the field of RunConfig that it names. The order is that of files.
SECTIONS = {
    "method": Section(attribute="method_options", settings=METHODS, default=DEFAULT_METHOD),
    "prefix": Section(attribute="prefix", settings=PrefixConfig),
    "train": Section(attribute="train", settings=TrainConfig),
    "task": Section(attribute="options", settings=TASKS),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(JsonConfig):
    """Everything that decides what a run computes.

    Args:
        backbone: registered name.
        task: registered name.
        model: folder or Hub id; None is the backbone's embedded demo.
        revision: of the model on the Hub.
        data: file, folder or Hub id, or a list of several for tasks that read several; None is the task's embedded
            demo data.
        seed: of the prompts' start, the split and the order of the examples.
        dtype: of the frozen model; "auto" is bfloat16 on a GPU, float32 on a CPU.
        quantize: hold the frozen model's matrices in 8 or 4 bits ("bnb-8bit", "bnb-4bit", "torchao-int8"); None does
            not. See `zinit.models.quantization`.
        offload: keep the frozen model's blocks in CPU memory; each layer comes to the GPU while it runs.
        method: registered name of how the model is adapted.
        method_options: the method's own settings; None is its defaults.
        prefix: the prefix, for the methods that have one.
        parts: several prefixes in one adapter, by name, instead of the one in ``prefix``; what a part leaves out
            is as in ``prefix``.
        train: the loop.
        options: the task's own settings; None is its defaults.
    """

    backbone: str
    task: str
    model: str | None = None
    revision: str | None = None
    data: str | Annotated[tuple[str, ...], MinLen(1)] | None = None
    seed: Seed = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    offload: bool = False
    method: str = DEFAULT_METHOD
    method_options: Any = None
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    parts: dict[str, PrefixConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    options: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, section in SECTIONS.items():
            if getattr(self, section.attribute) is None:
                chosen = section.settings_class(getattr(self, name))
                object.__setattr__(self, section.attribute, chosen.from_dict({}))
        self._check_parts()
        if isinstance(self.data, tuple):
            if len(self.data) > 1 and not TASKS.get(self.task).reads_several:
                raise ConfigError(
                    f"the task {self.task!r} reads one source of data; got {len(self.data)}: {', '.join(self.data)}. "
                    f"Put them into one folder, and name that."
                )
            object.__setattr__(self, "data", self.data if len(self.data) > 1 else "".join(self.data))
        self._check_memory()

    def _check_parts(self) -> None:
        if self.parts and not METHODS.fact(self.method, "takes_parts"):
            raise ConfigError(
                f"the method {self.method!r} takes no parts, and [parts] names {', '.join(self.parts)}. Leave them "
                f"out, or take -o method=zero-init."
            )
        if self.parts:
            AdapterConfig(parts=self.parts)  # what concerns several parts

    def _check_memory(self) -> None:
        """Quantised and offloaded models are frozen, and offloading excludes what needs the weights in place."""
        if (self.quantize is not None or self.offload) and METHODS.fact(self.method, "trains_host"):
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
        values = {name: getattr(self, name) for name in plain_settings()}
        for name, section in SECTIONS.items():
            chosen = {"name": getattr(self, name)} if section.chooses else {}
            values[name] = {**chosen, **getattr(self, section.attribute).to_dict()}
        if self.parts:
            values[PARTS] = {name: part.to_dict() for name, part in self.parts.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """From nested plain values, as `to_dict` makes them and TOML files hold them; old names are understood.

        Raises:
            ConfigError: naming the setting that is unknown or wrong.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a run is built from named settings; got {shown(values)}.")
        values = modern_settings(values)
        known = plain_settings()
        for name in values:
            if name not in (*known, *SECTIONS, PARTS):
                raise ConfigError(f"there is no setting {name!r}.{did_you_mean(str(name), [*known, *SECTIONS, PARTS])}")
        if "backbone" not in values:
            raise ConfigError("a run needs a backbone: --backbone NAME, or backbone = ... in the config file.")
        arguments = {name: values[name] for name in known if name in values}
        tables = read_tables(values)
        for name, table in _with_default_rates(tables).items():
            arguments |= _read_section(name, table)
        return cls(**arguments, parts=read_parts(values))


def _with_default_rates(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tables, with the method's own learning rates where none is said."""
    if "learning_rate" in tables["train"]:
        return tables
    own = rate_settings(METHODS.fact(tables["method"].get("name", DEFAULT_METHOD), "default_rates"))
    return {**tables, "train": {**own, **tables["train"]}}


def _read_section(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RunConfig` that a table fills. Errors in it carry the section's name."""
    section = SECTIONS[name]
    entry = table.pop("name", section.default) if section.chooses else name
    if entry is None:
        raise ConfigError(f"a run needs a {name}: --{name} NAME, or name = ... in the table [{name}].")
    settings_class = section.settings_class(entry)
    try:
        settings = settings_class.from_dict(table)
    except ConfigError as error:
        raise in_section(name, error) from error
    return {section.attribute: settings, **({name: entry} if section.chooses else {})}


def read_parts(values: dict[str, Any]) -> dict[str, PrefixConfig]:
    """The prefixes in the tables ``[parts.NAME]``; what they leave out is as in the table ``[prefix]``.

    Raises:
        ConfigError: naming the part and the setting that is wrong.
    """
    parts, common = values.get(PARTS, {}), values.get("prefix", {})
    if not isinstance(parts, dict) or not all(isinstance(table, dict) for table in parts.values()):
        raise ConfigError(f"parts must be tables, one for each part: [parts.NAME]; got {shown(parts)}.")
    found = {}
    for name, table in parts.items():
        try:
            found[name] = PrefixConfig.from_dict({**common, **table})
        except ConfigError as error:
            raise in_section(f"{PARTS}.{name}", error) from error
    return found


def plain_settings() -> list[str]:
    """The settings that are in no table."""
    of_sections = {PARTS, *SECTIONS, *(section.attribute for section in SECTIONS.values())}
    return [name for name in setting_names(RunConfig) if name not in of_sections]


def read_tables(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The section tables among nested values, copied; an absent one is empty. ``method = "lora"`` is short for a table.

    Raises:
        ConfigError: if a section is no table, or the name in it no text.
    """
    tables = {}
    for name, section in SECTIONS.items():
        table = values.get(name, {})
        if name == "method" and isinstance(table, str):
            table = {"name": table}
        if not isinstance(table, dict):
            raise ConfigError(f"{name} must be a table: [{name}]; got {shown(table)}.")
        if section.chooses and not isinstance(table.get("name", ""), str):
            raise ConfigError(f"[{name}] name must be text; got {shown(table['name'])}.")
        tables[name] = dict(table)
    return tables
