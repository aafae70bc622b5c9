"""Training and held-out conversations: none of a held-out prompt is trained on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from zinit.data.conversations import Conversation, Round, from_alpaca, read_conversations
from zinit.data.hold_out import hold_out
from zinit.data.images import ImageSource
from zinit.data.records import count_sources, most_unused
from zinit.demo import instructions
from zinit.demo.flags import NAME, flags
from zinit.errors import ConfigError
from zinit.tasks._images import Digests
from zinit.tasks.experts import Experts

if TYPE_CHECKING:
    from zinit.tasks.base import DataInputs
    from zinit.tasks.conversation.config import ConversationConfig


def split_conversations(
    inputs: DataInputs, config: ConversationConfig
) -> tuple[list[Conversation], list[Conversation], dict[str, int]]:
    """Training and held-out conversations: no prompt with the same images is in both.

    Returns:
        Both parts, and counts for the task's report.

    Raises:
        ConfigError: if there is not one weight for each source.
        DataError: if the data cannot be used.
    """
    sources = max(1, len(inputs.sources))
    if inputs.train and config.weights is not None and len(config.weights) != sources:
        raise ConfigError(
            f"task.weights has {len(config.weights)} numbers for {sources} sources: give one for each --data, in order."
        )
    counts: Counter[str] = Counter(read=0)

    def read(source: str, number: int = 0) -> list[Conversation]:
        return read_conversations(source, counts=counts, image_folder=config.image_folder, number=number)

    training, held_out = _embedded(config.demo)
    if config.validation:
        if inputs.sources:
            raise ConfigError("task.validation is for the embedded demo: name other data by task.held_out_data.")
        training, held_out = _every_tenth(training)
    by_source: list[list[Conversation]] = []
    if inputs.sources and (inputs.train or config.held_out_data is None):
        by_source = [read(source, number) for number, source in enumerate(inputs.sources)]
        training = list(itertools.chain.from_iterable(by_source))
    else:
        counts["read"] += len(training) * inputs.train + len(held_out) * (config.held_out_data is None)
    if config.held_out_data is not None:
        held_out, training = read(config.held_out_data), training if inputs.train else []
    elif inputs.sources:
        training, held_out = hold_out(training, config.held_out, inputs.seed, ", ".join(inputs.sources), "conversation")
    # Also where images are left out: runs with and without them train on the same conversations.
    kept = _without(training, held_out, Digests())
    if config.experts:
        experts = Experts([inputs.make_expert(words) for words in config.experts])
        shown = [talk for talk in held_out if talk.images]
        said = dict(zip(map(id, shown), experts([(t.images, t.rounds[-1].question) for t in shown]), strict=True))
        held_out = [replace(talk, said=said.get(id(talk), ())) for talk in held_out]
    unused = Counter({name: number for name, number in counts.items() if name.startswith("unused_field")})
    report = dict(counts - unused) | count_sources(by_source) | most_unused(unused)
    return kept, held_out, {**report, "train_skipped_also_held_out": len(training) - len(kept)}


def _embedded(demo: str) -> tuple[list[Conversation], list[Conversation]]:
    """The demo's training and held-out conversations, of one round each."""
    if demo == "instructions":
        training, held_out = ([from_alpaca(record) for record in part] for part in instructions())
        return training, held_out
    training, held_out = (
        [
            Conversation(
                rounds=(Round(question=asked.text, input="", answer=asked.answer),),
                images=(asked.image,),
                category=asked.category,
            )
            for asked in part
        ]
        for part in flags()
    )
    return [talk for talk in training if demo == "flags" or talk.category == NAME], held_out


def _every_tenth(talks: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """All but every tenth, and every tenth; of those with images every tenth image, with all its questions."""
    number: dict[int, int] = {}
    numbers = [number.setdefault(id(talk.images[0] if talk.images else talk), len(number)) for talk in talks]
    pairs = list(zip(talks, numbers, strict=True))
    return [talk for talk, n in pairs if n % 10 != 9], [talk for talk, n in pairs if n % 10 == 9]


def _without(
    training: Sequence[Conversation],
    held_out: Sequence[Conversation],
    digests: Callable[[Sequence[ImageSource]], tuple[bytes, ...]],
) -> list[Conversation]:
    """The training conversations none of whose answers answers a prompt of a held-out one."""
    asked: dict[tuple[str, ...], set[tuple[bytes, ...]]] = {}
    for talk in held_out:
        asked.setdefault(talk.prompt, set()).add(digests(talk.images))

    def is_held_out(talk: Conversation) -> bool:
        prompts = (replace(talk, rounds=talk.rounds[:count]).prompt for count in range(1, len(talk.rounds) + 1))
        return any(digests(talk.images) in asked[prompt] for prompt in prompts if prompt in asked)

    return [talk for talk in training if not is_held_out(talk)]
