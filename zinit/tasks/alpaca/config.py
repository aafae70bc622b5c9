"""The settings of the task alpaca; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zinit.tasks.settings import TextConfig
from zinit.validation import CommaSeparated, Name, PositiveInt, Words

Fields = Annotated[
    tuple[Name, Name, Name] | tuple[Name, Name],
    CommaSeparated,
    Words("a list of three names, the fields of instruction, input and output, or of two: without an input"),
]


@dataclass(frozen=True, kw_only=True)
class AlpacaConfig(TextConfig):
    """What the task does with its data.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end. Reference code: 512.
        held_out: examples kept from training for evaluation, at most a tenth of the data. (The reference evaluates
            on training examples.)
        held_out_data: a source of its own for the held-out examples instead.
        fields: what the data calls instruction, input and output; two names are an instruction and its output.
    """

    held_out: PositiveInt = 200
    held_out_data: str | None = None
    fields: Fields = ("instruction", "input", "output")
