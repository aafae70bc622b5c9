"""What a setting may be: a type that pydantic checks, and that messages say in words.

A settings class writes ``length: PositiveInt = 10``. A wrong value is refused with one sentence made from that type:
``length must be a whole number of at least 1; got 0.`` Nothing is converted from one type to another, but for lists,
which become tuples, and what a `BeforeValidator` of the field allows for (`Names`).
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from reprlib import Repr
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from zinit.errors import ConfigError

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_BOUNDS = {Ge: ("ge", "of at least"), Gt: ("gt", "above"), Le: ("le", "of at most"), Lt: ("lt", "below")}
_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "none",
    Any: "anything",
    dict: "a table",
}
_PLURALS = {"anything": "values", "text": "texts"}  # of words without an article


@dataclass(frozen=True)
class Words:
    """A note in ``Annotated``: how messages say the type, where the words made from it would not do.

    Args:
        text: what follows "must be".
    """

    text: str


@dataclass(frozen=True)
class Limit:
    """A note in ``Annotated``: a number's largest size, of which messages speak only where it is passed.

    Args:
        most: of the number without its sign.
    """

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Looked at before anything is computed with the number, which may be too large for that."""
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value == value and abs(value) > self.most and abs(value) != math.inf:
            raise PydanticCustomError("zinit_limit", "too large", {"most": self.most})
        return value


def split_at_commas(value: Any) -> Any:
    """``"a, b"``, as a command line has it, is ``("a", "b")``; anything but text stays as it is."""
    return tuple(part for part in map(str.strip, value.split(",")) if part) if isinstance(value, str) else value


def split_numbers_at_commas(value: Any) -> Any:
    """As `split_at_commas` for whole numbers: ``"2,3"`` is ``(2, 3)``."""
    parts = split_at_commas(value)
    numbers = isinstance(value, str) and parts and all(re.fullmatch("[0-9]{1,9}", part) for part in parts)
    return tuple(map(int, parts)) if numbers else value


# Limits that nothing sensible comes near: beyond them is a slip of the keyboard, which could ask for all memory.
MOST = 10**9  # of what is counted, and of any number
WIDEST = 2**16  # of what a tensor is made for: prompts, ranks, pixels of a side
PROCESSES = 1024

PositiveInt = Annotated[int, Ge(1), Limit(MOST)]
NonNegativeInt = Annotated[int, Ge(0), Limit(MOST)]
Size = Annotated[int, Ge(1), Limit(WIDEST)]
SizeOrZero = Annotated[int, Ge(0), Limit(WIDEST)]
Workers = Annotated[int, Ge(0), Limit(PROCESSES)]
Tokens = Annotated[int, Ge(8), Limit(MOST)]  # room for an example
Whole = Annotated[int, Limit(MOST)]
Number = Annotated[float, Limit(MOST)]
PositiveFloat = Annotated[float, Gt(0), Limit(MOST)]
NonNegativeFloat = Annotated[float, Ge(0), Limit(MOST)]
Rate = Annotated[float, Ge(0), Lt(1), Words("a rate in [0, 1)")]
Seed = Annotated[int, Ge(0), Lt(2**63), Words("a whole number of at least 0 (and below 2**63)")]
Name = Annotated[str, MinLen(1), Words("a name")]
OnBad = Literal["error", "skip"]  # what to do with a record or file that cannot be used; what is skipped is counted
Folder = Annotated[str, MinLen(1), Words("a folder")]
CommaSeparated = BeforeValidator(split_at_commas)
CommaSeparatedNumbers = BeforeValidator(split_numbers_at_commas)
NoneIsAWord = BeforeValidator(lambda value: "none" if value is None else value)  # TOML and options have no null
Names = Annotated[tuple[Name, ...], CommaSeparated]


@dataclass(frozen=True)
class SettingType:
    """The type of one setting.

    Args:
        hint: as annotated, the notes of ``Annotated`` included.
    """

    hint: Any
    adapter: TypeAdapter[Any]

    @classmethod
    def of(cls, hint: Any) -> SettingType:
        """Args: see the class."""
        return cls(hint, TypeAdapter(hint, config=None if is_dataclass(hint) else _STRICT))

    @property
    def words(self) -> str:
        """What follows "must be" in a message."""
        return describe_type(self.hint)

    def check(self, name: str, value: Any) -> Any:
        """The value, lists turned into tuples where the type allows; an int stays one where a number is expected.

        Args:
            name: the setting's, for the message.
            value: as the user gave it.

        Raises:
            ConfigError: if it is of another type or out of bounds, in one line.
        """
        try:
            checked = self._validate(value)
        except ValidationError as error:
            raise _as_config_error(error, name, self, value) from None
        return value if type(value) is int and checked == value else checked

    def accepts(self, value: Any) -> bool:
        """Whether a value is of this type."""
        try:
            self._validate(value)
        except ValidationError:
            return False
        return True

    def _validate(self, value: Any) -> Any:
        frozen = _with_tuples(value)
        try:
            return self.adapter.validate_python(frozen)
        except ValidationError:
            if frozen is value:
                raise
            return self.adapter.validate_python(value)  # types that say list


