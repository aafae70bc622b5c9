"""The settings of the task alpaca; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zinit.config import JsonConfig
from zinit.validation import CommaSeparated, Name, NonNegativeInt, PositiveInt, Tokens, Words

Fields = Annotated[
    tuple[Name, Name, Name] | tuple[Name, Name],
    CommaSeparated,
    Words("a list of three names, the fields of instruction, input and output, or of two: without an input"),
]


@dataclass(frozen=True, kw_only=True)
class AlpacaConfig(JsonConfig):
    """What the task does with its data.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end. Reference code: 512.
        held_out: examples kept from training for evaluation, at most a tenth of the data. (The reference evaluates
            on training examples.)
        held_out_data: a source of its own for the held-out examples instead.
        fields: what the data calls instruction, input and output; two names are an instruction and its output.
        evaluation_limit: held-out examples that an answer is generated for.
        max_new_tokens: longest generated answer.
        packing: pack the short examples of a micro-batch into sequences of at most ``max_length`` tokens. Pays where
            micro-batches are large; on a CPU, 8 examples of like length at a time, its masks cost what it saves.
    """

    max_length: Tokens = 512
    held_out: PositiveInt = 200
    held_out_data: str | None = None
    fields: Fields = ("instruction", "input", "output")
    evaluation_limit: NonNegativeInt = 200
    max_new_tokens: PositiveInt = 128
    packing: bool = False
