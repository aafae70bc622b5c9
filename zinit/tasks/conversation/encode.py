"""Conversations as token ids, turn by turn: a prompt is the same tokens in training and in generation."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from zinit.data.conversations import Conversation
from zinit.tasks.alpaca.template import encode_texts
from zinit.tasks.conversation.template import Template, Written, special_tokens

AT_ONCE = 1024  # conversations whose texts go to the tokenizer together
COUNTED = ("", "_cut_at_front", "_rounds_cut", "_truncated", "_only_last_answer", "_skipped_prompt_too_long")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One encoded conversation.

    Attributes:
        ids: of all of it.
        answers: ranges [start, end) of ids that are learned, in order: answers with what ends them.
        conversation: as it was encoded.
    """

    ids: list[int]
    answers: tuple[tuple[int, int], ...]
    conversation: Conversation


class _Text(NamedTuple):
    """A text that goes on with a run, which is all text since a special token.

    Attributes:
        behind: the special token before the run; None at the start.
        run: the run, this text included.
        text: this text.
    """

    behind: int | None
    run: str
    text: str


class Encoder:
    """Encodes what a template writes.

    Runs are encoded text by text, each together with those before it where that leaves these as they were, and by
    itself where the tokenizer would merge over the border. So ids up to an answer do not depend on what follows.
    A special token that somebody wrote in a text stays text.

    Args:
        template: with the model's tokenizer.
    """

    def __init__(self, template: Template) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        self._special = re.compile("|".join(map(re.escape, special_tokens(self.tokenizer))) or "(?!)")

    @property
    def stop_tokens(self) -> list[int]:
        """See `Template.stop_tokens`."""
        return self.template.stop_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.template.stops

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids that an answer to the last question starts from.

        Args:
            conversation: whose last answer is asked for.
        """
        return self._assemble_all([self.template.write(conversation, ask=True)])[0][0]

    def encode(self, conversations: Sequence[Conversation]) -> Iterator[Encoded]:
        """All of each conversation, in order."""
        for start in range(0, len(conversations), AT_ONCE):
            some = conversations[start : start + AT_ONCE]
            encoded = self._assemble_all([self.template.write(each) for each in some])
            for conversation, (ids, answers) in zip(some, encoded, strict=True):
                yield Encoded(ids=ids, answers=answers, conversation=conversation)

    def _assemble_all(self, written: Sequence[list[Written]]) -> list[tuple[list[int], tuple[tuple[int, int], ...]]]:
        laid = [_lay(one) for one in written]
        known = self._tokens({item for one in laid for each in one for item in each if isinstance(item, _Text)})
        return [self._assemble(one, known) for one in laid]

    def _assemble(
        self, laid: Iterable[Sequence[_Text | int]], known: dict[_Text, list[int]]
    ) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        ids: list[int] = []
        bounds, start = [], 0  # of the parts; where the run starts
        for part in laid:
            for item in part:
                if isinstance(item, int):
                    ids.append(item)
                    start = len(ids)
                elif known[item][: len(ids) - start] == ids[start:]:
                    ids[start:] = known[item]
                else:
                    ids += encode_texts(self.tokenizer, [item.text])[0]
            bounds.append(len(ids))
        return ids, tuple(zip(bounds[::2], bounds[1::2], strict=True))

    def _tokens(self, texts: set[_Text]) -> dict[_Text, list[int]]:
        """The ids of the run of each text."""
        alone, placed = [], []
        for text in texts:
            in_place = self.template.in_place and not self._special.search(text.run)
            (placed if in_place else alone).append(text)
        known = dict(zip(alone, encode_texts(self.tokenizer, [text.run for text in alone]), strict=True))
        if placed:
            names = ["" if t.behind is None else self.tokenizer.convert_ids_to_tokens(t.behind) for t in placed]
            both = [name + text.run for name, text in zip(names, placed, strict=True)]
            for text, ids in zip(placed, self.tokenizer(both, add_special_tokens=False)["input_ids"], strict=True):
                known[text] = ids if text.behind is None else ids[1:]
        return known


def _lay(written: Sequence[Written]) -> list[list[_Text | int]]:
    """What stands before each answer, and the answer, in turn: special tokens, and texts in their runs."""
    laid: list[list[_Text | int]] = []
    behind, run = None, ""
    for pieces in (pieces for one in written for pieces in one):
        part: list[_Text | int] = []
        for piece in filter(lambda piece: piece != "", pieces):
            if isinstance(piece, int):
                part.append(piece)
                behind, run = piece, ""
            else:
                run += piece
                part.append(_Text(behind, run, piece))
        laid.append(part)
    return laid


def encode_conversations(
    encoder: Encoder, conversations: Sequence[Conversation], *, max_length: int
) -> tuple[list[Encoded], Counter[str]]:
    """Conversations of at most ``max_length`` tokens.

    Longer ones lose whole rounds from the front; their system text and images stay. If the last round alone is too
    long, its answer is cut at the end.

    Args:
        encoder: of the texts.
        conversations: to encode.
        max_length: tokens of one.

    Returns:
        Those of which an answer is left, and counts under the names of `COUNTED`, and of what was skipped beside.
    """
    found: list[Encoded] = []
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    for whole in encoder.encode(conversations):
        fitting = whole if len(whole.ids) <= max_length else _shortened(encoder, whole.conversation, max_length)
        lost = len(whole.conversation.rounds) - len(fitting.conversation.rounds)
        start, end = fitting.answers[-1]
        if start >= max_length:
            counts["_skipped_prompt_too_long"] += 1
            continue
        if end > max_length:
            if not encoder.tokenizer.decode(fitting.ids[start:max_length], skip_special_tokens=True).strip():
                counts["_skipped_answer_cut_to_blanks"] += 1
                continue
            answers = (*fitting.answers[:-1], (start, max_length))
            fitting = replace(fitting, ids=fitting.ids[:max_length], answers=answers)
            counts["_truncated"] += 1
        counts["_cut_at_front"] += lost > 0
        counts["_rounds_cut"] += lost
        counts["_only_last_answer"] += len(fitting.answers) < len(fitting.conversation.rounds)
        found.append(fitting)
    counts[""] = len(found)
    return found, counts


def _shortened(encoder: Encoder, conversation: Conversation, max_length: int) -> Encoded:
    """A conversation without the rounds from the front for which there is no room; the last round stays."""
    rounds = conversation.rounds

    def without(count: int) -> Encoded:
        return next(encoder.encode([replace(conversation, rounds=rounds[count:])]))

    fewest = bisect_left(range(1, len(rounds)), True, key=lambda count: len(without(count).ids) <= max_length)
    return without(min(1 + fewest, len(rounds) - 1))