_type_of = cache(SettingType.of)


def check_fields(document: Any, types: Mapping[str, Any], *, optional: Collection[str] = ()) -> None:
    """A document that a file holds has the fields that are read of it. Others pass: another version may know them.

    Args:
        document: as JSON gave it.
        types: {field: its type}, as annotations have it.
        optional: those of the fields that may be missing.

    Raises:
        ConfigError: naming the first field that is missing or of another type.
    """
    if not isinstance(document, dict):
        raise ConfigError(f"it must hold named values; got {shown(document)}.")
    for name, hint in types.items():
        if name in document:
            _type_of(hint).check(name, document[name])
        elif name not in optional:
            raise ConfigError(f"it has no {name}.")


def in_section(name: str, error: ConfigError) -> ConfigError:
    """The same error with the name of the section: "[train] steps must ...", "[train.rates] gates must ..."."""
    text = str(error)
    return ConfigError(f"[{name}.{text[1:]}" if text.startswith("[") else f"[{name}] {text}")


def nested_error(error: ConfigError) -> PydanticCustomError:
    """An error in a table inside a setting, in the form in which it passes through pydantic."""
    return PydanticCustomError("zinit_settings", "{message}", {"message": str(error)})


def _as_config_error(error: ValidationError, name: str, of: SettingType, value: Any) -> ConfigError:
    for found in error.errors(include_url=False):
        if found["type"] == "zinit_settings":
            path = ".".join([name, *map(str, found["loc"])])
            return in_section(path, ConfigError(found["msg"]))
    words = of.words
    if isinstance(value, float) and not math.isfinite(value):
        words = words.replace("a number", "a finite number")
    hint = ""
    if limits := [found.get("ctx", {})["most"] for found in error.errors() if found["type"] == "zinit_limit"]:
        hint = f" The largest that is taken is {max(limits):,}."
    elif not isinstance(value, list | tuple | dict) and of.accepts([value]):
        hint = f" For one, write a list: [{shown(value)}]."
    return ConfigError(f"{name} must be {words}; got {shown(value)}.{hint}")


def _with_tuples(value: Any) -> Any:
    """A list as a tuple, the lists in it too. Anything else is returned itself."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


class _Short(Repr):
    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of more than 4,300 digits
            return f"a whole number of {x.bit_length():,} bits"


_short = _Short()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40


def shown(value: Any) -> str:
    """A value in a message: on one line, and short."""
    return " ".join(_short.repr(value).split())


def largest_number(hint: Any) -> int | None:
    """The largest size that a type takes of a number (`Limit`); None where it has no such limit."""
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    inside = () if get_origin(hint) is Literal else get_args(hint)
    found = [note.most for note in notes if isinstance(note, Limit)]
    found += [most for part in inside if (most := largest_number(part)) is not None]
    return max(found, default=None)


def describe_type(hint: Any) -> str:
    """A type in words, as they follow "must be": "a whole number of at least 1, or none"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe_annotated(arguments[0], arguments[1:])
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        *first, last = sorted(map(describe_type, arguments), key="none".__eq__)
        return ", ".join(first) + (", or " if last == "none" or len(first) > 1 else " or ") + last
    if origin in (list, tuple):
        return _describe_list(arguments)
    if origin is dict:
        return f"a table of {_plural(describe_type(arguments[1]))}"
    if is_dataclass(hint):
        return "a table of settings"
    return getattr(hint, "__name__", str(hint))


def _describe_annotated(hint: Any, notes: Sequence[Any]) -> str:
    for note in reversed(notes):
        if isinstance(note, Words):
            return note.text
    bounds = [
        f"{words} {getattr(note, attribute)}"
        for note in notes
        for kind, (attribute, words) in _BOUNDS.items()
        if isinstance(note, kind)
    ]
    if any(isinstance(note, MinLen) for note in notes):
        bounds.append("that is not empty")
    return " ".join([describe_type(hint), *[" and ".join(bounds)][: len(bounds)]])


def _describe_list(arguments: tuple[Any, ...]) -> str:
    if not arguments:
        return "a list"
    of = _plural(describe_type(arguments[0]))
    return f"a list of {of}" if len(arguments) < 2 or arguments[1] is ... else f"a list of {len(arguments)} {of}"


def _plural(words: str) -> str:
    """Words in the plural: "a whole number of at least 1" becomes "whole numbers of at least 1"."""
    if words in _PLURALS:
        return _PLURALS[words]
    found = re.match(r"an? ((?:whole )?\w+)(.*)", words)
    return f"{found[1]}s{found[2]}" if found else f"items that are {words}"
