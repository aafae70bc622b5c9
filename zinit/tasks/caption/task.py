"""Captions of images: trained on every caption of an image, evaluated once an image against all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zinit.metrics import METRICS
from zinit.metrics.meteor import check_meteor
from zinit.tasks.alpaca.template import encode_pairs, format_conversation, format_prompt
from zinit.tasks.base import DataInputs, Evaluation
from zinit.tasks.caption.config import CaptionConfig
from zinit.tasks.caption.records import Captioned
from zinit.tasks.caption.split import split_captions
from zinit.tasks.text import TextExample, TextTask

SCORES = ("bleu", "caption_rouge_l", "cider_d")


@dataclass(frozen=True, kw_only=True)
class CaptionExample(TextExample):
    """One caption to learn, or the first of those that an answer is compared with.

    Attributes:
        references: all captions of a held-out image.
    """

    references: tuple[str, ...] = ()


class Caption(TextTask):
    """See the module. Needs a causal language model of transformers and its tokenizer."""

    name = "caption"
    hub_task = "image-to-text"
    Config = CaptionConfig
    config: CaptionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    metric = "cider_d"

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: CaptionConfig
    ) -> tuple[list[Captioned], list[Captioned], dict[str, Any]]:
        """See `split_captions`; training images come once for each of their captions."""
        if config.meteor:
            check_meteor()
        training, held_out, counts = split_captions(inputs, config)
        return [one for image in training for one in image.each()], held_out, counts

    @classmethod
    def format_prompt(cls, instruction: str, input: str = "") -> str:
        return format_prompt(instruction, input)

    @classmethod
    def format_conversation(cls, turns: Sequence[tuple[str, str]], instruction: str) -> str:
        return format_conversation(turns, instruction)

    def encode(self, records: Sequence[Captioned]) -> tuple[list[TextExample], Counter[str]]:
        """An example for each record, its first caption being the answer."""
        prompt = format_prompt(self.config.instruction)
        counts = Counter({"": 0, "_truncated": 0, "_skipped_prompt_too_long": 0})
        examples: list[TextExample] = []
        pairs = encode_pairs(self.tokenizer, [(prompt, record.captions[0]) for record in records])
        for record, (ids, start) in zip(records, pairs, strict=True):
            if start >= self.config.max_length:
                counts["_skipped_prompt_too_long"] += 1
                continue
            counts["_truncated"] += len(ids) > self.config.max_length
            ids = ids[: self.config.max_length]
            examples.append(
                CaptionExample(
                    ids=ids,
                    answers=((start, len(ids)),),
                    instruction=self.config.instruction,
                    prompt=prompt,
                    response=record.captions[0],
                    images=(record.image,),
                    references=record.captions,
                )
            )
        counts[""] = len(examples)
        return examples, counts

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of all captions together, and how many images they are over."""
        references = [list(example.references) for example in examples if isinstance(example, CaptionExample)]
        metrics: dict[str, float] = {}
        for name in (*SCORES, *["meteor"] * self.config.meteor):
            metrics |= METRICS.get(name)().compute(
                predictions=predictions, references=references, tokens=self.config.tokens
            )
        return Evaluation(metrics=metrics, counts={"images": int(metrics.pop("cider_d_images"))})
