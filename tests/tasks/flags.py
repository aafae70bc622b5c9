"""A small task with images for tests: questions about the demo's flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zinit.demo.flags import Question, flags
from zinit.tasks.alpaca.template import encode_texts, format_prompt
from zinit.tasks.base import DataInputs, Evaluation
from zinit.tasks.settings import TextConfig
from zinit.tasks.text import TextExample, TextTask


@dataclass(frozen=True, kw_only=True)
class FlagsConfig(TextConfig):
    images: bool = True
    held_out_data: str | None = None
    count: int = 12


class Flags(TextTask):
    """Every third example has no image, and every fifth two."""

    name = "flags"
    Config = FlagsConfig

    @classmethod
    def read_data(cls, inputs: DataInputs, config: FlagsConfig) -> Any:
        train, held_out = flags()
        return train[: config.count], held_out[: config.count // 2], {"read": config.count}

    def encode(self, records: Sequence[Question]) -> tuple[list[TextExample], Counter[str]]:
        examples = []
        for number, record in enumerate(records):
            prompt = format_prompt(record.text)
            before, after = encode_texts(self.tokenizer, [prompt, record.answer])
            start = len(before) + 1
            ids = [self.tokenizer.bos_token_id, *before, *after, self.tokenizer.eos_token_id]
            images = () if number % 3 == 0 else (record.image, records[0].image) if number % 5 == 0 else (record.image,)
            examples.append(
                TextExample(
                    ids=ids,
                    answers=((start, len(ids)),),
                    instruction=record.text,
                    prompt=prompt,
                    response=record.answer,
                    images=images,
                    category=record.category,
                )
            )
        return examples, Counter({"": len(examples)})

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        right = [prediction == example.response for example, prediction in zip(examples, predictions, strict=True)]
        return Evaluation(metrics={"exact_match": sum(right) / len(right)})
