"""ScienceQA: multiple-choice questions, some with an image, answered in words and scored by category."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zinit.tasks.alpaca.template import encode_pairs
from zinit.tasks.base import DataInputs, Evaluation, TaskInputs
from zinit.tasks.experts import context_lines
from zinit.tasks.science_qa.config import ScienceQAConfig
from zinit.tasks.science_qa.problems import Problem, read_problems
from zinit.tasks.science_qa.scoring import score_answers
from zinit.tasks.science_qa.template import format_answer, format_problem
from zinit.tasks.text import TextExample, TextTask


@dataclass(frozen=True, kw_only=True)
class ScienceExample(TextExample):
    """An encoded problem."""

    problem: Problem


class ScienceQA(TextTask):
    """See the module. Needs a causal language model of transformers and its tokenizer."""

    name = "science-qa"
    Config = ScienceQAConfig
    config: ScienceQAConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    metric = "accuracy"
    lower_is_better = (*TextTask.lower_is_better, "unread")
    reads_several = False

    def __init__(self, inputs: TaskInputs, config: ScienceQAConfig) -> None:
        self._seed = inputs.seed
        super().__init__(inputs, config)

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: ScienceQAConfig
    ) -> tuple[list[Problem], list[Problem], dict[str, Any]]:
        """Training and held-out problems, and counts; see `read_problems`."""
        return read_problems(inputs, config)

    def encode(self, records: Sequence[Problem]) -> tuple[list[TextExample], Counter[str]]:
        """An example for each problem. Hints are cut from the left until a problem and the letter of its answer fit."""
        order, most = self.config.order, self.config.max_length
        counts = Counter({"": 0, "_truncated": 0, "_hint_cut": 0, "_skipped_prompt_too_long": 0})
        examples: list[TextExample] = []
        told = [self._with_experts(problem, counts) for problem in records]
        pairs = encode_pairs(self.tokenizer, [format_problem(problem, order) for problem in told])
        for problem, shown, (ids, start) in zip(records, told, pairs, strict=True):
            if len(ids) > most and not self._fits(shown):
                if (shown := self._with_shorter_hint(shown)) is None:
                    counts["_skipped_prompt_too_long"] += 1
                    continue
                counts["_hint_cut"] += 1
                ids, start = encode_pairs(self.tokenizer, [format_problem(shown, order)])[0]
            prompt, response = format_problem(shown, order)
            counts["_truncated"] += len(ids) > most
            ids = ids[:most]
            examples.append(
                ScienceExample(
                    ids=ids,
                    answers=((start, len(ids)),),
                    instruction=prompt,
                    prompt=prompt,
                    response=response.strip(),
                    images=() if problem.image is None else (problem.image,),
                    problem=problem,
                )
            )
        counts[""] = len(examples)
        return examples, counts

    def _with_experts(self, problem: Problem, counts: Counter[str]) -> Problem:
        """The problem with what experts say above its hint; without it, and counted, where there is no room for all."""
        lines, heard = context_lines(problem.said, self.tokenizer, self.config.expert_tokens)
        counts.update({f"_{name}": count for name, count in heard.items()})
        if not lines:
            return problem
        told = replace(problem, hint="\n".join(filter(None, (lines, problem.hint))))
        if self._fits(told):
            return told
        counts["_experts_left_out"] += 1
        return problem

    def _fits(self, problem: Problem) -> bool:
        """Whether there is room for a problem and "The answer is X.", whatever the order has besides."""
        prompt, _ = format_problem(problem, self.config.order)
        ((ids, _),) = encode_pairs(self.tokenizer, [(prompt, format_answer(problem))])
        return len(ids) <= self.config.max_length

    def _with_shorter_hint(self, problem: Problem) -> Problem | None:
        """The problem with as many of the hint's last words as fit; None if it does not fit without any either."""
        starts = [*(word.start() for word in re.finditer(r"\S+", problem.hint)), len(problem.hint)]
        cut = [replace(problem, hint=problem.hint[start:]) for start in starts]
        place = bisect.bisect_left(cut, True, key=self._fits)
        return cut[place] if place < len(cut) else None

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """Accuracy over all and by category, and "unread": the share of answers in which no option could be read."""
        problems = [example.problem for example in examples if isinstance(example, ScienceExample)]
        accuracies, counts = score_answers(problems, predictions, readout=self.config.readout, seed=self._seed)
        return Evaluation(metrics={**accuracies, "unread": counts["unread"] / len(problems)}, counts=counts)
