"""Settings that several tasks share; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass

from zinit.config import JsonConfig
from zinit.validation import NonNegativeInt, PositiveInt, Tokens


@dataclass(frozen=True, kw_only=True)
class TextConfig(JsonConfig):
    """What every task of a causal language model asks for.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end.
        evaluation_limit: held-out examples that an answer is generated for.
        max_new_tokens: longest generated answer.
        packing: pack the short examples of a micro-batch into sequences of at most ``max_length`` tokens. Pays where
            micro-batches are large; on a CPU, 8 examples of like length at a time, its masks cost what it saves.
    """

    max_length: Tokens = 512
    evaluation_limit: NonNegativeInt = 200
    max_new_tokens: PositiveInt = 128
    packing: bool = False
