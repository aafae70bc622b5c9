"""What a run computes: one settings object, made of plain settings and sections (tables in TOML and JSON)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from zinit.adapter.registries import SOURCES
from zinit.compat import modern_settings
from zinit.config import AdapterConfig, JsonConfig, PrefixConfig, TuningConfig, setting_names
from zinit.encoders.settings import EncoderConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.rates import rate_settings
from zinit.models.quantization import Quantize
from zinit.registry import Registry, did_you_mean
from zinit.tasks import TASKS
from zinit.train.config import TrainConfig
from zinit.validation import Seed, in_section, shown

DEFAULT_METHOD = "zero-init"
CONTEXT = "context"  # the table of the context source: its name, and options that are its own
PARTS = "parts"  # the table of tables, one for each part of an adapter; its settings are those of the section "prefix"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of a run's settings.

    Args:
        attribute: of `RunConfig`, that holds its settings.
        settings: their class; or the registry of entries that have one each (``Config``): the table's key ``name``
            chooses the entry.
        default: the entry where the table names none; None requires a name.
        optional: whether there may be no table, and the attribute is None then: ``-o tuning=none``.
    """

    attribute: str
    settings: type[JsonConfig] | Registry
    default: str | None = None
    optional: bool = False

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
    "tuning": Section(attribute="tuning", settings=TuningConfig, optional=True),
    "encoder": Section(attribute="encoder", settings=EncoderConfig),
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
        warm_start: folder or Hub id of an adapter, or of a finished run, whose weights training starts from; None
            starts afresh.
        dtype: of the frozen model; "auto" is bfloat16 on a GPU, float32 on a CPU.
        quantize: hold the frozen model's matrices in 8 or 4 bits ("bnb-8bit", "bnb-4bit", "torchao-int8"); None does
            not. See `zinit.models.quantization`.
        offload: keep the frozen model's blocks in CPU memory; each layer comes to the GPU while it runs.
        method: registered name of how the model is adapted.
        method_options: the method's own settings; None is its defaults.
        prefix: the prefix, for the methods that have one.
        parts: several prefixes in one adapter, by name, instead of the one in ``prefix``; what a part leaves out
            is as in ``prefix``.
        context: registered name of the module that makes a context of images; None has none.
        context_options: its settings.
        tuning: what the adapter changes in the model's own linear layers and norms; None changes nothing.
        encoder: what makes features of images for the context source.
        train: the loop.
        options: the task's own settings; None is its defaults.
    """

    backbone: str
    task: str
    model: str | None = None
    revision: str | None = None
    data: str | Annotated[tuple[str, ...], MinLen(1)] | None = None
    seed: Seed = 0
    warm_start: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    offload: bool = False
    method: str = DEFAULT_METHOD
    method_options: Any = None
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    parts: dict[str, PrefixConfig] = field(default_factory=dict)
    context: str | None = None
    context_options: dict[str, Any] = field(default_factory=dict)
    tuning: TuningConfig | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    options: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, section in SECTIONS.items():
            if getattr(self, section.attribute) is None and not section.optional:
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
        adapter = self.adapter()
        asked = {f"[{PARTS}]": self.parts, f"[{CONTEXT}]": self.context, "[tuning]": self.tuning is not None}
        named = [table for table, asked_for in asked.items() if asked_for]
        if named and not METHODS.fact(self.method, "takes_parts"):
            raise ConfigError(
                f"the method {self.method!r} attaches no adapter, which {' and '.join(named)} belong to. Leave them "
                f"out, or take -o method=zero-init."
            )
        if adapter.context is None and self.encoder.source is not None:
            raise ConfigError(
                f"nothing takes the features of the encoder {self.encoder.source}: the method {self.method!r} has no "
                f"context source. Take one that has (--method v1-multimodal), or name one: -o context=projected-image."
            )

    def adapter(self) -> AdapterConfig:
        """The adapter's settings: of the one prefix or of the parts, with context and tuning.

        Raises:
            ConfigError: if they do not go together.
        """
        return AdapterConfig(
            parts=self.parts or AdapterConfig.of(self.prefix).parts,
            context=self.context,
            context_options=self.context_options,
            tuning=self.tuning,
        )

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
        """Nested plain values: scalars, then the tables; those that an adapter without images lacks are left out."""
        values = {name: getattr(self, name) for name in plain_settings()}
        if self.warm_start is None:
            del values["warm_start"]
        defaults = METHODS.fact(self.method, "defaults")
        for name, section in SECTIONS.items():
            if getattr(self, section.attribute) is None:
                values |= {name: None} if name in defaults else {}
                continue
            chosen = {"name": getattr(self, name)} if section.chooses else {}
            values[name] = {**chosen, **getattr(self, section.attribute).to_dict()}
        if self.encoder == EncoderConfig():
            del values["encoder"]
        if self.context is not None or CONTEXT in defaults:
            values[CONTEXT] = {"name": self.context, **self.context_options}
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
            if name not in (names := (*known, *SECTIONS, CONTEXT, PARTS)):
                raise ConfigError(f"there is no setting {name!r}.{did_you_mean(str(name), names)}")
        if "backbone" not in values:
            raise ConfigError("a run needs a backbone: --backbone NAME, or backbone = ... in the config file.")
        arguments = {name: values[name] for name in known if name in values}
        values = _with_method_defaults(values)
        for name, table in _with_default_rates(read_tables(values)).items():
            arguments |= _read_section(name, table)
        return cls(**arguments, **_read_context(values), parts=read_parts(values))


def _with_method_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values over those that the method begins with. Another context source leaves that one's options behind."""
    method = read_tables(values)["method"].get("name", DEFAULT_METHOD)
    values = {**values, CONTEXT: _context_table(values)} if CONTEXT in values else values
    merged: dict[str, Any] = copy.deepcopy(dict(METHODS.fact(method, "defaults")))
    if CONTEXT in merged and values.get(CONTEXT, {}).get("name", merged[CONTEXT]["name"]) != merged[CONTEXT]["name"]:
        del merged[CONTEXT]
    return merge(merged, copy.deepcopy(values))


