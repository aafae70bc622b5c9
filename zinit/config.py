"""Frozen settings: they name themselves in errors and round-trip through JSON and TOML."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from annotated_types import MinLen
from pydantic_core import core_schema

from zinit.errors import ConfigError
from zinit.registry import did_you_mean
from zinit.validation import (
    CommaSeparated,
    CommaSeparatedNumbers,
    Name,
    Names,
    NoneIsAWord,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveInt,
    SettingType,
    Size,
    SizeOrZero,
    Words,
    largest_number,
    nested_error,
    shown,
)

_CONTROL = re.compile(r"[\x7f-\x9f]")


def to_json(document: Any, *, indent: int | None = None) -> str:
    """Strict JSON: numbers that are none (a diverged loss) become null, which every reader understands.

    No control character is in it, as a terminal would obey it; JSON itself escapes those below the space only.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(document), indent=indent, ensure_ascii=False, allow_nan=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@dataclass(frozen=True)
class SettingDescription:
    """One setting, as lists and documents show it.

    Attributes:
        name: of the field; of one in a nested table with that in front, "rates.gates".
        type: in words, "a whole number of at least 1".
        default: its value; None where it has none.
        required: whether there is no default.
        largest: the largest size of its numbers that is taken; None where there is no such limit.
        description: what the docstring of its class says; empty where that says nothing.
    """

    name: str
    type: str
    default: Any
    required: bool
    largest: int | None
    description: str


