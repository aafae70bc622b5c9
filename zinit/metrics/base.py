"""What zinit's text metrics have in common: an ``evaluate.Metric`` that stays in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from zinit.errors import DataError


class TextMetric(evaluate.Metric):
    """Compares one predicted text with one expected text, and averages over the pairs.

    Nothing is read from or written to disk, so any number of processes may each hold their own instance.

    Attributes:
        score: ``score(prediction, reference, **options) -> float``, 0 to 1; a metric is this one method.
        higher_is_better: the direction of its figures; every metric declares it.
    """

    score: Callable[..., float]
    higher_is_better: bool

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation="",
            inputs_description="predictions and references: texts, one of each per example.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _build_data_dir(self) -> str:
        return ""  # evaluate would make an empty folder in the user's cache

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float]:
        """{the metric's name: mean score} over all pairs that were given here or added before.

        Args:
            predictions: texts; leave both out after `add` or `add_batch`.
            references: as many texts.
            options: the metric's own, see its `score`.

        Raises:
            DataError: if there is no pair at all, or the two differ in number, or something is not a text.
        """
        try:
            if (predictions is None) != (references is None):
                raise ValueError("predictions and references belong together; only one of them was given")
            given = 0 if predictions is None else max(len(predictions), len(references))
            if not len(self) + given:
                raise ValueError("there is nothing to compare; at least one prediction and reference are needed")
            result = super().compute(predictions=predictions, references=references, **options)
        except ValueError as error:
            self.writer = self.buf_writer = None  # a bad batch must not leak into the next
            raise DataError(f"{self.name}: {error}.") from error
        assert result is not None  # evaluate's own answer in all processes but the first of several; we are one
        return result

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        for index, pair in enumerate(pairs):
            if None in pair:
                raise ValueError(f"pair {index} holds null in place of a text")
        return {self.name: sum(self.score(*pair, **options) for pair in pairs) / len(pairs)}


class SeveralReferences(TextMetric):
    """Compares each predicted text with all that are expected in its place."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation="",
            inputs_description="predictions: one text per example. references: all expected texts of each example.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float]:
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if prediction is None or reference is None or None in reference:
                raise ValueError(f"pair {index} holds null in place of a text")
        return self._summary(predictions, references, **options)

    @abstractmethod
    def _summary(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """The figures; a `ValueError` says what cannot be compared."""