def _context_table(values: dict[str, Any]) -> dict[str, Any]:
    """The table ``[context]``; ``context = "visual-tokens"`` is short for a table."""
    table = values[CONTEXT]
    table = {"name": table} if isinstance(table, str | None) else table
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str | None):
        raise ConfigError(f"{CONTEXT} must be a table with a name: [{CONTEXT}]; got {shown(table)}.")
    return table


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


def _read_context(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RunConfig` that the table ``[context]`` fills."""
    options = dict(values.get(CONTEXT, {}))
    name = options.pop("name", None)
    if name is not None:
        SOURCES.where(name)
    elif options:
        raise ConfigError(f"[{CONTEXT}] has settings ({', '.join(options)}) and no name. Known: {', '.join(SOURCES)}.")
    return {"context": name, "context_options": options}


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
    of_sections = {CONTEXT, "context_options", PARTS, *SECTIONS, *(section.attribute for section in SECTIONS.values())}
    return [name for name in setting_names(RunConfig) if name not in of_sections]


def read_tables(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The section tables among nested values, copied. ``method = "lora"`` is short for a table.

    An absent one is empty; if it is optional it is left out.

    Raises:
        ConfigError: if a section is no table, or the name in it no text.
    """
    tables = {}
    for name, section in SECTIONS.items():
        table = values.get(name, None if section.optional else {})
        if section.optional and table is None:
            continue
        if name == "method" and isinstance(table, str):
            table = {"name": table}
        if not isinstance(table, dict):
            raise ConfigError(f"{name} must be a table: [{name}]; got {shown(table)}.")
        if section.chooses and not isinstance(table.get("name", ""), str):
            raise ConfigError(f"[{name}] name must be text; got {shown(table['name'])}.")
        tables[name] = dict(table)
    return tables


def merge(into: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``into`` with the values over its own, table by table; changed in place."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value
    return into