class JsonConfig:
    """What every settings class shares: values checked against the types of the fields, plain dictionaries and back.

    A subclass is a ``@dataclass(frozen=True, kw_only=True)``. Its fields' types are all the checks that most need
    (`zinit.validation`); what concerns several fields goes into a ``__post_init__`` that calls this one first.
    """

    called: ClassVar[str] = ""
    """How messages call the whole; empty is the class's name."""

    def __post_init__(self) -> None:
        """Raises: ConfigError, naming the first setting that has a wrong value."""
        for name, of in _setting_types(type(self)).items():
            object.__setattr__(self, name, of.check(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the settings from plain values (JSON, TOML).

        Raises:
            ConfigError: on an unknown name (with the nearest known one), a missing one, or a wrong value.
        """
        called = cls.called or cls.__name__
        if not isinstance(values, dict):
            raise ConfigError(f"{called} is built from named settings; got {shown(values)}.")
        known = _setting_types(cls)
        for name in values:
            if name not in known:
                raise ConfigError(f"{called} has no setting {name!r}.{did_you_mean(str(name), known)}")
        missing = [field.name for field in _fields(cls) if field.name not in values and _is_required(field)]
        if missing:
            raise ConfigError(f"{called} needs {', '.join(missing)}.")
        # Checked here too: a class of somebody else's may have a __post_init__ that does not call this one's.
        return cls(**{name: known[name].check(name, value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: _plain(getattr(self, name)) for name in setting_names(type(self))}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """As the type of another class's setting: a table, which may hold an instance already."""

        def read(value: Any) -> Self:
            if isinstance(value, cls):
                return value
            if not isinstance(value, dict):
                raise ValueError("no table")
            try:
                return cls.from_dict(value)
            except ConfigError as error:
                raise nested_error(error) from error

        return core_schema.no_info_plain_validator_function(read)


def setting_names(settings: type[JsonConfig]) -> list[str]:
    """The names of a class's settings, in their order."""
    return [field.name for field in _fields(settings)]


def setting_paths(settings: type[JsonConfig]) -> list[str]:
    """As `setting_names`, those of nested tables in their place: ["steps", "rates.gates"]."""
    paths = []
    for name, of in _setting_types(settings).items():
        nested = _nested_settings(of.hint)
        paths += [name] if nested is None else [f"{name}.{path}" for path in setting_paths(nested)]
    return paths


def _nested_settings(hint: Any) -> type[JsonConfig] | None:
    """The settings class in a type: itself, or beside None in a union."""
    if isinstance(hint, type) and issubclass(hint, JsonConfig):
        return hint
    if get_origin(hint) in (Annotated, Union, UnionType):
        return next((found for part in get_args(hint) if (found := _nested_settings(part))), None)
    return None


def describe_settings(settings: type[JsonConfig]) -> list[SettingDescription]:
    """Name, type, default, limit and description of each setting of a class; those of nested tables in their place."""
    types, documented = _setting_types(settings), documented_arguments(settings)
    found: list[SettingDescription] = []
    for field in _fields(settings):
        of = types[field.name]
        if nested := _nested_settings(of.hint):
            inside = describe_settings(nested)
            found += [dataclasses.replace(one, name=f"{field.name}.{one.name}") for one in inside]
            continue
        found.append(
            SettingDescription(
                name=field.name,
                type=of.words,
                default=_plain(_default(field)),
                required=_is_required(field),
                largest=largest_number(of.hint),
                description=documented.get(field.name, ""),
            )
        )
    return found


@cache
def _setting_types(settings: type[JsonConfig]) -> dict[str, SettingType]:
    """The type of each setting, by name."""
    try:
        hints = get_type_hints(settings, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"the types of the settings {settings.__name__} cannot be read: {error}. Import what they name outside of "
            f"'if TYPE_CHECKING', at the top of their module."
        ) from error
    return {name: SettingType.of(hints[name]) for name in setting_names(settings)}


def _fields(settings: type[JsonConfig]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(settings)  # pyright: ignore[reportArgumentType]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """A value of a setting as JSON has it."""
    if isinstance(value, JsonConfig):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def documented_arguments(settings: type) -> dict[str, str]:
    """The descriptions under "Args:" in the docstrings of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        _, _, text = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        arguments = re.split(r"\n\S", text)[0]
        for name, description in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE):
            found[name] = " ".join(description.split())
    return found


Layers = Annotated[
    PositiveInt | Annotated[tuple[NonNegativeInt, ...], MinLen(1)] | None,
    CommaSeparatedNumbers,
    Words("a count of topmost layers (at least 1), a list of 0-based layers such as [2, 3, 4], or none for all"),
]
Towers = Annotated[
    Annotated[tuple[Name, ...], MinLen(1)] | None,
    CommaSeparated,
    Words("a list of names such as ['vision_model'], or none for all"),
]


LEARNED = {"key_value": "keys and values", "matrix": "matrices"}  # in the place of prompts, in messages


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(JsonConfig):
    """How a prefix is built and where it goes. The paper's ablations are settings here, not other classes.

    Args:
        length: K, prompts per adapted layer. Paper (Alpaca): 10.
        layers: L, how many of the topmost layers; ``None`` is all of them; a tuple names absolute 0-based layers.
            Paper (LLaMA-7B): 30 of 32. In a model of several towers (CLIP's text and vision model, an encoder and a
            decoder) each tower counts its own layers.
        towers: which towers get a prefix, each named by its path in the model or a part of it (``"vision_model"``);
            ``None`` is all of them.
        gate: how a stored gate is squashed: ``"tanh"`` (ICLR version, Eq. 7, and the reference's training code) or
            ``"identity"`` (first arXiv versions, the reference's inference code, PEFT, LitGPT); or ``"query"``, a gate
            for each query, tanh of its product with a learned vector (arXiv 2502.03029, there before the rotation).
        gate_per: one gate per ``"head"`` (all versions of the paper, "in practice") or one per ``"layer"``.
        gate_init: where every gate starts. 0 is zero-init attention; ``"random"`` draws from N(0, 1), the paper's
            ablation of it.
        gating: ``False`` leaves the gate out: the prompts' attention is added with weight one, or takes its share of
            one softmax.
        separate_softmax: ``False`` lets prompts and words share one softmax: plain prefix tuning with ``gating=False``,
            or a gate that leads from the host's attention to it.
        parametrization: what is learned: ``"prompt"``, K vectors of the model's width that pass the host's frozen key
            and value projections (LLaMA-Adapter), ``"key_value"``, the keys and values themselves (P-tuning v2), or
            ``"matrix"``, one for each head that the query is multiplied by, without prompts and a softmax
            (Prefix-Tuning+, arXiv 2506.13674).
        init_std: prompts (or keys and values, or matrices) start from N(0, init_std^2). The reference uses 1.
        prompt: where the prompts come from: a learned ``"table"``, the ``"context"`` that comes with a call and nothing
            else, or the sum of both, ``"table+context"`` (Eq. 10).
        prompts: what is learned for a table: the ``"table"`` itself, or a small network that makes the tables of all
            layers, of one embedding for each layer, ``"hyper"``, or for each prompt, ``"deepshare"`` (arXiv
            2502.03029). All parts of an adapter that say so share one network.
    """

    length: Annotated[Size, Words("a whole number of at least 1 (prompts per layer)")] = 10
    layers: Layers = None
    towers: Towers = None
    gate: Literal["tanh", "identity", "query"] = "tanh"
    gate_per: Literal["head", "layer"] = "head"
    gate_init: Annotated[Number | Literal["random"], Words("a number or 'random'")] = 0.0
    gating: bool = True
    separate_softmax: bool = True
    parametrization: Literal["prompt", "key_value", "matrix"] = "prompt"
    init_std: NonNegativeFloat = 1.0
    prompt: Literal["table", "context", "table+context"] = "table"
    prompts: Literal["table", "hyper", "deepshare"] = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_prompts()
        if isinstance(self.layers, tuple) and list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers must be ascending without repeats; got {self.layers!r}.")

    def _check_prompts(self) -> None:
        if self.parametrization != "prompt" and (self.prompt != "table" or self.prompts != "table"):
            raise ConfigError(
                f"learned {LEARNED[self.parametrization]} have no prompts: leave out prompt={self.prompt!r} and "
                f"prompts={self.prompts!r}, or use parametrization='prompt'."
            )
        if self.parametrization == "matrix" and (self.length != PrefixConfig.length or not self.separate_softmax):
            raise ConfigError(
                f"parametrization='matrix' has neither prompts nor a softmax: leave out length={self.length} and "
                f"separate_softmax={self.separate_softmax}."
            )
        if self.prompt == "context" and not self.separate_softmax:
            raise ConfigError(
                "prompt='context' in one softmax with the words (separate_softmax=False) would change samples that "
                "have no context: leave separate_softmax at True, or use prompt='table+context'."
            )
        if self.prompt == "context" and self.prompts != "table":
            raise ConfigError(f"prompt='context' learns no prompts, so prompts={self.prompts!r} has nothing to make.")


ONLY = "prefix"  # the name of an adapter's part where there is one
LinearNames = Annotated[Names, MinLen(1), Words("a list of names such as ['all'] or ['q_proj', 'v_proj']")]


@dataclass(frozen=True, kw_only=True)
class TuningConfig(JsonConfig):
    """Bias tuning (LLaMA-Adapter V2, section 3.1): what an adapter changes in the host's linear layers and norms.

    ``y = s * (W x + b)`` for each linear layer of the blocks, with s = 1 and b = 0 at the start, and norms with weights
    of their own, so that the start is the host bit for bit. Prompts pass the tuned projections, but never their LoRA.

    Args:
        linears: which linear layers: ``"all"`` of the blocks, names of layers such as ``"q_proj"``, ``"head"``.
        bias: learn b.
        scale: where s multiplies: the ``"output"``, b included (the paper), the ``"input"`` (the 65B chat code), or
            ``"none"``.
        norms: learn the norms' weights; ``"blocks"`` leaves out those that stand beside the blocks.
        lora_rank: r of a low-rank addition ``l2 (l1 x)`` to a layer's output, without a factor of its own. A scale on
            the input acts on its x too; one on the output does not reach it. 0 adds none.
        lora_linears: which layers get it; None is ``linears``.
        prompts_through: prompts pass projections with ``"bias-scale"`` or those of the ``"base"``.
    """

    called: ClassVar[str] = "tuning"

    linears: LinearNames = ("all",)
    bias: bool = True
    scale: Annotated[Literal["output", "input", "none"], NoneIsAWord] = "output"
    norms: Annotated[bool | Literal["blocks"], Words("true, false or 'blocks'")] = True
    lora_rank: SizeOrZero = 0
    lora_linears: LinearNames | None = None
    prompts_through: Literal["bias-scale", "base"] = "bias-scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.bias or self.scale != "none" or self.norms or self.lora_rank):
            raise ConfigError("a tuning without bias, scale, norms and LoRA tunes nothing: leave it out.")


@dataclass(frozen=True, kw_only=True)
class ExcitorConfig(JsonConfig):
    """LLaMA-Excitor (arXiv 2404.00913): gated additions to the keys of words, see `zinit.adapter.excitor`.

    Args:
        length: K, prompts per layer. 30 gives the paper's 7.6M numbers at 7B.
        rank: of the bottleneck. Paper: 16.
        layers: as those of `PrefixConfig`. Paper: the topmost 30.
        towers: as those of `PrefixConfig`.
    """

    called: ClassVar[str] = "excitor"

    length: Size = 30
    rank: Size = 16
    layers: Layers = None
    towers: Towers = None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(JsonConfig):
    """An adapter of several parts: prefixes of their own length, layers and gates, under one handle.

    Args:
        parts: {name: prefix}, in the order of their parameters; their additions to a layer's attention sum. May be
            empty where there is a tuning.
        context: registered name of the module that makes the context of all parts that take one; None has none, and a
            context is then given ready made.
        context_options: its settings.
        tuning: what the adapter changes in the host's own modules besides; None changes nothing.
        excitor: additions to the keys of words, in the place of a tuning; None adds nothing.
    """

    parts: dict[str, PrefixConfig]
    context: str | None = None
    context_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuning: TuningConfig | None = None
    excitor: ExcitorConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts and self.tuning is None and self.excitor is None:
            raise ConfigError("an adapter needs at least one part, or a tuning.")
        if self.tuning is not None and self.excitor is not None:
            raise ConfigError("an adapter has a tuning or an excitor, not both: attach the other as a second adapter.")
        for name, part in self.parts.items():
            if not name.isidentifier() or "__" in name:
                raise ConfigError(f"a part's name must be an identifier such as 'early'; got {name!r}.")
            if len(self.parts) > 1 and not part.separate_softmax:
                raise ConfigError(
                    f"the part {name!r} shares the words' softmax (separate_softmax=False), which stands alone: leave "
                    f"the other parts out."
                )

    @classmethod
    def of(cls, config: PrefixConfig | AdapterConfig) -> AdapterConfig:
        """A single prefix as an adapter of one part."""
        return AdapterConfig(parts={ONLY: config}) if isinstance(config, PrefixConfig) else config

    def simplest(self) -> PrefixConfig | AdapterConfig:
        """The single prefix where that is all there is; the inverse of `of`."""
        return self.parts[ONLY] if list(self.parts) == [ONLY] and self == AdapterConfig(parts=self.parts) else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without an excitor as zinit wrote them before there was one."""
        return {name: value for name, value in super().to_dict().items() if name != "excitor" or value is not None}


GATES, WEIGHTS, HEAD = "gates", "weights", "head"  # roles that are told apart by more than their rates
ROLES = (GATES, "prompts", "source", "tuning", WEIGHTS, HEAD)  # of what trains
