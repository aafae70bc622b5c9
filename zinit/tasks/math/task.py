"""Math word problems, such as MetaMathQA's and GSM8K's, in the prompt of PEFT's comparison of methods.

Loss on the solution only (PEFT's comparison trains on the problem too); what counts is the final answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zinit.errors import DataError
from zinit.metrics import METRICS
from zinit.metrics.final_answer import final_answer
from zinit.tasks.alpaca.examples import Record, encode_records, split_records
from zinit.tasks.base import DataInputs, Evaluation
from zinit.tasks.math.config import MathConfig
from zinit.tasks.text import TextExample, TextTask


class Math(TextTask):
    """See the module."""

    name = "math"
    Config = MathConfig
    metric = "final_answer"

    @classmethod
    def read_data(cls, inputs: DataInputs, config: MathConfig) -> tuple[list[Record], list[Record], dict[str, int]]:
        """See `split_records`. Held-out problems whose solution names no final answer are skipped.

        Raises:
            DataError: if there are no data: the package embeds no problems.
        """
        if not inputs.sources and (inputs.train or config.held_out_data is None):
            raise DataError(
                f"the task math has no data of its own: --data FILE_OR_HUB_ID with {' and '.join(config.fields)}."
            )
        training, held_out, counts = split_records(
            inputs.sources,
            config.held_out_data,
            fields=config.fields,
            held_out_fields=config.held_out_fields,
            held_out=config.held_out,
            seed=inputs.seed,
            train=inputs.train,
            renamed_by="task.fields=PROBLEM,SOLUTION (of --data) or task.held_out_fields=PROBLEM,SOLUTION",
        )
        scored = [record for record in held_out if final_answer(record["output"]) is not None]
        counts["held_out_skipped_no_final_answer"] = len(held_out) - len(scored)
        if held_out and not scored:
            raise DataError(
                f"none of {len(held_out)} held-out solutions names its final answer ('#### 5', 'The answer is: 5');"
                f" the first is {held_out[0]['output'][:80]!r}. Give others: -o task.held_out_data=FILE_OR_HUB_ID."
            )
        return training, scored, counts

    def encode(self, records: Sequence[Record]) -> tuple[list[TextExample], Counter[str]]:
        """See `encode_records`."""
        return encode_records(
            self.tokenizer, records, max_length=self.config.max_length, format_prompt=self.format_prompt
        )

    @classmethod
    def format_prompt(cls, instruction: str, input: str = "") -> str:
        return f"Question: {super().format_prompt(instruction, input)} Think step by step.\nAnswer:"

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """The share of final answers that are right, 0 to 1."""
        references = [example.response for example in examples]
        return Evaluation(metrics=METRICS.get(self.metric)().compute(predictions=predictions, references=references))
