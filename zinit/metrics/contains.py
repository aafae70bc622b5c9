"""How often an expected answer is somewhere in the predicted text."""

from __future__ import annotations

from collections.abc import Sequence

from zinit.metrics.base import SeveralReferences


class Contains(SeveralReferences):
    """The fraction of predictions that contain one of their references, case and white space aside.

    It is what evaluations of models that answer questions about images in sentences use: "It is a cat." contains "cat".
    It is lenient: "concatenated" contains it too, which lets the rule serve languages that do not part their words.

    Examples:
        >>> Contains().compute(predictions=["It is a Cat.", "A bird."], references=[["cat", "dog"], ["cat"]])
        {'contains': 0.5}
    """

    higher_is_better = True

    def score(self, prediction: str, references: Sequence[str]) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """1.0 or 0.0.

        Args:
            prediction: the model's text.
            references: any of them is right.
        """
        return float(any(_plain(reference) in _plain(prediction) for reference in references))

    def _summary(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not all(_plain(reference) for own in references for reference in own) or not all(references):
            raise ValueError("a pair has no reference; each needs one text or more, none of them empty")
        scores = [self.score(*pair) for pair in zip(predictions, references, strict=True)]
        return {"contains": sum(scores) / len(scores)}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
