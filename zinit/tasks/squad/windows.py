"""A context of any length as windows that fit the model, and the answer back from what is scored in them.

As in P-tuning v2's pipeline (ACL 2022): neighbouring windows share ``stride`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zinit.tasks.squad.questions import Question

AT_ONCE = 256  # questions per call of the tokenizer: bounds memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """One question with a part of its context, as tokens: [CLS] question [SEP] context [SEP].

    Attributes:
        question: which one, by its place in the list.
        ids: (T,) token ids.
        types: (T,) token types, if the model takes them.
        cls: the position that stands for "no answer".
        first: the position of the first token of the context.
        offsets: (N, 2) from which to which character of the context each of its tokens reaches, here only where the
            token holds something but white space, else (-1, -1).
        start: position of the first token of the answer; ``cls`` if the answer is not in this window.
        end: position of the last one.
    """

    question: int
    ids: np.ndarray
    types: np.ndarray | None
    cls: int
    first: int
    offsets: np.ndarray
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of all questions, in order.

    Attributes:
        items: the windows.
        questions: those that the windows are of: a question of which nothing is left has none.
        truncated_questions: how many questions were cut.
        unreachable: how many questions have an answer that no window holds whole.
    """

    items: list[Window]
    questions: list[Question]
    truncated_questions: int
    unreachable: int


def make_windows(
    tokenizer: Any, questions: Sequence[Question], *, max_length: int, stride: int, max_question: int, types: bool
) -> Windows:
    """Encodes questions with their contexts.

    Args:
        tokenizer: a fast one.
        questions: the first of several answers is the one to train on.
        max_length: tokens of a window, special ones included.
        stride: tokens that neighbouring windows share.
        max_question: tokens that a question is cut to.
        types: whether the model takes token types.
    """
    items: list[Window] = []
    kept: list[Question] = []
    truncated = unreachable = 0
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        texts = _cut(tokenizer, [question.text for question in part], max_question)
        begin, left = len(kept), [place for place, text in enumerate(texts) if text.strip()]
        part, texts = [part[place] for place in left], [texts[place] for place in left]
        if not part:
            continue
        kept += part
        truncated += sum(text != question.text for text, question in zip(texts, part, strict=True))
        encoded = tokenizer(
            texts,
            [question.context for question in part],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=types,
            split_special_tokens=True,
        )
        held = set()
        for row, place in enumerate(encoded["overflow_to_sample_mapping"]):
            window = _window(tokenizer, encoded, row, begin + place, part[place])
            held |= {place} if window.end != window.cls else set()
            items.append(window)
        unreachable += sum(bool(question.answers) and place not in held for place, question in enumerate(part))
    return Windows(items=items, questions=kept, truncated_questions=truncated, unreachable=unreachable)


def _cut(tokenizer: Any, texts: list[str], longest: int) -> list[str]:
    """What the first tokens of each text stand for; nothing of a text that has no tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    cut = []
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        text = text if offsets else ""
        cut.append(text if len(offsets) <= longest else text[: offsets[longest][0]].rstrip())
    return cut


def _window(tokenizer: Any, encoded: Any, row: int, place: int, question: Question) -> Window:
    ids = np.asarray(encoded["input_ids"][row], dtype=np.int32)
    of_context = [position for position, part in enumerate(encoded.sequence_ids(row)) if part == 1]
    first = of_context[0] if of_context else len(ids)
    offsets = np.asarray(encoded["offset_mapping"][row], dtype=np.int32)[first : first + len(of_context)].reshape(-1, 2)
    blank = [not question.context[left:right].strip() for left, right in offsets]
    offsets[blank] = -1
    cls = np.flatnonzero(ids == tokenizer.cls_token_id) if tokenizer.cls_token_id is not None else []
    null = int(cls[0]) if len(cls) else 0
    span = answer_tokens(offsets, question)
    start, end = (null, null) if span is None else (first + span[0], first + span[1])
    types = encoded["token_type_ids"][row] if "token_type_ids" in encoded else None
    return Window(
        question=place,
        ids=ids,
        types=None if types is None else np.asarray(types, dtype=np.int32),
        cls=null,
        first=first,
        offsets=offsets,
        start=start,
        end=end,
    )


def answer_tokens(offsets: np.ndarray, question: Question) -> tuple[int, int] | None:
    """The first and last token of a question's first answer, or None if the window does not hold all of it.

    Args:
        offsets: see `Window`.
        question: with its answers.
    """
    if not question.answers:
        return None
    left, right = question.starts[0], question.starts[0] + len(question.answers[0])
    inside = np.flatnonzero((offsets[:, 1] > left) & (offsets[:, 0] < right) & (offsets[:, 0] >= 0))
    if not len(inside):
        return None
    first, last = int(inside[0]), int(inside[-1])
    missed = question.context[left : max(left, offsets[first, 0])] + question.context[offsets[last, 1] : right]
    return None if missed.strip() else (first, last)


@dataclass(frozen=True, kw_only=True)
class Span:
    """The best answer of one question.

    Attributes:
        text: it.
        score: sum of the scores of its two ends.
        null: how well "no answer" scores: the smallest of the question's windows.
    """

    text: str
    score: float
    null: float

    @property
    def null_odds(self) -> float:
        """How much better "no answer" scores than the answer."""
        return self.null - self.score


def best_answer(
    context: str,
    windows: Sequence[Window],
    scores: Sequence[np.ndarray],
    *,
    n_best: int,
    max_answer: int,
) -> Span:
    """The best answer of one question over all its windows.

    Args:
        context: of the question.
        windows: all of them.
        scores: of each window (T, 2), for a token to be the first and the last of the answer.
        n_best: how many first and last tokens of a window are tried with one another.
        max_answer: tokens of the longest answer.
    """
    text, best, null = "", -np.inf, np.inf
    for window, score in zip(windows, scores, strict=True):
        null = min(null, float(score[window.cls].sum()))
        span = best_span(score[window.first :][: len(window.offsets)], window.offsets, n_best, max_answer)
        if span is not None and span[0] > best:
            best = span[0]
            text = context[window.offsets[span[1], 0] : window.offsets[span[2], 1]].strip()
    return Span(text=text, score=best, null=null)


def best_span(scores: np.ndarray, offsets: np.ndarray, n_best: int, max_answer: int) -> tuple[float, int, int] | None:
    """(score, first token, last token) of the best span of one window; None if it holds nothing but white space.

    Args:
        scores: (N, 2) of the context's tokens.
        offsets: (N, 2), see `Window`.
        n_best: see `best_answer`; all tokens are tried if no two of the best make a span.
        max_answer: see `best_answer`.
    """
    allowed = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(allowed):
        return None
    for count in (n_best, len(allowed)):
        firsts, lasts = (allowed[np.argsort(-scores[allowed, side], kind="stable")[:count]] for side in (0, 1))
        length = lasts[None, :] - firsts[:, None]
        total = np.where(
            (length >= 0) & (length < max_answer), scores[firsts, 0][:, None] + scores[lasts, 1][None, :], -np.inf
        )
        row, column = np.unravel_index(np.argmax(total), total.shape)
        if np.isfinite(total[row, column]):
            return float(total[row, column]), int(firsts[row]), int(lasts[column])
    return None
