"""How often the final answer to a math problem is the expected one."""

from __future__ import annotations

import re
from fractions import Fraction

from zinit.metrics.base import TextMetric

# What stands before the final answer in MetaMathQA ("The answer is: 5") and in GSM8K ("#### 5").
MARK = re.compile(r"####|\banswer is\b\s*:?", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"[+-]?(\d{1,50}(\.\d{0,50})?|\.\d{1,50})")  # of a model's output: no exponents, which may be huge


class FinalAnswer(TextMetric):
    """The fraction of predictions whose final answer is that of their reference.

    Numbers are compared by value, anything else letter by letter; a prediction that names no answer is wrong.

    Examples:
        >>> FinalAnswer().compute(predictions=["2 + 3 = 5. The answer is: 5.0", "5"], references=["#### 5", "#### 5"])
        {'final_answer': 0.5}
    """

    higher_is_better = True

    def score(self, prediction: str, reference: str) -> float:
        """1.0 or 0.0.

        Args:
            prediction: the model's solution.
            reference: the expected solution; it names its final answer.

        Raises:
            ValueError: if it does not.
        """
        expected = final_answer(reference)
        if expected is None:
            raise ValueError("a reference names no final answer, as in '#### 5' or 'The answer is: 5'")
        return float(final_answer(prediction) == expected)


def final_answer(text: str) -> Fraction | str | None:
    """What follows the last mark on its line: a number, or else a text; None where there is no mark.

    Args:
        text: a solution. Commas between thousands, "$" and "%" around it, and a full stop do not count.
    """
    *before, last = MARK.split(text)
    found = last.strip().split("\n", 1)[0].strip(" .!?$%") if before else ""
    numbers = [part.strip() for part in THOUSANDS.sub("", found).split("/")]
    if len(numbers) > 2 or not all(NUMBER.fullmatch(number) for number in numbers):
        return found or None
    numerator, denominator = map(Fraction, [*numbers, "1"][:2])
    return numerator / denominator if denominator else found
