"""Conversations of several turns, with images where records have them: loss on every answer of the assistant."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from zinit.data.conversations import Conversation
from zinit.metrics import METRICS
from zinit.tasks.base import DataInputs, Evaluation, TaskInputs
from zinit.tasks.conversation.config import ConversationConfig
from zinit.tasks.conversation.encode import Encoder, encode_conversations
from zinit.tasks.conversation.records import split_conversations
from zinit.tasks.conversation.template import make_template
from zinit.tasks.experts import context_lines
from zinit.tasks.text import TextExample, TextTask

ANOTHER = "another_question"


class ConversationTask(TextTask):
    """See the module. An epoch is one pass over all conversations; with weights it is as many passes over each source
    as its weight says. A fraction of a pass takes conversations in a drawn order, and goes on there in the next epoch.
    """

    name = "conversation"
    Config = ConversationConfig
    lower_is_better = (*TextTask.lower_is_better, ANOTHER)
    config: ConversationConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, inputs: TaskInputs, config: ConversationConfig) -> None:
        super().__init__(inputs, config)
        if config.weights is not None and len(self.train_stream):
            per_source = Counter(example.source for example in self.train_examples)
            passes = tuple((per_source[number], weight) for number, weight in enumerate(config.weights))
            self.train_stream = replace(self.train_stream, passes=passes)
            for number, (own, taken) in enumerate(zip(passes, self.train_stream.taken, strict=True), start=1):
                self._counts |= {f"train_source_{number}": own[0], f"epoch_source_{number}": taken}

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: ConversationConfig
    ) -> tuple[list[Conversation], list[Conversation], dict[str, int]]:
        """See `split_conversations`."""
        return split_conversations(inputs, config)

    @classmethod
    def validation_options(cls, *, demo: bool) -> tuple[str, ...]:
        """A tenth of the demo's training part; other data have `ConversationConfig.held_out_data`."""
        return ("task.validation=true", "task.held_out_data=none") if demo else ()

    @classmethod
    def chat_format(cls, tokenizer: Any, config: ConversationConfig) -> Encoder:
        """The template of the run."""
        return Encoder(make_template(config.template, tokenizer, config.system))

    @cached_property
    def encoder(self) -> Encoder:
        """Of the conversations' texts."""
        return self.chat_format(self.tokenizer, self.config)

    def held_out_groups(self) -> dict[str, list[int]]:
        """Of several sources each: of two languages, say."""
        groups: dict[int, list[int]] = defaultdict(list)
        for place, example in enumerate(self.held_out_examples):
            groups[example.source].append(place)
        return {f"source_{number + 1}": own for number, own in sorted(groups.items())} if len(groups) > 1 else {}

    def encode(self, records: Sequence[Conversation]) -> tuple[list[TextExample], Counter[str]]:
        """See `encode_conversations`; of examples with what experts say also `context_lines`."""
        told, heard = zip(*map(self._with_experts, records), strict=True) if records else ((), ())
        encoded, counts = encode_conversations(self.encoder, told, max_length=self.config.max_length)
        for more in heard:
            counts.update(more)
        examples = []
        for each in encoded:
            talk = each.conversation
            texts = {"instruction": talk.rounds[-1].asked, "prompt": "", "response": talk.rounds[-1].answer}
            also = {"images": talk.images, "category": talk.category, "source": talk.source}
            examples.append(TextExample(ids=each.ids, answers=each.answers, **texts, **also))
        return examples, counts

    def _with_experts(self, talk: Conversation) -> tuple[Conversation, Counter[str]]:
        """The conversation with what experts say about its images; without it where its last round had no room."""
        lines, heard = context_lines(talk.said, self.tokenizer, self.config.expert_tokens)
        counts = Counter({f"_{name}": count for name, count in heard.items()})
        if not lines:
            return talk, counts
        told = talk.with_context(lines)
        (last,) = self.encoder.encode([replace(told, rounds=told.rounds[-1:])])
        if len(last.ids) <= self.config.max_length:
            return told, counts
        counts["_experts_left_out"] += 1
        return talk, counts

    @property
    def stop_tokens(self) -> list[int]:
        """As the template ends answers."""
        return self.encoder.stop_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """As the template ends answers."""
        return self.encoder.stop_strings

    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """Exact match and ROUGE-L of the last answers, 0 to 1; exact match of each category besides.

        Where several things are asked about an image also, by category, the share of answers that are wrong here and
        right for another question about it: what an image overrides.
        """
        references = [example.response.strip() for example in examples]
        metrics: dict[str, float] = {}
        for name in ("exact_match", "rouge_l"):
            metrics |= METRICS.get(name)().compute(predictions=predictions, references=references)
        by_category: dict[str, list[int]] = defaultdict(list)
        for place, example in enumerate(examples):
            if example.category:
                by_category[example.category].append(place)
        for category, places in sorted(by_category.items()):
            own = METRICS.get("exact_match")().compute(
                predictions=[predictions[place] for place in places], references=[references[place] for place in places]
            )
            metrics |= {f"{name}/{category}": value for name, value in own.items()}
        metrics |= _answers_to_others(examples, predictions)
        return Evaluation(metrics=metrics, counts={f"answered/{c}": len(places) for c, places in by_category.items()})

    def _sample(self, example: TextExample, output: str) -> dict[str, str]:
        prompt = self.tokenizer.decode(example.ids[: example.prompt_length])
        return super()._sample(replace(example, prompt=prompt), output)


def _answers_to_others(examples: Sequence[TextExample], predictions: Sequence[str]) -> dict[str, float]:
    """{"another_question/CATEGORY": share}; empty where no image is asked about twice."""
    expected: dict[tuple[bytes, ...], set[str]] = defaultdict(set)
    for example in examples:
        expected[example.digests].add(example.response.strip())
    if not any(len(answers) > 1 for digests, answers in expected.items() if digests):
        return {}
    found: dict[str, list[bool]] = defaultdict(list)
    for example, prediction in zip(examples, predictions, strict=True):
        if example.digests and example.category:
            others = expected[example.digests] - {example.response.strip()}
            found[example.category].append(prediction.strip() in others)
    return {f"{ANOTHER}/{category}": sum(own) / len(own) for category, own in sorted(found.items())}
