"""Instruction tuning in Alpaca's format (paper, section 4.1): two templates, loss on the response only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zinit.metrics import METRICS
from zinit.tasks.alpaca.config import AlpacaConfig
from zinit.tasks.alpaca.examples import Record, encode_records, split_records
from zinit.tasks.alpaca.template import format_conversation, format_prompt
from zinit.tasks.base import DataInputs, Evaluation
from zinit.tasks.text import TextExample, TextTask


class Alpaca(TextTask):
    """See the module."""

    name = "alpaca"
    Config = AlpacaConfig

    @classmethod
    def read_data(cls, inputs: DataInputs, config: AlpacaConfig) -> tuple[list[Record], list[Record], dict[str, int]]:
        """See `split_records`."""
        return split_records(
            inputs.sources,
            config.held_out_data,
            fields=config.fields,
            held_out=config.held_out,
            seed=inputs.seed,
            train=inputs.train,
        )

    def encode(self, records: Sequence[Record]) -> tuple[list[TextExample], Counter[str]]:
        """See `encode_records`."""
        return encode_records(self.tokenizer, records, max_length=self.config.max_length)

    @classmethod
    def format_prompt(cls, instruction: str, input: str = "") -> str:
        return format_prompt(instruction, input)

    @classmethod
    def format_conversation(cls, turns: Sequence[tuple[str, str]], instruction: str) -> str:
        return format_conversation(turns, instruction)

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """Exact match and ROUGE-L, 0 to 1."""
        references = [example.response.strip() for example in examples]
        metrics: dict[str, float] = {}
        for name in ("exact_match", "rouge_l"):
            metrics |= METRICS.get(name)().compute(predictions=predictions, references=references)
        return Evaluation(metrics=metrics)
