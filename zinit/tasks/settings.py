"""Settings that several tasks share; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.experts import EXPERTS
from zinit.validation import Names, NonNegativeInt, PositiveInt, Tokens

EXPERT_TOKENS = 64  # of what an expert says


@dataclass(frozen=True, kw_only=True)
class TextConfig(JsonConfig):
    """What every task of a causal language model asks for.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end.
        evaluation_limit: held-out examples that an answer is generated for.
        max_new_tokens: longest generated answer.
        packing: pack the short examples of a micro-batch into sequences of at most ``max_length`` tokens. Pays where
            micro-batches are large; on a CPU, 8 examples of like length at a time, its masks cost what it saves.
        known_texts: a text file of paragraphs, blank lines between them, that the model is taken to know already: the
            loss on them, per token, tells what it forgets.
    """

    max_length: Tokens = 512
    evaluation_limit: NonNegativeInt = 200
    max_new_tokens: PositiveInt = 128
    packing: bool = False
    known_texts: str | None = None


@dataclass(frozen=True, kw_only=True)
class AskingConfig(TextConfig):
    """What tasks ask for whose prompts have an input field: experts may write about the images there.

    Args:
        experts: what writes text about the images of held-out examples, in this order: names that ``zinit ls experts``
            lists, with what belongs to them, such as "ocr", "caption:runs/x".
        expert_tokens: tokens of what each of them says; the rest is cut, and counted.
    """

    experts: Names = ()
    expert_tokens: PositiveInt = EXPERT_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        for words in self.experts:
            EXPERTS.where(words.partition(":")[0])
            if self.experts.count(words) > 1:
                raise ConfigError(f"experts has {words!r} {self.experts.count(words)} times. Name it once.")
