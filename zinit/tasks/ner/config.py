"""The settings of the task ner; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.validation import CommaSeparated, Name, NonNegativeInt, Tokens, Whole, Words, shown

Fields = Annotated[tuple[Name, Name], CommaSeparated, Words("a list of two names: the fields of tokens and tags")]

Labels = Annotated[tuple[Name, ...], CommaSeparated, Words("different names such as O,B-PER,I-PER")]


@dataclass(frozen=True, kw_only=True)
class TokenClassificationConfig(JsonConfig):
    """What the task does with its data.

    Args:
        max_length: tokens of a window, special ones included. A longer sentence becomes several windows; each of its
            words counts once, in the window that shows most around it.
        stride: tokens that neighbouring windows of one sentence share.
        token_column: of files in columns, counted from 0 (or back from -1).
        tag_column: likewise.
        fields: what records call the list of tokens and the list of tags.
        labels: all tags there are, in order; needed where the data gives numbers without names. Without it they are
            the training data's, "O" first.
        held_out: which part of the sentences to hold out, such as 0.1.
        held_out_data: a source of its own for the held-out sentences instead.
        drift: held-out windows to measure by how much their features moved; 0 measures nothing.
    """

    max_length: Tokens = 128
    stride: NonNegativeInt = 32
    token_column: Whole = 0
    tag_column: Whole = -1
    fields: Fields = ("tokens", "ner_tags")
    labels: Labels | None = None
    held_out: Annotated[float, Gt(0), Lt(1), Words("a number between 0 and 1, both excluded")] = 0.1
    held_out_data: str | None = None
    drift: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"labels must be different names such as O,B-PER,I-PER; got {shown(self.labels)}.")
