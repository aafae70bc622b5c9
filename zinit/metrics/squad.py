"""SQuAD's exact match and F1, digit for digit those of the official scripts."""

from __future__ import annotations

import functools
import operator
import re
import string
from collections import Counter
from collections.abc import Sequence

from zinit.metrics.base import SeveralReferences

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without a, an and the, with single spaces; in that order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both are the same once normalised."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def f1(prediction: str, reference: str, *, empty_matches: bool = False) -> float:
    """Harmonic mean of precision and recall over the words of both, each as often as it occurs.

    Args:
        prediction: the model's answer.
        reference: one of the expected answers.
        empty_matches: whether two answers without words match (v2.0) or not (v1.1).
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if empty_matches and not (predicted and expected):
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def best_threshold(
    scores: Sequence[float], null_odds: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """The no-answer threshold that would have scored best: an answer is given where its null odds are not above it.

    It is chosen on the very questions it is scored on, so it belongs beside the score at a fixed threshold, not in
    its place.

    Args:
        scores: (N,) of the answers, 0 to 1, were they all given.
        null_odds: (N,) how much better "no answer" scores than the answer.
        answerable: (N,) whether the question has an answer.

    Returns:
        The mean score in percent, and the threshold (one less than the smallest odds where no answer is best).
    """
    order = sorted(range(len(scores)), key=lambda index: null_odds[index])
    total = float(len(scores) - sum(answerable))  # nothing is answered: the unanswerable ones are right
    best, threshold = total, null_odds[order[0]] - 1.0
    for place, index in enumerate(order):
        total += scores[index] if answerable[index] else -1.0
        last = place + 1 == len(order) or null_odds[order[place + 1]] > null_odds[index]  # of those that tie
        if last and total > best:
            best, threshold = total, null_odds[index]
    return 100.0 * best / len(scores), threshold


class Squad(SeveralReferences):
    """Exact match and F1 of answers, in percent, each against the best of several references: SQuAD v1.1.

    Examples:
        >>> Squad().compute(predictions=["the Rhine"], references=[["Rhine", "river Rhine"]])
        {'exact_match': 100.0, 'f1': 100.0}
    """

    higher_is_better = True
    _empty_matches = False

    def scores(self, prediction: str, reference: Sequence[str]) -> tuple[float, float]:
        """Exact match and F1 of one answer, 0 to 1.

        Args:
            prediction: the model's answer; empty for none.
            reference: the expected answers.
        """
        best_f1 = max(f1(prediction, text, empty_matches=self._empty_matches) for text in reference)
        return max(exact_match(prediction, text) for text in reference), best_f1

    def _summary(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        for index, reference in enumerate(references):
            if not reference:
                raise ValueError(
                    f"question {index} has no reference; v1.1 has no unanswerable questions (squad_v2 has)"
                )
        return _percent([self.scores(*pair) for pair in zip(predictions, references, strict=True)])


class SquadV2(Squad):
    """The same with unanswerable questions, which have no references and expect an empty answer: SQuAD v2.0.

    Also gives ``has_answer_*`` and ``no_answer_*``, over the questions that have an answer or none, and with
    ``null_odds`` what the best threshold would have given (see `best_threshold`): ``best_exact_match``, ``best_f1``
    and their ``*_threshold``. For these the predictions must be answers throughout, never "no answer".

    Examples:
        >>> SquadV2().compute(predictions=["Rhine", ""], references=[["the Rhine"], []])["no_answer_f1"]
        100.0
    """

    _empty_matches = True

    def scores(self, prediction: str, reference: Sequence[str]) -> tuple[float, float]:
        """Exact match and F1 of one answer, 0 to 1.

        Args:
            prediction: the model's answer; empty for none.
            reference: the expected answers; none if the question is unanswerable.
        """
        return super().scores(prediction, [text for text in reference if normalize_answer(text)] or [""])

    def _summary(
        self, predictions: list[str], references: list[list[str]], null_odds: Sequence[float] | None = None
    ) -> dict[str, float]:
        scores = [self.scores(*pair) for pair in zip(predictions, references, strict=True)]
        answerable = [bool(reference) for reference in references]
        result = _percent(scores)
        for prefix, wanted in (("has_answer_", True), ("no_answer_", False)):
            part = [score for score, has_answer in zip(scores, answerable, strict=True) if has_answer is wanted]
            if part:
                result |= {prefix + name: value for name, value in _percent(part).items()}
        if null_odds is not None:
            if len(null_odds) != len(scores):
                raise ValueError(f"there are {len(scores)} predictions, but {len(null_odds)} null_odds")
            for place, name in enumerate(("best_exact_match", "best_f1")):
                found = best_threshold([score[place] for score in scores], null_odds, answerable)
                result |= dict(zip((name, f"{name}_threshold"), found, strict=True))
        return result


def _percent(scores: list[tuple[float, float]]) -> dict[str, float]:
    """Means in percent. Summed one by one: Python 3.12's ``sum`` rounds otherwise than the scripts did."""
    totals = (functools.reduce(operator.add, column) for column in zip(*scores, strict=True))
    return {name: 100.0 * total / len(scores) for name, total in zip(("exact_match", "f1"), totals, strict=True)}
