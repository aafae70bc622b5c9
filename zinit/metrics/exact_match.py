"""How often the predicted text is exactly the expected one."""

from __future__ import annotations

from zinit.metrics.base import TextMetric


class ExactMatch(TextMetric):
    """The fraction of predictions that equal their reference, white space around both aside.

    Examples:
        >>> ExactMatch().compute(predictions=["Paris ", "paris"], references=["Paris", "Paris"])
        {'exact_match': 0.5}
    """

    higher_is_better = True

    def score(self, prediction: str, reference: str, *, ignore_case: bool = False) -> float:
        """1.0 or 0.0.

        Args:
            prediction: the model's text.
            reference: the expected text.
            ignore_case: take upper and lower case for the same, in any script.
        """
        prediction, reference = prediction.strip(), reference.strip()
        if ignore_case:
            prediction, reference = prediction.casefold(), reference.casefold()
        return float(prediction == reference)
