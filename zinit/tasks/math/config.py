"""The settings of the task math; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zinit.errors import ConfigError
from zinit.tasks.settings import TextConfig
from zinit.validation import CommaSeparated, Name, PositiveInt, Tokens, Words

Fields = Annotated[
    tuple[Name, Name],
    CommaSeparated,
    Words("a list of two names, the fields of problem and solution"),
]


@dataclass(frozen=True, kw_only=True)
class MathConfig(TextConfig):
    """What the task does with its data. Defaults are those of PEFT's comparison of methods on MetaMathQA.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end.
        max_new_tokens: longest generated solution.
        held_out: problems kept from training for evaluation, at most a tenth of the data.
        held_out_data: a source of its own for the held-out problems instead, such as GSM8K's test part.
        fields: what the data calls problem and solution; MetaMathQA's are "query,response".
        held_out_fields: likewise in ``held_out_data``; GSM8K's are "question,answer". None is as in ``fields``.
    """

    max_length: Tokens = 768
    max_new_tokens: PositiveInt = 512
    held_out: PositiveInt = 200
    held_out_data: str | None = None
    fields: Fields = ("query", "response")
    held_out_fields: Fields | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out_fields is not None and self.held_out_data is None:
            raise ConfigError("held_out_fields are those of held_out_data: give both, or neither.")
